"""Floats stored in narrower types: which casts narrow, and a cast that refuses to overflow."""

from __future__ import annotations

import torch
from torch import Tensor


def narrower(dtype: torch.dtype, limit: torch.dtype | None) -> torch.dtype:
    """``limit`` where it takes fewer bytes than the floating ``dtype``, else ``dtype``. None: no limit."""
    return limit if limit is not None and dtype.is_floating_point and limit.itemsize < dtype.itemsize else dtype


def narrowed(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor ``name`` in ``dtype``.

    Raises:
        ValueError: a finite value of it becomes infinite.
    """
    cast = x.to(dtype)
    if dtype is x.dtype or not x.is_floating_point():
        return cast
    lost = cast.isinf() & x.isfinite()
    if bool(lost.any()):
        raise ValueError(
            f"{name}: {int(lost.sum())} of {x.numel()} values are too large for {_word(dtype)} (the largest is "
            f"{x[lost].abs().max().item():.4g}, the limit {torch.finfo(dtype).max:.4g}); keep it in a type with a wider range: "
            "bfloat16, float32 or auto"
        )
    return cast


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
