"""Attention of a few queries over packed tokens, and packing, by the compiled code (``cpu/cache.*``).

Shapes: B sequence, H key-value head, R query of a head (those of its query heads, one after another), T query token, D channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.kernels.native import DTYPES

MOST_QUERIES = 8
"""Query tokens up to which the compiled code is faster than products of decoded tokens."""


def available(isa: str = "") -> bool:
    """Whether there is compiled code, and for the instruction set ``isa`` where one is forced."""
    sets = native.instruction_sets()
    return bool(sets) and (not isa or isa in sets)


def layer_side(batch: int, heads: int, dim: int, dtype: torch.dtype) -> Any:
    """An empty description of a layer's keys, or values, for :func:`attend`; ``cpu/cache.cpp`` says how it is filled."""
    assert native._cpu is not None
    return native._cpu.LayerSide(batch, heads, dim, DTYPES[dtype])


def attend(isa: str, keys: Any, values: Any, query_BHRD: Tensor, begin_BT: Tensor, end_BT: Tensor, dim: int) -> Tensor:
    """``softmax(query @ key.T) @ value`` over the tokens of both descriptions, float32 ``[B, H, R, dim]``.

    Args:
        keys, values: from :func:`layer_side`.
        query_BHRD: float32, contiguous, scaled.
        begin_BT, end_BT: int32, contiguous: the keys that a query token sees.
        dim: channels of a value.
    """
    assert native._cpu is not None
    out = torch.empty(*query_BHRD.shape[:3], dim, dtype=torch.float32, device="cpu")
    native._cpu.attend_cache(
        isa, keys, values, query_BHRD.data_ptr(), query_BHRD.shape[2], begin_BT.shape[1], begin_BT.data_ptr(),
        end_BT.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def decode(isa: str, side: Any, first: int, last: int, shape: tuple[int, int, int]) -> Tensor:
    """The slots of the tiles from ``first`` to ``last``, float32 ``[B, H, slots, D]``.

    Args:
        shape: B, H and D.
    """
    assert native._cpu is not None
    batch, heads, dim = shape
    out = torch.empty(batch, heads, 16 * (last - first), dim, dtype=torch.float32, device="cpu")
    native._cpu.decode_cache(isa, side, first, last, out.data_ptr(), torch.get_num_threads())
    return out


def pack(isa: str, side: Any, count: int) -> bool:
    """Packs the first ``count`` waiting tokens of a description; False: a scale is not finite in its storage."""
    assert native._cpu is not None
    return native._cpu.pack_cache(isa, side, count, torch.get_num_threads())
