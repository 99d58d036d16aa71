"""A packed cache as training sees it: a whole window at once, with gradients.

Decoding makes each token a call of its own: it attends to the tokens before it as the cache holds them by then, packed or in a
window, and to itself as it is (or packed at once, where ``past_only`` is false). Here all tokens of a window are given
together, and every query reads exactly what it would read then. So a key is scored twice, as it is and as packed, and a mask says
which of the two each query sees. A prompt that is read in one call is kinder than this: its tokens see each other as they are.

Rounding passes gradients straight through. They also reach the ranges of tokens, unless :class:`CacheGradients` says otherwise, and
scales and shifts of coordinates.

Positions are the tokens' numbers in the window: what a window hides at its start (left padding) is treated as tokens.

Shapes: B sequence, H query head, G key-value head, R query heads that share one of them, T query, S key token, D channel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

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
        mask: broadcast to ``[B, H, T, S]``, true where a key is seen, or floating and added; None: a token sees itself and all
            before.
        scaling: None: 1 / sqrt(D).
        softcap: bounds the scores to it by a tanh, before the mask.
        dropout: the share of probabilities that are set to zero.
        gradients: those of keys and values.

    Raises:
        ValueError: other keys than those of the queries' own tokens.
    """
    batch, heads, length, dim = query_BHTD.shape
    groups = key_BGSD.shape[1]
    if key_BGSD.shape[2] != length:
        raise ValueError(
            f"a simulated cache needs all tokens of a window in one call, found {length} queries and {key_BGSD.shape[2]} keys; "
            "call the model with use_cache=False and no cache"
        )
    scale = dim**-0.5 if scaling is None else scaling
    (keys, key_packed_TS), (values, value_packed_TS) = (
        _both(side, states, layer.spec.past_only, gradients)
        for side, states in zip(layer.sides, (key_BGSD, value_BGSD), strict=True)
    )
    if mask is None and softcap is None and key_packed_TS is None and value_packed_TS is None:
        k_BHSD, v_BHSD = (side[0].repeat_interleave(heads // groups, 1) for side in (keys, values))
        mixed_BHTD = scaled_dot_product_attention(
            query_BHTD, k_BHSD, v_BHSD, dropout_p=dropout, is_causal=True, scale=scale
        )
        return mixed_BHTD.transpose(1, 2).to(query_BHTD.dtype)
    query_BGXD = (query_BHTD * scale).reshape(batch, groups, -1, dim)
    scores = [(query_BGXD @ k.mT).view(batch, groups, -1, length, length) for k in keys]
    score = scores[0] if key_packed_TS is None else torch.where(key_packed_TS, scores[1], scores[0])
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    p = drop(_seen(score, mask).softmax(-1), dropout, dropout > 0).to(value_BGSD.dtype)
    parts = [p] if value_packed_TS is None else [p * ~value_packed_TS, p * value_packed_TS]
    mixed = sum(part.flatten(2, 3) @ v for part, v in zip(parts, values, strict=True))
    assert isinstance(mixed, Tensor)
    return mixed.reshape(batch, heads, length, -1).transpose(1, 2).to(query_BHTD.dtype)


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


def _both(side: Side, x_BHTD: Tensor, past_only: bool, gradients: CacheGradients) -> tuple[list[Tensor], Tensor | None]:
    """Tokens as they are, and as they are read once packed; and which are packed for each query, ``[T, S]``. One of the two alone,
    and None, where every query reads all tokens so."""
    length = x_BHTD.shape[2]
    begun = range(length) if past_only else range(1, length + 1)  # tokens that have settled when each query reads
    counts = [side.leaving(max(0, count - side.sink)) for count in begun]
    if not counts or not counts[-1]:
        return [x_BHTD], None
    with torch.autocast(x_BHTD.device.type, enabled=False):
        packed = as_packed(side, x_BHTD, counts[-1], gradients)
    if counts == list(range(1, length + 1)):  # no window: a token is packed before it is read
        return [packed], None
    token_S = torch.arange(length, device=x_BHTD.device)
    end_T1 = side.sink + torch.tensor(counts, device=x_BHTD.device)[:, None]
    return [x_BHTD, packed], (token_S >= side.sink) & (token_S < end_T1)


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
