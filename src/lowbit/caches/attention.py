"""Attention over a packed layer, without its tokens in full precision.

A few queries go through the compiled code, which unpacks a tile of tokens at a time. More meet the layer's decoded tokens at
once, by torch's attention, if these take little memory (they are forgotten with the layer); otherwise in runs, each multiplied and
forgotten, with the sums of a softmax carried along. Runs are also the reference for the compiled code.

Shapes: B sequence, H query head, G key-value head, R query heads that share one of them, T query token, S key token, D channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowbit import kernels
from lowbit.caches import on_gpu
from lowbit.caches.compiled import packs, why_not

if TYPE_CHECKING:
    from lowbit.caches.layer import PackedLayer

RUN = 1024
"""Tokens that are decoded together."""
AT_ONCE = 2**26
"""Bytes of a layer's decoded tokens, in float32, up to which they are decoded at once."""


def attend_packed(
    query_BHTD: Tensor,
    layer: PackedLayer,
    mask: Tensor | None = None,
    scaling: float | None = None,
    *,
    compiled: bool = True,
) -> Tensor:
    """``softmax(scaling * query @ keys.T + mask) @ values`` over all tokens of ``layer``, ``[B, T, H, D]`` in the query's dtype.

    Args:
        query_BHTD: of the last T tokens.
        mask: ``[B, 1 or H, T, S]``, true where a key is seen, or floating and added; None: a token sees itself and all before.
        scaling: None: 1 / sqrt(D).
        compiled: use compiled code where it can do it.
    """
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    batch, _, count, _ = query_BHTD.shape
    if compiled:
        seen = _seen(mask, query_BHTD, layer.get_seq_length()) if count <= kernels.cache.MOST_QUERIES else None
        if seen is not None and on_gpu.why_not(layer) is None:
            return _on_gpu(query_BHTD, layer, *seen, scale)
        if seen is not None and compiled_reason(layer) is None:
            return _compiled(query_BHTD, layer, *seen, scale)
        if sum(batch * side.heads * side.dim for side in layer.sides) * layer.get_seq_length() * 4 <= AT_ONCE:
            return _at_once(query_BHTD, layer, mask, scale)
    return _in_runs(query_BHTD, layer, mask, scale)


def compiled_reason(layer: PackedLayer) -> str | None:
    """Why the compiled code does not attend over ``layer``; None if it does."""
    if not kernels.cache.available(kernels.forced() or ""):
        return "there is no compiled code"
    return next((r for i, side in enumerate(layer.sides) if (r := why_not(side, bool(i))) is not None), None)


def packing_reason(layer: PackedLayer) -> str | None:
    """Why the compiled code does not pack tokens of ``layer``; None if it does."""
    side = next((side for side in layer.sides if not packs(side)), None)
    return None if side is None or side.spec is None else f"tokens are packed to {side.spec.grid}, which runs in torch"


def _compiled(query_BHTD: Tensor, layer: PackedLayer, begin_BT: Tensor, end_BT: Tensor, scale: float) -> Tensor:
    batch, heads, count, dim = query_BHTD.shape
    keys, values = layer.descriptions()
    isa = kernels.forced() or next(iter(kernels.native.instruction_sets()))
    groups = layer.key_side.heads
    query_BGRD = (query_BHTD.float() * scale).reshape(batch, groups, heads // groups * count, dim).contiguous()
    out = kernels.cache.attend(isa, keys, values, query_BGRD, begin_BT, end_BT, layer.value_side.dim)
    return out.view(batch, heads, count, -1).transpose(1, 2).to(query_BHTD.dtype)


def _on_gpu(query_BHTD: Tensor, layer: PackedLayer, begin_BT: Tensor, end_BT: Tensor, scale: float) -> Tensor:
    batch, heads, count, dim = query_BHTD.shape
    groups = layer.key_side.heads
    query_BGRD = (query_BHTD.float() * scale).reshape(batch, groups, heads // groups * count, dim)
    key_S = torch.arange(layer.get_seq_length(), device=query_BHTD.device)
    begin_BT1, end_BT1 = (t.to(key_S.device)[..., None] for t in (begin_BT, end_BT))
    seen_BTS = (key_S >= begin_BT1) & (key_S < end_BT1)
    out = on_gpu.attend(query_BGRD, layer, seen_BTS.repeat(1, heads // groups, 1))
    return out.view(batch, heads, count, -1).transpose(1, 2).to(query_BHTD.dtype)


def _seen(mask: Tensor | None, query_BHTD: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
    """The first key that each query sees and the one after the last, int32 ``[B, T]``; None where it sees others between."""
    batch, _, count, _ = query_BHTD.shape
    if mask is None:
        end = torch.arange(length - count + 1, length + 1, dtype=torch.int32).repeat(batch, 1)
        return torch.zeros_like(end), end
    if mask.shape[1] != 1 or mask.shape[-1] != length:
        return None
    seen_BTS = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(batch, count, length)
    if mask.dtype != torch.bool and not bool((mask[:, 0].expand(batch, count, length)[~seen_BTS] < -1e4).all()):
        return None
    total_BT = seen_BTS.sum(-1)
    begin_BT = seen_BTS.int().argmax(-1)
    end_BT = length - seen_BTS.flip(-1).int().argmax(-1)
    if not torch.equal(total_BT, end_BT - begin_BT):
        return None
    return begin_BT.int().contiguous(), end_BT.int().contiguous()


def _run(layer: PackedLayer, which: int, start: int, end: int) -> Tensor:
    """Keys (0) or values (1) from ``start`` to ``end``, float32, decoded by compiled code where there is some."""
    side = layer.sides[which]
    isa = kernels.forced() or next(iter(kernels.native.instruction_sets()), "")
    if not isa or isa not in kernels.native.instruction_sets() or why_not(side, False) is not None:
        return side.read(torch.float32, start, end)
    native = layer.descriptions()[which]

    def decoded(first: int, last: int) -> Tensor:
        return kernels.cache.decode(isa, native, first, last, side.shape)

    return side.read(torch.float32, start, end, decoded)


def _at_once(query_BHTD: Tensor, layer: PackedLayer, mask: Tensor | None, scale: float) -> Tensor:
    length, count = layer.get_seq_length(), query_BHTD.shape[2]
    keys, values = (_run(layer, i, 0, length).to(query_BHTD.dtype) for i in (0, 1))
    if mask is None and count > 1:
        mask = torch.ones(count, length, dtype=torch.bool, device=keys.device).tril(length - count)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(keys.dtype)
    out = scaled_dot_product_attention(query_BHTD, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def _in_runs(query_BHTD: Tensor, layer: PackedLayer, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, count, dim = query_BHTD.shape
    length, groups = layer.get_seq_length(), layer.key_side.heads
    query = (query_BHTD.float() * scale).reshape(batch, groups, -1, dim)
    if mask is None and count > 1:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)[None, None]
    most = query.new_full((*query.shape[:3], 1), -torch.inf)
    total, mixed = torch.zeros_like(most), query.new_zeros(*query.shape[:3], layer.value_side.dim)
    for start in range(0, length, RUN):
        end = min(length, start + RUN)
        keys, values = (_run(layer, i, start, end) for i in (0, 1))
        score = query @ keys.mT
        if mask is not None:
            part = mask[..., start:end].expand(batch, heads, count, end - start).reshape(score.shape)
            score = score.masked_fill(~part, -torch.inf) if mask.dtype == torch.bool else score + part
        higher = torch.maximum(most, score.amax(-1, keepdim=True))
        safe = torch.where(higher == -torch.inf, 0.0, higher)
        weight, kept = torch.exp(score - safe), torch.exp(most - safe)
        total = total * kept + weight.sum(-1, keepdim=True)
        mixed = mixed * kept + weight @ values
        most = higher
    out = mixed / total.clamp_min(torch.finfo(torch.float32).tiny)
    return out.view(batch, heads, count, -1).transpose(1, 2).to(query_BHTD.dtype)
