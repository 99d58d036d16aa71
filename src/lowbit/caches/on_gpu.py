"""Attention of a few queries over a packed layer on a GPU: packed tokens by Triton, the others by torch.

Shapes: B sequence, H key-value head, R query of a head, N slot, S token, D channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.caches.compiled import shared_range
from lowbit.caches.side import Side
from lowbit.caches.words import TILE
from lowbit.kernels import triton
from lowbit.numerics import Affine, Int

if TYPE_CHECKING:
    from lowbit.caches.layer import PackedLayer


def why_not(layer: PackedLayer) -> str | None:
    """The reason why Triton does not attend over ``layer``; None if it does."""
    reason = triton.missing_for(layer.device)
    if reason is not None:
        return reason
    for side in layer.sides:
        if side.frequencies is not None:
            return "keys are packed before the rotary embedding"
        if reason := shared_range(side):
            return reason
        if side.spec is not None and side.spec.grid.kind is not Affine:
            return f"codes of {side.spec.grid} have no scale"
    return None


def attend(query_BHRD: Tensor, layer: PackedLayer, seen_BRS: Tensor) -> Tensor:
    """``softmax(query @ keys.T) @ values`` over the tokens that each query sees, float32 ``[B, H, R, D]``.

    Args:
        query_BHRD: float32, scaled.
        seen_BRS: true where a query sees a key.
    """
    from lowbit.kernels.triton import packed_tokens  # imports triton

    key, value = layer.sides
    parts = [query_BHRD @ part.float().mT for part in _floats(key)]
    if key.packed_length:
        place = key.coordinates
        moved = query_BHRD if place.scale is None else query_BHRD * place.scale
        moved = moved if place.rotation is None else moved @ place.rotation
        score = packed_tokens.scores(moved.contiguous(), _tokens(key))[..., key.packed.held(query_BHRD.device)]  # pyright: ignore[reportOptionalMemberAccess]
        parts.insert(1, score if place.shift is None else score + query_BHRD @ place.shift.mT)
    score = torch.cat(parts, -1).masked_fill(~seen_BRS[:, None], -torch.inf)
    weight = torch.softmax(score, -1).nan_to_num(0.0) if not bool(seen_BRS.any(-1).all()) else torch.softmax(score, -1)
    first, packed, last = weight.split((value.kept_length, value.packed_length, value.waiting_length), -1)
    kept, waiting = _floats(value)
    out = first @ kept.float() + last @ waiting.float()
    if value.packed_length:
        tokens = _tokens(value)
        slots = torch.zeros(*packed.shape[:-1], tokens.used * TILE, dtype=torch.float32, device=packed.device)
        slots[..., value.packed.held(packed.device)] = packed  # pyright: ignore[reportOptionalMemberAccess]
        place = value.coordinates
        mixed = packed_tokens.mixture(slots, tokens)
        mixed = mixed if place.rotation is None else mixed @ place.rotation.mT
        mixed = mixed if place.scale is None else mixed * place.scale
        out = out + mixed + (0 if place.shift is None else packed.sum(-1, keepdim=True) * place.shift)
    return out


def _floats(side: Side) -> tuple[Tensor, Tensor]:
    """Tokens before and after the packed ones."""
    assert side.waiting is not None
    waiting = side.waiting.tokens
    return (waiting[:, :, :0] if side.kept is None else side.kept), waiting


def _tokens(side: Side) -> Any:
    from lowbit.kernels.triton import packed_tokens

    packed = side.packed
    assert packed is not None
    grid = packed.spec.grid
    levels = None if isinstance(grid, Int) else grid.table()  # pyright: ignore[reportAttributeAccessIssue]
    table = None if levels is None else torch.tensor(levels, dtype=torch.float32, device=packed.codes.device)
    return packed_tokens.Tokens(
        packed.codes, packed.scale, packed.zero, table, grid.middle if isinstance(grid, Int) and grid.symmetric else 0.0,
        grid.bits, packed.dim, packed.width, packed.block_tiles if packed.in_blocks else 0, -(-packed.slots // TILE),
    )  # fmt: skip
