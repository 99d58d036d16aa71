"""What to take for a model, an engine and an amount of memory: the recipe that lost least where it was measured, and fits.

Losses are those of :mod:`lowbit.reporting.measured`, sizes those that :func:`lowbit.plan.plan` foresees for the model. A larger
model loses less than the one that was measured; the order of the methods is what carries over. Losses of weights and of
a cache were measured apart, and are added. A gain counts as no loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import torch

from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.modules import KVFormats
from lowbit.plan import Plan, plan
from lowbit.plan.cache import cache_bytes, calibration_bytes, context_of
from lowbit.progress import Progress, silent
from lowbit.recipes import kv_recipe
from lowbit.reporting.comparisons import front
from lowbit.reporting.measured import Measured, MeasuredCache, MeasuredRow, measured, quantize_words

ENGINES: dict[str, tuple[str, ...]] = {
    "lowbit": ("native",),
    "vllm": ("compressed-tensors",),
    "llama.cpp": ("gguf:q8_0", "gguf:q6_k", "gguf:q5_k_m", "gguf:q4_k_m", "gguf:q3_k_m", "gguf:q2_k"),
}
"""The file formats that each engine is given, those that lose least first."""
CONTEXT = 4096
"""Tokens of the sequence whose cache is counted, where the model can hold so many and no other number is asked for."""


@dataclass(frozen=True)
class Choice:
    """One way to quantize the model.

    Attributes:
        row: the measurement it stands on.
        file_format: of the result.
        cache: how keys and values are held; None: as the model computes them.
        weight_bytes, cache_bytes: what they take in the model at hand.
        quantizing_bytes: of memory while quantizing, an estimate.
    """

    row: MeasuredRow
    file_format: str
    cache: MeasuredCache | None
    weight_bytes: int
    cache_bytes: int
    quantizing_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    @property
    def loss(self) -> float:
        """Nats a token, as measured."""
        return _loss(self.row, self.cache)

    @property
    def bound(self) -> bool:
        """Whether more was rounded where it was measured, so that the loss is an upper bound."""
        bits = _preset_bits(self.file_format)
        return bits > self.row.asked or (bits > 0 and self.row.quantizes_inputs)


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
        ValueError: an unknown engine, a model that cannot be opened, nothing that can be made of it, or nothing that
            fits; then the message says what would.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: expected {', '.join(ENGINES)}")
    source = open_model(model, trust_remote_code=trust_remote_code)
    tokens = context or min(CONTEXT, context_of(source.config))
    rows = [row for row in measured().rows if train or not row.trains]
    if patience is not None:
        rows = [row for row in rows if row.time is not None and row.time <= patience]
    search = _Search(source, model, engine, tokens, rows, measured(), progress or silent)
    tried: list[Choice] = []
    for choice in search.choices():
        if choice.bytes <= memory:
            search.progress(1, 1, "finished")
            return _recommendation(search, memory, choice, tried)
        tried.append(choice)
    raise ValueError(_refusal(search, memory, tried))


@dataclass(eq=False)
class _Search:
    """Choices for one model and engine: with fewer bits in a preset's name, then by growing loss. Each way to quantize weights is
    planned once, when its turn comes; of a preset only the best that the format can hold, because all have its size."""

    source: ModelSource
    model: str | PathLike[str]
    engine: str
    tokens: int
    rows: Sequence[MeasuredRow]
    known: Measured
    progress: Progress

    def __post_init__(self) -> None:
        self.plans: dict[tuple[str, str], Plan | None] = {}
        self.reasons: list[str] = []
        self.unable: set[str] = set()  # rows that no preset can hold
        half = self.engine != "lowbit" and self.source.dtype.itemsize > 2
        self.dtype = (
            torch.float16 if half else self.source.dtype
        )  # other engines hold float32 models' caches in 16 bits

    def choices(self) -> Iterator[Choice]:
        ways = [(row, file_format) for file_format in ENGINES[self.engine] for row in self._rows(file_format)]
        pairs = [(row, file_format, each) for row, file_format in ways for each in self.caches]
        pairs.sort(key=lambda pair: (-_preset_bits(pair[1]), _loss(pair[0], pair[2]), pair[2] is not None))
        done: dict[str, str] = {}
        for row, file_format, cache in pairs:
            preset = ":" in file_format
            if preset and (done.get(file_format, row.label) != row.label or row.label in self.unable):
                continue
            planned = self._plan(row, file_format, len(ways))
            if planned is None:
                self.unable |= {row.label} if preset else set()
                continue
            done[file_format] = row.label
            held = self.cache_bytes(cache, self.tokens)
            yield Choice(row, file_format, cache, planned.bytes_out, held, planned.peak_ram_bytes)

    def _rows(self, file_format: str) -> Sequence[MeasuredRow]:
        """The rows that a result in ``file_format`` can stand on."""
        if file_format == "native":  # holds them all: those that others beat in size and loss are never the best
            return [self.rows[i] for i in front([(row.bits, max(0.0, row.loss)) for row in self.rows])]
        if bits := _preset_bits(file_format):  # with fewer bits than the preset's, a row bounds its loss
            return [row for row in self.rows if row.method is not None and row.asked <= bits]
        return self.rows

    @cached_property
    def caches(self) -> Sequence[MeasuredCache | None]:
        """Ways to hold keys and values that the engine and the model can have."""
        if self.engine != "lowbit":
            return (None,)
        known = self.known.caches
        found: list[MeasuredCache | None] = [None]
        for i in front([(each.bits, max(0.0, each.loss)) for each in known]):
            try:
                self.cache_bytes(known[i], self.tokens)
            except ValueError as error:
                self.reasons.append(f"--kv {known[i].name}: {error}")
            else:
                found.append(known[i])
        return found

    def cache_bytes(self, cache: MeasuredCache | None, tokens: int) -> int:
        """Bytes of keys and values of one sequence, with what a checkpoint carries for them; 0 where nothing is known."""
        formats = KVFormats() if cache is None else kv_recipe(cache.name).scheme.cache
        held = cache_bytes(self.source.config, formats, tokens, self.dtype)
        return 0 if held is None else held + calibration_bytes(self.source.config, formats)

    def _plan(self, row: MeasuredRow, file_format: str, total: int) -> Plan | None:
        """What quantizing would give; None if the model or the format cannot have it."""
        key = (row.label, file_format)
        if key not in self.plans:
            self.progress(len(self.plans), total, row.label)
            self.plans[key] = None
            try:
                planned = plan(
                    self.model,
                    row.in_format(file_format),
                    context=self.tokens,
                    format=file_format,
                    trust_remote_code=self.source.trust_remote_code,
                )
            except ValueError as error:
                self.reasons.append(f"{row.label}: {error}")
                return None
            verdict = planned.compatibility.get(find_format(file_format).title, "yes")
            if verdict.startswith("yes"):
                self.plans[key] = planned
            else:
                self.reasons.append(f"{row.label}: {verdict.removeprefix('no: ')}")
        return self.plans[key]


def _loss(row: MeasuredRow, cache: MeasuredCache | None) -> float:
    return max(0.0, row.loss) + (0.0 if cache is None else max(0.0, cache.loss))


def _preset_bits(file_format: str) -> int:
    """The bits in the name of a preset; 0 for formats that are not one."""
    found = re.search(r":q(\d)", file_format)
    return int(found[1]) if found else 0


def _recommendation(search: _Search, memory: int, chosen: Choice, tried: Sequence[Choice]) -> Recommendation:
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
    return -_preset_bits(choice.file_format), choice.loss


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


def _warnings(search: _Search, memory: int, chosen: Choice) -> Iterator[str]:
    known, source = search.known, search.source
    low, high = (f"{each / 1e9:.1f}" for each in known.beside)
    yield (
        f"Python, libraries and activations come on top: {low} to {high} GB beside the weights of a 7B model in "
        f"{known.beside_table}"
    )
    yield "a larger model than the one measured loses less, as a rule; `lowbit compare` measures yours"
    original = sum(header.nbytes for header in source.headers.values())
    if original + search.cache_bytes(None, search.tokens) <= memory:
        yield f"the original fits too, with {original / 1e9:.3g} GB: quantizing saves space and time here, and loses something"
    if cache_bytes(source.config, KVFormats(), search.tokens, search.dtype) is None:
        yield "nothing is known of the size of this model's cache, so it is not counted"
    if chosen.quantizing_bytes > memory:
        yield f"quantizing itself takes about {chosen.quantizing_bytes / 1e9:.3g} GB of memory"


def _refusal(search: _Search, memory: int, tried: Sequence[Choice]) -> str:
    if not tried:
        return f"{search.source.name} cannot be made for {search.engine} by any measured recipe: {'; '.join(search.reasons[:3])}"
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
