"""A packed cache as training sees it: a whole window at once, with gradients.

Decoding makes each token a call of its own: it attends to the tokens before it as the cache holds them by then, packed or in a
window, and to itself as it is (or packed at once, where ``past_only`` is false). Here all tokens of a window are given
together, and every query reads exactly what it would read then. Behind a window of recent tokens, neighbouring queries attend
together: few tokens are packed for one of them and not yet for another, and only those stand among the keys in both ways. Without
a window a query reads all tokens but its own as packed. A prompt that is read in one call is kinder than this: its tokens see each
other as they are.

Rounding passes gradients straight through. They also reach the ranges of tokens, unless :class:`CacheGradients` says otherwise, and
scales and shifts of coordinates.

Positions are the tokens' numbers in the window: what a window hides at its start (left padding) is treated as tokens.

Shapes: B sequence, H query head, G key-value head, R query heads that share one of them, T query, S key token, D channel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention

from lowbit.caches.layer import PackedLayer
from lowbit.caches.side import Side
from lowbit.caches.tokens import fake_tokens
from lowbit.numerics import Int, limited

_QUERIES = 128
"""Queries that attend together where each reads tokens in its own way: about the length of usual windows."""


@dataclass(frozen=True)
class CacheGradients:
    """Which gradients pass the rounding of keys and values.

    Attributes:
        limit: of symmetric integers, no value of at least this magnitude has one; keys are meant as they are packed, before the
            rotary embedding or behind it. None: all have gradients.
        through_ranges: they also reach the values that set the range of a token; False: a range counts as constant.
    """

    limit: float | None = None
    through_ranges: bool = True


def attend_simulated(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    layer: PackedLayer,
    mask: Tensor | None = None,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    dropout: float = 0.0,
    gradients: CacheGradients = CacheGradients(),
) -> Tensor:
    """What attention gives for each token of a window that is decoded token by token through ``layer``: ``[B, T, H, D]`` in the
    query's dtype.

    Args:
        query_BHTD, key_BGSD, value_BGSD: of all tokens of a window, from its first.
        layer: its formats and coordinates; its tokens are not looked at.
        mask: broadcast to ``[B, H, T, S]``, true where a key is seen, or floating and added; it hides the keys behind a query's
            own. None: a token sees itself and all before.
        scaling: None: 1 / sqrt(D).
        softcap: bounds the scores to it by a tanh, before the mask.
        dropout: the share of probabilities that are set to zero.
        gradients: those of keys and values.

    Raises:
        ValueError: other keys than those of the queries' own tokens.
    """
    length, dim = query_BHTD.shape[2:]
    if key_BGSD.shape[2] != length:
        raise ValueError(
            f"a simulated cache needs all tokens of a window in one call, found {length} queries and {key_BGSD.shape[2]} keys; "
            "call the model with use_cache=False and no cache"
        )
    key, value = (
        _read(side, states, layer.spec.past_only, gradients)
        for side, states in zip(layer.sides, (key_BGSD, value_BGSD), strict=True)
    )
    weighing = _Weighing(mask, dim**-0.5 if scaling is None else scaling, softcap, dropout)
    if key.alike and value.alike:
        mixed_BHTD = _attend(query_BHTD, key.others, value.others, weighing)
    elif key.ends is None and value.ends is None and mask is None and softcap is None:
        mixed_BHTD = _own_apart(query_BHTD, key, value, weighing)
    else:
        parts = (range(length)[start : start + _QUERIES] for start in range(0, length, _QUERIES))
        mixed_BHTD = torch.cat([_part(query_BHTD, queries, key, value, weighing) for queries in parts], 2)
    return mixed_BHTD.transpose(1, 2).to(query_BHTD.dtype)


@dataclass(frozen=True)
class _Read:
    """How the queries of a window read its tokens ``[B, G, S, D]``.

    Attributes:
        own: as a query reads its own and, behind a window, the recent ones.
        others: as it reads those before; the same tensor as ``own`` where all are read so.
        ends: ``[T]`` on the CPU: behind a window, how many of the first tokens each query reads as in ``others``. Tokens that are
            never packed are the same in both.
    """

    own: Tensor
    others: Tensor
    ends: Tensor | None = None

    @property
    def alike(self) -> bool:
        """Whether every query reads all tokens in one way."""
        return self.own is self.others

    def packed(self, queries: range) -> Tensor:
        """Which tokens, up to the last of ``queries``, each of them reads as in ``others``: bool ``[queries, tokens]``."""
        number_T = torch.tensor(queries)
        ends_T = number_T + 1 if self.alike else number_T if self.ends is None else self.ends[number_T]
        return torch.arange(queries.stop) < ends_T[:, None]


@dataclass(frozen=True)
class _Weighing:
    """How products become weights; see :func:`attend_simulated`."""

    mask: Tensor | None
    scale: float
    softcap: float | None
    dropout: float


def _own_apart(query_BHTD: Tensor, key: _Read, value: _Read, weighing: _Weighing) -> Tensor:
    """Attention where only a query's own token is read in another way, without a mask and a cap.

    The first key stands for the own token of any query: it is zero but for one more channel, in which each query holds the score of
    its own key. The tokens before follow, so keys are as many as queries, and causal as they were. One more channel of the values
    tells the weight of the first, which is the own token's.
    """
    shared = query_BHTD.shape[1] // key.own.shape[1]
    own_key, own_value = (read.own.repeat_interleave(shared, 1) for read in (key, value))
    accurate = torch.promote_types(query_BHTD.dtype, torch.float32)
    own_BHT1 = weighing.scale * (query_BHTD.to(accurate) * own_key).sum(-1, keepdim=True)
    query = torch.cat([query_BHTD * weighing.scale, own_BHT1.to(query_BHTD.dtype)], -1)
    mixed = _attend(query, _own_first(key.others), _own_first(value.others), replace(weighing, scale=1.0))
    return mixed[..., :-1] + mixed[..., -1:] * own_value


def _own_first(x_BGSD: Tensor) -> Tensor:
    """The token that stands for a query's own, then all but the last, which only its own query reads; one more channel, of which the
    first token has 1 and the others 0."""
    x = pad(x_BGSD[:, :, :-1], (0, 1, 1, 0))
    x[:, :, 0, -1] = 1
    return x


def _part(query_BHTD: Tensor, queries: range, key: _Read, value: _Read, weighing: _Weighing) -> Tensor:
    """Attention of neighbouring ``queries``, ``[B, H, queries, D]``.

    A token stands among the keys once for each way in which one of these queries reads it, and a mask shows each query the one that
    is its own way. Most tokens are read in one way by all of them, and those behind the last query by none.
    """
    causal = torch.arange(queries.stop) <= torch.tensor(queries)[:, None]
    key_packed, value_packed = key.packed(queries), value.packed(queries)
    keys, values, tokens, seen = [], [], [], []
    for as_key, as_value in itertools.product((True, False), repeat=2):
        reading = causal & (key_packed == as_key) & (value_packed == as_value)
        token_S = reading.any(0).nonzero()[:, 0]
        if not len(token_S):
            continue
        span = slice(int(token_S[0]), int(token_S[-1]) + 1)
        keys.append((key.others if as_key else key.own)[:, :, span])
        values.append((value.others if as_value else value.own)[:, :, span])
        tokens.append(torch.arange(span.start, span.stop))
        seen.append(reading[:, span])
    here = slice(queries.start, queries.stop)
    mask = torch.cat(seen, 1).to(query_BHTD.device)
    if (given := weighing.mask) is not None:
        given = given.expand(*given.shape[:-2], query_BHTD.shape[2], -1)[..., here, torch.cat(tokens)]
        mask = given & mask if given.dtype == torch.bool else given.masked_fill(~mask, torch.finfo(given.dtype).min)
    return _attend(query_BHTD[:, :, here], torch.cat(keys, 2), torch.cat(values, 2), replace(weighing, mask=mask))


def _attend(query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, weighing: _Weighing) -> Tensor:
    """Attention where every query reads a key in one way, ``[B, H, T, D]``; without a mask it reads its own and those before.

    What a query without any key gets is finite.
    """
    shared = query_BHTD.shape[1] // key_BGSD.shape[1]
    key_BHSD, value_BHSD = (states.repeat_interleave(shared, 1) for states in (key_BGSD, value_BGSD))
    mask, dropout, scale, softcap = weighing.mask, weighing.dropout, weighing.scale, weighing.softcap
    if softcap is None:
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(query_BHTD.dtype)
        return scaled_dot_product_attention(
            query_BHTD, key_BHSD, value_BHSD, mask, dropout, is_causal=mask is None, scale=scale
        )
    score = (query_BHTD * scale) @ key_BHSD.mT
    score = softcap * torch.tanh(score.to(torch.promote_types(score.dtype, torch.float32)) / softcap)
    if mask is None:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
    score = score.masked_fill(~mask, torch.finfo(score.dtype).min) if mask.dtype == torch.bool else score + mask
    return drop(score.softmax(-1), dropout, dropout > 0).to(value_BHSD.dtype) @ value_BHSD


def _read(side: Side, x_BHTD: Tensor, past_only: bool, gradients: CacheGradients) -> _Read:
    """How the queries of a window read tokens of a side."""
    length = x_BHTD.shape[2]
    begun = range(length) if past_only else range(1, length + 1)  # tokens that have settled when each query reads
    behind = [max(0, count - side.sink) for count in begun]
    counts = list(map(side.leaving, behind))
    if not counts or not counts[-1]:
        return _Read(x_BHTD, x_BHTD)
    with torch.autocast(x_BHTD.device.type, enabled=False):
        packed = as_packed(side, x_BHTD, counts[-1], gradients)
    if counts == behind:  # no window: a token is packed once it has settled
        return _Read(x_BHTD if past_only else packed, packed)
    return _Read(x_BHTD, packed, side.sink + torch.tensor(counts))


def as_packed(side: Side, x_BHTD: Tensor, count: int, gradients: CacheGradients) -> Tensor:
    """Tokens ``[B, H, T, D]`` of which ``count`` behind the sinks are as ``side`` reads them once they are packed."""
    assert side.spec is not None
    start = side.sink
    waiting = next(number for number in itertools.count(1) if side.leaving(number))  # when the first ones are packed
    behind = side.turned(x_BHTD[:, :, start : start + max(count, waiting)], start, -1).float()
    coordinates = side.placed(behind[:, :, :waiting])
    symmetric = isinstance(side.spec.grid, Int) and side.spec.grid.symmetric
    tokens_BHND = coordinates.forward(limited(behind[:, :, :count], gradients.limit if symmetric else None))
    rounded_BHND = fake_tokens(
        tokens_BHND,
        side.spec,
        coordinates.range,
        shared_heads=side.shared_heads,
        through_ranges=gradients.through_ranges,
    )
    read = side.turned(coordinates.inverse(rounded_BHND), start, 1)
    return torch.cat([x_BHTD[:, :, :start], read.to(x_BHTD.dtype), x_BHTD[:, :, start + count :]], 2)
