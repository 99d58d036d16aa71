"""Texts that a model writes, several side by side.

The texts of a batch begin with equally many tokens, so no position is ever padded: a model needs no mask, whatever its
attention or its state. A text that has ended leaves the batch. One text alone runs by the compiled step, where the model has it.

Random numbers belong to a text (see :mod:`lowbit.generation.sampling`), so the same call gives the same texts. In another batch
a text has the same numbers, but products round differently there: a text may take another turn where two choices are nearly
equal, and is another text from there on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.decoding import cache_argument
from lowbit.decoding.packed_cache import packed_cache
from lowbit.generation.sampling import Sampling
from lowbit.generation.tokens import FirstTokens, ends_of
from lowbit.modules import kv_formats

BATCH = 16
"""Texts side by side, unless something else is asked."""


@dataclass(frozen=True)
class Start:
    """How a text begins.

    Attributes:
        number: of the text; its random numbers depend on it.
        ids: its first tokens, one at least.
        greedy: how many tokens after them are the likeliest ones.
        most: tokens of the whole text at most.
    """

    number: int
    ids: tuple[int, ...]
    greedy: int
    most: int


@dataclass(frozen=True)
class Written:
    """A text.

    Attributes:
        start: how it began.
        ids: all its tokens, those of the start and the one that ended it included.
        ended: whether the model ended it; otherwise it reached its length.
        confidence: the mean of the model's own probabilities of the tokens that it chose.
    """

    start: Start
    ids: tuple[int, ...]
    ended: bool
    confidence: float


@torch.no_grad()
def write(
    model: Any,
    starts: Sequence[Start],
    sampling: Sampling,
    ends: frozenset[int],
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[Written]:
    """Continues ``starts``, which have equally many tokens, side by side.

    Args:
        model: a causal language model in evaluation mode; where its formats say how its cache is held, it reads through
            such a cache.
        ends: tokens that end a text.
        on_tokens: called with the number of new tokens, step by step.

    Raises:
        ValueError: a model whose logits are no numbers, or that cannot continue a text.
    """
    remembered, formats = cache_argument(model), kv_formats(model)
    cache: Any = packed_cache(model, formats.kv, formats.overrides) if formats else None
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    draws = [sampling.draws(start.number) for start in starts]
    ids = [list(start.ids) for start in starts]
    chances: list[list[float]] = [[] for _ in starts]
    rows = [row for row, start in enumerate(starts) if len(start.ids) < start.most]
    read = torch.tensor([ids[row] for row in rows])
    while rows:
        out = model(input_ids=read.to(model.device), use_cache=True, **{remembered: cache}, **last)
        cache = getattr(out, remembered)
        token_B, chance_B = sampling.choose(
            out.logits[:, -1].float().cpu(),
            torch.tensor([draws[row]() for row in rows], dtype=torch.float64),
            torch.tensor([len(chances[row]) < starts[row].greedy for row in rows]),
        )
        for row, token, chance in zip(rows, token_B.tolist(), chance_B.tolist(), strict=True):
            ids[row].append(token)
            chances[row].append(chance)
        on_tokens(len(rows))
        left = [i for i, row in enumerate(rows) if ids[row][-1] not in ends and len(ids[row]) < starts[row].most]
        if 0 < len(left) < len(rows):
            _keep(cache, torch.tensor(left))
        rows, read = [rows[i] for i in left], token_B[left, None]
    return [
        Written(start, tuple(ids[row]), ids[row][-1] in ends and bool(chances[row]), _mean(chances[row]))
        for row, start in enumerate(starts)
    ]


def _keep(cache: Any, indices: Tensor) -> None:
    """Forgets the texts of a cache that are not in ``indices``."""
    try:
        cache.reorder_cache(indices)  # the one selection that caches of attention and of states have alike
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"a {type(cache).__name__} cannot go on without the texts that have ended; write one text at a time: batch 1"
        ) from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class Total:
    """What has been written so far."""

    texts: int = 0
    tokens: int = 0

    def plus(self, texts: Sequence[Written]) -> Total:
        return Total(self.texts + len(texts), self.tokens + sum(len(text.ids) for text in texts))


def write_tokens(
    model: Any,
    tokenizer: Any,
    sampling: Sampling,
    tokens: int,
    length: int,
    *,
    bos: int | None = None,
    batch: int = BATCH,
    done: Total = Total(),
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[list[Written]]:
    """Texts out of nothing, batch by batch, until they have ``tokens`` tokens together. The last batch may give more.

    Args:
        tokenizer: says which tokens can begin a text; None: the config alone says.
        length: tokens of a text at most.
        bos: begins every text, before its first token; None: nothing does.
        done: what an earlier call wrote: this one goes on behind it.

    Raises:
        ValueError: nothing was asked, texts longer than the model's positions, or as :func:`write`.
    """
    check_sizes(tokens, length, batch, bos)
    check_length(model, length)
    firsts, ends = FirstTokens(tokenizer, model.config, sampling.seed), ends_of(model, tokenizer)
    before = () if bos is None else (bos,)
    while done.tokens < tokens:
        usual = done.tokens / done.texts if done.texts else length
        count = min(batch, max(1, round((tokens - done.tokens) / usual)))
        starts = []
        for number in range(done.texts, done.texts + count):
            first, round_ = firsts.of(number)
            starts.append(Start(number, (*before, first), sampling.greedy_tokens(number + round_), length))
        texts = write(model, starts, sampling, ends, on_tokens)
        done = done.plus(texts)
        yield texts


def check_sizes(tokens: int, length: int, batch: int, bos: int | None) -> None:
    """Raises ValueError where :func:`write_tokens` would write nothing."""
    least = 2 if bos is None else 3
    if tokens < 1 or batch < 1 or length < least:
        raise ValueError(
            f"{tokens} tokens in texts of {length}, {batch} at a time, were asked: expected a token and a batch at least, and "
            f"texts of {least} tokens or more"
        )


def check_length(model: Any, length: int) -> None:
    """Raises ValueError where a model, or what has its config, has no positions for texts of ``length`` tokens."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"texts of {length} tokens were asked; the model's context is {limit}")
