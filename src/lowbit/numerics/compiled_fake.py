"""Simulated quantization in compiled code: extremes and evenly spaced levels, each in one pass forward and one backward.

torch code is the law: results are equal, and gradients but for the last bits of their sums. torch takes about ten passes over
the values, and keeps an array of their size for most of them until the backward pass.

Shapes: G granule, K element within a granule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit.compiled import address, library, solver_set


def evenly_spaced(
    x_GK: Tensor, scale_G1: Tensor, zero_G1: Tensor | None, most: int, middle: float, whole: bool
) -> Tensor | None:
    """``Int.fake`` of an integer grid; None if compiled code cannot do it.

    Args:
        x_GK: values.
        scale_G1, zero_G1: parameters; without zero points every zero is at level ``middle``.
        most: highest code.
        whole: zero points are codes, added after the rounding.
    """
    isa = solver_set(x_GK, scale_G1, zero_G1)
    size = (len(x_GK), 1)
    if isa is None or x_GK.dim() != 2 or not x_GK.numel() or scale_G1.shape != size:
        return None
    if zero_G1 is not None and zero_G1.shape != size:
        return None
    assert library is not None
    grid = library.Grid(0, False, 0, 0, 0, most, middle, whole)
    result = _EvenlySpaced.apply(x_GK, scale_G1, zero_G1, grid, isa)
    assert isinstance(result, Tensor)
    return result


def extremes(x_GK: Tensor) -> tuple[Tensor, Tensor] | None:
    """Minimum and maximum of each granule, ``[G, 1]`` each; None if compiled code cannot find them."""
    isa = solver_set(x_GK)
    if isa is None or x_GK.dim() != 2 or not x_GK.numel():
        return None
    result = _Extremes.apply(x_GK, isa)
    assert isinstance(result, tuple)
    return result


class _EvenlySpaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Any, isa: str) -> Tensor:
        assert library is not None
        x, scale, zero = x.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()
        ctx.save_for_backward(x, scale, zero)
        ctx.grid, ctx.isa = grid, isa
        y, threads = torch.empty_like(x), torch.get_num_threads()
        library.fake(isa, grid, x.data_ptr(), *x.shape, scale.data_ptr(), address(zero), y.data_ptr(), threads)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert library is not None
        x, scale, zero = ctx.saved_tensors
        g = grads[0].contiguous()
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_scale, of_zero = torch.empty_like(scale), None if zero is None else torch.empty_like(zero)
        library.fake_backward(
            ctx.isa, ctx.grid, x.data_ptr(), *x.shape, scale.data_ptr(), address(zero), g.data_ptr(), address(of_x),
            of_scale.data_ptr(), address(of_zero), torch.get_num_threads(),
        )  # fmt: skip
        return of_x, of_scale, of_zero, None, None


class _Extremes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, isa: str) -> tuple[Tensor, Tensor]:
        assert library is not None
        x = x.contiguous()
        lo, hi = x.new_empty(len(x), 1), x.new_empty(len(x), 1)
        library.extremes(isa, x.data_ptr(), *x.shape, lo.data_ptr(), hi.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(x, lo, hi)
        ctx.isa = isa
        return lo, hi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert library is not None
        x, lo, hi = ctx.saved_tensors
        of_lo, of_hi = (g.contiguous() for g in grads)
        of_x = torch.empty_like(x)
        library.extremes_backward(
            ctx.isa, x.data_ptr(), *x.shape, lo.data_ptr(), hi.data_ptr(), of_lo.data_ptr(), of_hi.data_ptr(),
            of_x.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return of_x, None
