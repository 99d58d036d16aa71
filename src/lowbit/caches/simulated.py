"""A packed cache as training sees it: a whole window at once, with gradients.

Decoding makes each token a call of its own: it attends to the tokens before it as the cache holds them by then, packed or in a
window, and to itself as it is (or packed at once, where ``past_only`` is false). Here all tokens of a window are given
together, and every query reads exactly what it would read then. Behind a window of recent tokens a key is scored twice, as it is
and as packed, and a mask says which of the two each query sees. Without one a query reads all tokens but its own as packed, and a
product serves. A prompt that is read in one call is kinder than this: its tokens see each other as they are.

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
    if key.packed_TS is not None or value.packed_TS is not None:
        mixed_BHTD = _mixed(query_BHTD, key, value, weighing)
    elif key.own is key.others and value.own is value.others:
        mixed_BHTD = _all_alike(query_BHTD, key.others, value.others, weighing)
    else:
        mixed_BHTD = _own_apart(query_BHTD, key, value, weighing)
    return mixed_BHTD.transpose(1, 2).to(query_BHTD.dtype)


@dataclass(frozen=True)
class _Read:
    """How the queries of a window read its tokens ``[B, G, S, D]``.

    Attributes:
        own: as a query reads its own.
        others: as it reads those before; the same tensor as ``own`` where all are read so.
        packed_TS: behind a window of recent tokens, which of them each query reads as in ``others``; the rest it reads as in ``own``.
    """

    own: Tensor
    others: Tensor
    packed_TS: Tensor | None = None


@dataclass(frozen=True)
class _Weighing:
    """How products become weights; see :func:`attend_simulated`."""

    mask: Tensor | None
    scale: float
    softcap: float | None
    dropout: float


def _own_apart(query_BHTD: Tensor, key: _Read, value: _Read, weighing: _Weighing) -> Tensor:
    """Attention where only a query's own token is read in another way.

    The first key stands for the own token of any query: it is zero but for one more channel, in which each query holds the score of
    its own key. The tokens before follow, so keys are as many as queries, and causal as they were. One more channel of the values
    tells the weight of the first, which is the own token's.
    """
    shared = query_BHTD.shape[1] // key.own.shape[1]
    own_key, own_value = (read.own.repeat_interleave(shared, 1) for read in (key, value))
    accurate = torch.promote_types(query_BHTD.dtype, torch.float32)
    own_BHT1 = weighing.scale * (query_BHTD.to(accurate) * own_key).sum(-1, keepdim=True)
    query = torch.cat([query_BHTD * weighing.scale, own_BHT1.to(query_BHTD.dtype)], -1)
    weighing = replace(weighing, mask=_own_first_mask(weighing.mask), scale=1.0)
    mixed = _all_alike(query, _own_first(key.others), _own_first(value.others), weighing)
    return mixed[..., :-1] + mixed[..., -1:] * own_value


def _own_first(x_BGSD: Tensor) -> Tensor:
    """The token that stands for a query's own, then all but the last, which only its own query reads; one more channel, of which the
    first token has 1 and the others 0."""
    x = pad(x_BGSD[:, :, :-1], (0, 1, 1, 0))
    x[:, :, 0, -1] = 1
    return x


def _own_first_mask(mask: Tensor | None) -> Tensor | None:
    """``mask`` for keys of which the first is a query's own and the others are those before it."""
    if mask is None:
        return None
    moved = torch.cat([mask.diagonal(dim1=-2, dim2=-1)[..., None], mask[..., :-1]], -1)
    before = torch.ones(moved.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return moved & before if mask.dtype == torch.bool else moved.masked_fill(~before, torch.finfo(mask.dtype).min)


def _all_alike(query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, weighing: _Weighing) -> Tensor:
    """Attention where every query reads all tokens in one way."""
    if weighing.mask is not None or weighing.softcap is not None:
        return _mixed(query_BHTD, _Read(key_BGSD, key_BGSD), _Read(value_BGSD, value_BGSD), weighing)
    shared = query_BHTD.shape[1] // key_BGSD.shape[1]
    key_BHSD, value_BHSD = (states.repeat_interleave(shared, 1) for states in (key_BGSD, value_BGSD))
    return scaled_dot_product_attention(
        query_BHTD, key_BHSD, value_BHSD, dropout_p=weighing.dropout, is_causal=True, scale=weighing.scale
    )


def _mixed(query_BHTD: Tensor, key: _Read, value: _Read, weighing: _Weighing) -> Tensor:
    """Attention with all its weights at hand."""
    batch, heads, length, dim = query_BHTD.shape
    groups = key.own.shape[1]
    query_BGXD = (query_BHTD * weighing.scale).reshape(batch, groups, -1, dim)

    def scores(states: Tensor) -> Tensor:
        return (query_BGXD @ states.mT).view(batch, groups, -1, length, length)

    score = scores(key.others)
    if key.packed_TS is not None:
        score = torch.where(key.packed_TS, score, scores(key.own))
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    if (softcap := weighing.softcap) is not None:
        score = softcap * torch.tanh(score / softcap)
    p = drop(_seen(score, weighing.mask).softmax(-1), weighing.dropout, weighing.dropout > 0).to(value.own.dtype)
    if value.packed_TS is None:
        mixed = p.flatten(2, 3) @ value.others
    else:
        parts = ((p * value.packed_TS, value.others), (p * ~value.packed_TS, value.own))
        mixed = sum(part.flatten(2, 3) @ states for part, states in parts)
    assert isinstance(mixed, Tensor)
    return mixed.reshape(batch, heads, length, -1)


def _seen(score_BGRTS: Tensor, mask: Tensor | None) -> Tensor:
    """Scores, very low where a query does not see a key."""
    groups, shared, length, _ = score_BGRTS.shape[1:]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=score_BGRTS.device).tril()
    elif mask.dim() == 4:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (groups, shared))
    if mask.dtype == torch.bool:
        return score_BGRTS.masked_fill(~mask, torch.finfo(score_BGRTS.dtype).min)  # a row without keys stays finite
    return score_BGRTS + mask


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
    token_S = torch.arange(length, device=x_BHTD.device)
    end_T1 = side.sink + torch.tensor(counts, device=x_BHTD.device)[:, None]
    return _Read(x_BHTD, packed, (token_S >= side.sink) & (token_S < end_T1))


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
