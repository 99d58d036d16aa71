"""What to take for a model, an engine and an amount of memory: the recipe that lost least where it was measured, and fits.

Losses are those of :mod:`lowbit.reporting.measured`, sizes those that :func:`lowbit.plan.plan` foresees for the model. A larger
model loses less than the one that was measured; the order of the methods is what carries over. Losses of weights and of
a cache were measured apart, and are added. A gain counts as no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from lowbit.checkpoints.config import check_positions
from lowbit.checkpoints.source import open_model
from lowbit.modules import KVFormats
from lowbit.plan.cache import cache_bytes, context_of
from lowbit.progress import Progress, silent
from lowbit.reporting.choices import ENGINES, Choice, Search, preset_bits
from lowbit.reporting.measured import Measured, measured, quantize_words

CONTEXT = 4096
"""Tokens of the sequence whose cache is counted, where the model can hold so many and no other number is asked for."""


@dataclass(frozen=True)
class Recommendation:
    """What to take.

    Attributes:
        memory: bytes for weights and cache.
        tokens: of the sequence whose cache is counted.
        chosen: the choice that loses least of those that fit.
        better: those that lose less and do not fit, with an unquantized cache.
        command: makes it.
        reasons: what it stands on.
        warnings: what the user should know.
    """

    model: str
    engine: str
    memory: int
    tokens: int
    chosen: Choice
    better: tuple[Choice, ...]
    command: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self) | {"loss": self.chosen.loss, "bytes": self.chosen.bytes}


def recommend(
    model: str | PathLike[str],
    memory: int,
    engine: str = "lowbit",
    *,
    context: int | None = None,
    train: bool = False,
    patience: float | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Recommendation:
    """The recipe that loses least, of those that were measured and whose result fits. Reads no weight.

    Args:
        model: as for :func:`lowbit.quantize`.
        memory: bytes that weights and the cache of one sequence may take together.
        engine: one of :data:`ENGINES`.
        context: tokens of that sequence; None: :data:`CONTEXT`, or as many as the model was made for.
        train: consider recipes that train the whole model, too.
        patience: consider only methods that were timed, and took at most so many times GPTQ's time; None: all.
        trust_remote_code: allow the model's own Python code.
        progress: called with the choices that were looked at, their number, and the last one.

    Raises:
        ValueError: an unknown engine, a model that cannot be opened, a sequence longer than its positions, nothing that can be
            made of it, or nothing that fits; then the message says what would.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: expected {', '.join(ENGINES)}")
    source = open_model(model, trust_remote_code=trust_remote_code)
    if context is not None:
        check_positions(source, context, f"a sequence of {context} tokens")
    tokens = context or min(CONTEXT, context_of(source.config))
    rows = [row for row in measured().rows if train or not row.trains]
    if patience is not None:
        rows = [row for row in rows if row.time is not None and row.time <= patience]
    search = Search(source, model, engine, tokens, rows, measured(), progress or silent)
    tried: list[Choice] = []
    for choice in search.choices():
        if choice.bytes <= memory:
            search.progress(1, 1, "finished")
            return _recommendation(search, memory, choice, tried)
        tried.append(choice)
    raise ValueError(_refusal(search, memory, tried))


def _recommendation(search: Search, memory: int, chosen: Choice, tried: Sequence[Choice]) -> Recommendation:
    kv = None if chosen.cache is None else chosen.cache.name
    better = [each for each in tried if each.cache is None and _order(each) < _order(chosen)]
    return Recommendation(
        search.source.name,
        search.engine,
        memory,
        search.tokens,
        chosen,
        tuple(better),
        quantize_words(chosen.row, str(search.model), chosen.file_format, kv),
        tuple(_reasons(search.known, chosen)),
        tuple(_warnings(search, memory, chosen)),
    )


def _order(choice: Choice) -> tuple[int, float]:
    return -preset_bits(choice.file_format), choice.loss


def _reasons(known: Measured, chosen: Choice) -> Iterator[str]:
    row = chosen.row
    kl = "" if row.kl is None else f", KL divergence {row.kl:.3g} nats a token"
    yield (
        f"measured as {row.label!r} in {row.table}: perplexity {row.perplexity:.4g} where the original has {row.original:.4g} "
        f"({known.model}, {known.text}){kl}"
    )
    if chosen.file_format not in ("native", "compressed-tensors"):
        more = "rounds less than that, so that is an upper bound" if chosen.bound else "rounds to grids of its own"
        yield f"{chosen.file_format} {more}; its own loss is not in the tables: evaluate the result"
    if chosen.cache is not None:
        yield (
            f"{chosen.cache.name} measured in {chosen.cache.table}: {chosen.cache.loss:+.4f} nats a token at {chosen.cache.bits:g} "
            "bits a number; that it adds to the loss of the weights is an assumption"
        )
    if row.time is not None:
        yield f"its method takes about {row.time:.2g} times the time of gptq (benchmarks/results/speed.jsonl)"


def _warnings(search: Search, memory: int, chosen: Choice) -> Iterator[str]:
    known, source = search.known, search.source
    low, high = (f"{each / 1e9:.1f}" for each in known.beside)
    yield (
        f"Python, libraries and activations come on top: {low} to {high} GB beside the weights of a 7B model in "
        f"{known.beside_table}"
    )
    yield "a larger model than the one measured loses less, as a rule; `lowbit compare` measures yours"
    original = sum(header.nbytes for header in source.headers.values())
    original += search.cache_bytes(None, search.tokens)
    if original <= memory:
        yield f"the original fits too, with {original / 1e9:.3g} GB: quantizing saves space and time here, and loses something"
    if cache_bytes(source.config, KVFormats(), search.tokens, search.dtype) is None:
        yield "nothing is known of the size of this model's cache, so it is not counted"
    if chosen.quantizing_bytes > memory:
        yield f"quantizing itself takes about {chosen.quantizing_bytes / 1e9:.3g} GB of memory"


def _refusal(search: Search, memory: int, tried: Sequence[Choice]) -> str:
    if not tried:
        why = (
            "; ".join(search.reasons[:3])
            or "none is that quick, or none is of the kinds that were asked for; raise --patience"
        )
        return f"{search.source.name} cannot be made for {search.engine} by any measured recipe: {why}"
    least = min(tried, key=lambda choice: choice.bytes)
    cache = "" if least.cache is None else f" and --kv {least.cache.name}"
    way = f"{least.row.label!r}{'' if least.file_format == 'native' else f' as {least.file_format}'}{cache}"
    would = [f"--memory {least.bytes / 1e9 + 0.005:.2f}GB"]
    if fitting := _most_tokens(
        lambda n: search.cache_bytes(least.cache, n), memory - least.weight_bytes, search.tokens
    ):
        would.append(f"--context {fitting}")
    return (
        f"nothing that was measured and works fits into {memory / 1e9:.3g} GB for {search.engine} with a sequence of "
        f"{search.tokens} tokens; the smallest, {way}, takes {least.bytes / 1e9:.3g} GB ({least.weight_bytes / 1e9:.3g} of weights, "
        f"{least.cache_bytes / 1e9:.3g} of cache). What would fit: {' or '.join(would)}, or a smaller model"
    )


def _most_tokens(bytes_of: Callable[[int], int], room: int, tokens: int) -> int:
    """The longest sequence of fewer than ``tokens`` whose cache has room; 0: none."""
    low, high = 0, tokens  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= room else (low, middle)
    return low
