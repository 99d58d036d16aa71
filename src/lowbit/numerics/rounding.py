"""Grids as compiled code reads them, and its search of the range with the least error.

torch code is the law: every result equals that of the grid's own ``encode`` and ``decode`` but for the last bits of sums and
powers. Tables hold exactly the midpoints that ``encode`` compares with, so ties go the same way.

Shapes: G granule, K element within a granule, C candidate; O output channel, L level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.compiled import address, library
from lowbit.numerics.grids import Affine, BinaryCoded, Codebook, Float, Grid, Int, Normal, Params, Table

_SEARCHED = 32
"""Most listed levels that a search compares one after another; for more, torch's bisection is faster."""


@dataclass(frozen=True, eq=False)
class Rounding:
    """One or several sets of parameters of a grid, as addresses in ``held``.

    Args:
        grid: of the compiled library.
        scale, zero: float32 ``[S, O]``, S sets; None if rows have their own levels, or zero points are not stored.
        held: tensors that ``grid`` reads.
    """

    grid: Any
    scale: Tensor | None = None
    zero: Tensor | None = None
    held: tuple[Tensor, ...] = ()


def rounding(grid: Grid, params: Sequence[Params]) -> Rounding | None:
    """``grid`` under each of ``params`` (leading axis O, float32 on the CPU); None if compiled code cannot round to it."""
    assert library is not None
    match grid:
        case Int() | Float() | Normal() | Table():
            scale = torch.stack([p.scale[:, 0] for p in params])  # pyright: ignore[reportAttributeAccessIssue]
            zeros = [p.zero[:, 0] for p in params if p.zero is not None]  # pyright: ignore[reportAttributeAccessIssue]
            placed = _of_range(grid)
            return Rounding(placed.grid, scale, torch.stack(zeros) if zeros else None, placed.held)
        case Codebook() | BinaryCoded():
            tables = [grid.sorted_levels(p) for p in params]  # pyright: ignore[reportArgumentType]
            values, codes, midpoints = (torch.stack(each) for each in zip(*tables, strict=True))
            return _listed(values, codes, midpoints, own=True)
    return None


def least_lossy(
    x_GK: Tensor, grid: Grid, params_GC: Affine, norm: float, importance_GK: Tensor | None, isa: str
) -> Tensor | None:
    """For each granule the first candidate with the least ``sum importance * |x - q(x)|**norm``.

    Args:
        x_GK: float32 on the CPU.
        grid: placed by a range.
        params_GC: the parameters of all candidates, ``[G, C]`` each.
        norm: exponent; 2 is squared, other powers have a relative error of 3e-6.
        importance_GK: float32; None: all equal.
        isa: instruction set.

    Returns:
        int64 ``[G, 1]``, -1 where no error is below infinity; None if compiled code cannot round to ``grid``.
    """
    assert library is not None
    if not isinstance(grid, Int | Float | Normal | Table) or (not isinstance(grid, Int) and 2**grid.bits > _SEARCHED):
        return None
    if isinstance(grid, Table) and grid.signed:  # it takes scales for positive
        return None
    placed, x_GK = _of_range(grid), x_GK.detach().contiguous()
    scale, zero = params_GC.scale.contiguous(), None if params_GC.zero is None else params_GC.zero.contiguous()
    step = 0
    if importance_GK is not None:
        shared = importance_GK.stride(0) == 0 and importance_GK.stride(1) == 1
        importance_GK = importance_GK.detach() if shared else importance_GK.detach().contiguous()
        step = 0 if shared else importance_GK.shape[1]
    best = torch.empty(len(x_GK), 1, dtype=torch.int32)
    library.search(
        isa, placed.grid, x_GK.data_ptr(), *x_GK.shape, address(importance_GK), step, scale.data_ptr(), address(zero),
        scale.shape[1], norm, best.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return best.long()


def _of_range(grid: Int | Float | Normal | Table) -> Rounding:
    assert library is not None
    if isinstance(grid, Int):
        whole = grid.zero == "int" and not grid.symmetric
        return Rounding(library.Grid(0, False, 0, 0, 0, grid.max_code, grid.middle, whole))
    return _listed(*grid.sorted_levels(torch.device("cpu"), torch.float32), own=False)


def _listed(values: Tensor, codes: Tensor, midpoints: Tensor, own: bool) -> Rounding:
    """Levels ``[L]`` for all granules, or ``[S, O, L]`` where every row has its own."""
    assert library is not None
    held = values.contiguous(), midpoints.contiguous(), codes.contiguous()
    return Rounding(library.Grid(values.shape[-1], own, *(t.data_ptr() for t in held), 0.0, 0.0, False), held=held)


__all__ = ["Rounding", "least_lossy", "rounding"]
