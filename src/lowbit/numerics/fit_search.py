"""Fits that search: many candidates for the range, or for the zero point, of each granule, and the one that loses least.

:mod:`lowbit.numerics.fit` says what a fit is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.compiled import solver_set
from lowbit.numerics.fit import RangeFit, extremes
from lowbit.numerics.grids.base import Affine, Grid, RangeGrid
from lowbit.numerics.grids.int import Int
from lowbit.numerics.rounding import least_lossy
from lowbit.numerics.serialize import serializable

_RUN = 2**18
"""Values, and candidates, that a search handles at once on a CPU, so that intermediate results stay in the cache."""

_Ends = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``ends(lo_G1, hi_G1, candidate)``: the ranges of candidates ``[1, C]`` (all) or ``[G, 1]`` (one for each granule), from their
numbers, int64."""


def _search(
    x_GK: Tensor,
    lo_G1: Tensor,
    hi_G1: Tensor,
    grid: RangeGrid,
    importance_GK: Tensor | None,
    norm: float,
    count: int,
    ends: _Ends,
    otherwise: tuple[Tensor, Tensor],
) -> Affine:
    """Places ``grid`` on each granule by the first of ``count`` candidates with the least ``sum importance * |x - q|**norm``.

    Args:
        x_GK: the granules.
        lo_G1, hi_G1: arguments of ``ends``.
        grid: any grid that a range places.
        importance_GK: weights of the values; None: all equal.
        norm: exponent.
        count: C.
        ends: makes the candidates.
        otherwise: the range of a granule where no error is below infinity.
    """
    run = max(1, _RUN // max(x_GK.shape[1], count) if x_GK.device.type == "cpu" else len(x_GK))
    every = torch.arange(count, device=x_GK.device)[None]
    best = []
    with torch.no_grad():
        for start in range(0, max(1, len(x_GK)), run):
            some = slice(start, start + run)
            x, weight = x_GK[some], None if importance_GK is None else importance_GK[some]
            isa = solver_set(x, weight, lo_G1)
            found = None
            if isa is not None:
                tried = grid.from_range(*ends(lo_G1[some], hi_G1[some], every))
                found = least_lossy(x, grid, tried, norm, weight, isa)
            if found is None:
                found = _least_lossy(x, lo_G1[some], hi_G1[some], grid, weight, norm, count, ends)
            best.append(found)
        best_G1 = torch.cat(best)
    lo, hi = ends(lo_G1, hi_G1, best_G1.clamp(min=0))
    found_G1 = best_G1 >= 0
    return grid.from_range(torch.where(found_G1, lo, otherwise[0]), torch.where(found_G1, hi, otherwise[1]))


def _least_lossy(
    x_GK: Tensor,
    lo_G1: Tensor,
    hi_G1: Tensor,
    grid: RangeGrid,
    importance_GK: Tensor | None,
    norm: float,
    count: int,
    ends: _Ends,
) -> Tensor:
    """The search in torch: the number of the best candidate, int64 ``[G, 1]``; -1 where no error is below infinity."""
    best = torch.full_like(lo_G1, float("inf"))
    best_at = torch.full(lo_G1.shape, -1, device=lo_G1.device)
    for i in range(count):
        number = torch.full((1, 1), i, device=lo_G1.device)
        params = grid.from_range(*ends(lo_G1, hi_G1, number))
        loss = absolute_power(grid.fake(x_GK, params).sub_(x_GK), norm)
        loss = (loss if importance_GK is None else loss * importance_GK).sum(1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        best_at = torch.where(better, number, best_at)
    return best_at


def absolute_power(error: Tensor, norm: float) -> Tensor:
    """``|error|**norm``, in place. Logarithms take a third of the time of torch's power; their relative error of 3e-6 is
    small enough for a search."""
    return error.square_() if norm == 2 else error.abs_().log2_().mul_(norm).exp2_()


@serializable
@dataclass(frozen=True)
class ClipSearch(RangeFit):
    """Shrinks both extremes by one factor, chosen to minimize ``sum importance * |x - q(x)|**norm``.

    The search tries the factors ``1 - i / steps`` for ``i = 0 .. max_shrink * steps - 1`` and keeps the first of the best,
    so the error never exceeds that of :class:`MinMax` (i = 0). The defaults are those of GPTQ's reference code (`mse`).
    """

    steps: int = 100
    max_shrink: float = 0.8
    norm: float = 2.4

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.max_shrink <= 1 or self.norm <= 0:
            raise ValueError(f"clip search needs steps >= 1, 0 < max_shrink <= 1 and norm > 0, found {self}")

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        lo, hi = extremes(x_GK)
        count = max(1, int(self.max_shrink * self.steps))
        shrink_C = lo.new_tensor([1 - i / self.steps for i in range(count)])

        def ends(lo: Tensor, hi: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
            shrink = shrink_C[candidate]
            return shrink * lo, shrink * hi

        return _search(x_GK, lo, hi, grid, importance_GK, self.norm, count, ends, (lo, hi))


@serializable
@dataclass(frozen=True)
class TruncationSearch(RangeFit):
    """Searches the width of the range and the place of zero in it for the least ``sum importance * |x - q(x)|**norm``.

    The search tries the widths ``i / steps`` of the range of the values, ``i = 1 .. steps``, each with every code as zero
    point (OWQ, arXiv:2306.02272, as in the authors' code). A real zero point need not lie in the range; then the search
    tries ``2**bits`` positions of the window within the range of the values. For a grid without a zero point it searches
    the width only. The full range is always a candidate. The cost is ``steps * 2**bits`` evaluations.
    """

    steps: int = 100
    norm: float = 2.4

    def __post_init__(self):
        if self.steps < 1 or self.norm <= 0:
            raise ValueError(f"truncation search needs steps >= 1 and norm > 0, found {self}")

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        lo, hi = extremes(x_GK)
        real, movable = isinstance(grid, Int) and grid.real_zero, isinstance(grid, Int) and not grid.symmetric
        if not real:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        widths = [i / self.steps for i in range(self.steps, 0, -1)]
        zeros = [z / (2**grid.bits - 1) for z in range(2**grid.bits)] if movable else [0.0]
        width_C = lo.new_tensor([width for width in widths for _ in zeros])
        share_C = lo.new_tensor(zeros * len(widths))

        def ends(lo: Tensor, hi: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
            width, share = (hi - lo) * width_C[candidate], share_C[candidate]
            if not movable:
                low = lo * width_C[candidate]
            else:
                low = lo + share * (hi - lo - width) if real else -share * width
            return low, low + width

        return _search(x_GK, lo, hi, grid, importance_GK, self.norm, len(width_C), ends, (lo, hi))


@serializable
@dataclass(frozen=True)
class RangeSearch(RangeFit):
    """Searches the symmetric range with the least ``sum importance * (x - q(x))**2``.

    The candidates are the multiples ``first, first + step, ..`` (below ``last``) of a unit. For grids with values beyond the
    range that places them, and for values that should be clipped. The defaults are those of OliVe's scripts
    (arXiv:2304.07493).

    Args:
        unit: ``"sigma"``, the larger of ``|mean - 3 std|`` and ``|mean + 3 std|``, or ``"absmax"``, the largest magnitude.
        first, last, step: the multiples of the unit.
    """

    unit: Literal["sigma", "absmax"] = "sigma"
    first: float = 0.75
    last: float = 2.5
    step: float = 0.02

    def __post_init__(self):
        if self.unit not in ("sigma", "absmax"):
            raise ValueError(f"the unit is 'sigma' or 'absmax', found {self.unit!r}")
        if not 0 < self.first < self.last or self.step <= 0:
            raise ValueError(f"a range search needs 0 < first < last and step > 0, found {self}")

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        unit = x_GK.abs().amax(1, keepdim=True) if self.unit == "absmax" else _three_sigma(x_GK, importance_GK)
        count = math.ceil((self.last - self.first) / self.step - 1e-9)
        multiple_C = unit.new_tensor([self.first + i * self.step for i in range(count)])

        def ends(lo: Tensor, hi: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
            end = hi * multiple_C[candidate]
            return -end, end

        return _search(x_GK, -unit, unit, grid, importance_GK, 2, count, ends, (-unit, unit))


def _three_sigma(x_GK: Tensor, importance_GK: Tensor | None) -> Tensor:
    counted = torch.ones_like(x_GK) if importance_GK is None else (importance_GK > 0).to(x_GK)
    number = counted.sum(1, keepdim=True).clamp(min=1)
    mean = (x_GK * counted).sum(1, keepdim=True) / number
    std = ((x_GK - mean).square() * counted).sum(1, keepdim=True).div(number).sqrt()
    return mean.abs() + 3 * std


@serializable
@dataclass(frozen=True)
class HalfQuadratic:
    """The zero point with the least heavy-tailed error, by half-quadratic splitting (HQQ, Badri and Shaji, 2023).

    The step is that of the extremes. Each round shrinks the error ``x - q(x)`` towards zero by the proximal operator of the
    p-norm and sets the zero point to the mean of the values that the remaining error implies. The rounds end when the mean
    error of no granule falls. An integer zero point is rounded at the end.

    Args:
        p: exponent of the norm, above 0 and at most 1.
        beta: weight of the penalty in the first round.
        kappa: factor by which ``beta`` grows each round.
        rounds: most rounds.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20

    def __post_init__(self):
        if not 0 < self.p <= 1 or self.beta <= 0 or self.kappa < 1 or self.rounds < 0:
            raise ValueError(f"half-quadratic needs 0 < p <= 1, beta > 0, kappa >= 1 and rounds >= 0, found {self}")

    def why_not(self, grid: Grid) -> str | None:
        fits = isinstance(grid, Int) and not grid.symmetric
        return None if fits else f"half-quadratic moves the zero point, and {grid} has none"

    def __call__(self, x_GK: Tensor, grid: Int, importance_GK: Tensor | None = None) -> Affine:
        counted = torch.ones_like(x_GK) if importance_GK is None else (importance_GK > 0).to(x_GK)
        number = counted.sum(1, keepdim=True).clamp(min=1)
        scale, zero = grid.from_range(*extremes(x_GK))  # this range contains zero if the zero point is a code
        assert zero is not None
        best, best_zero, beta = torch.full_like(scale, float("inf")), zero, self.beta
        for _ in range(self.rounds + 1):
            level = (x_GK / scale + zero).round().clamp(0, grid.max_code)
            error = x_GK - (level - zero) * scale
            lost = (error.abs() * counted).sum(1, keepdim=True) / number
            better = lost < best
            best, best_zero = torch.where(better, lost, best), torch.where(better, zero, best_zero)
            if not better.any():
                break
            size = error.abs()
            shrunk = error.sign() * (size - size.clamp(min=1e-12).pow(self.p - 1) / beta).clamp(min=0)
            zero = ((level - (x_GK - shrunk) / scale) * counted).sum(1, keepdim=True) / number
            beta *= self.kappa
        if grid.zero == "int":
            best_zero = best_zero.round().clamp(0, grid.max_code)
        return Affine(scale, best_zero)
