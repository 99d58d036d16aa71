"""Fits: parameters from values.

A fit looks at the granules ``[G, K]`` and places the grid on each. All fits end in ``grid.from_range``, so any fit serves
any range grid; what differs is the range: the extremes, a quantile, or the shrink that loses least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.numerics.grids.base import Affine, Params, RangeGrid
from lowbit.numerics.tagged import tagged


@runtime_checkable
class Fit(Protocol):
    """Places ``grid`` on each granule of ``x_GK``; importance ``[G, K]`` (non-negative) weighs the elements."""

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Params: ...


def extremes(x_GK: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each granule, ``[G, 1]`` each."""
    lo, hi = torch.aminmax(x_GK, dim=1, keepdim=True)
    return lo, hi


@tagged
@dataclass(frozen=True)
class MinMax:
    """The range of the values: nothing is clipped."""

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        return grid.from_range(*extremes(x_GK))


@tagged
@dataclass(frozen=True)
class Percentile:
    """Clips the share ``1 - p`` of the values at each end, ``0.5 < p <= 1``; quantiles interpolate linearly."""

    p: float = 0.999

    def __post_init__(self):
        if not 0.5 < self.p <= 1:
            raise ValueError(f"percentile is a share over 0.5 and at most 1, found {self.p} (99.9 % is 0.999)")

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        # torch.quantile refuses more than 2**24 elements, so the two order statistics are taken from a sort.
        ordered = x_GK.sort(dim=1).values
        at = (x_GK.shape[1] - 1) * self.p
        below, part = int(at), at - int(at)
        above = min(below + 1, x_GK.shape[1] - 1)
        hi = ordered[:, [below]].lerp(ordered[:, [above]], part)
        lo = ordered[:, [-1 - below]].lerp(ordered[:, [-1 - above]], part)
        return grid.from_range(lo, hi)


@tagged
@dataclass(frozen=True)
class ClipSearch:
    """The shrink of the extremes, the same at both ends, that loses least: ``sum importance * |x - q(x)|**norm``.

    Shrinks ``1 - i / steps`` for ``i = 0 .. max_shrink * steps - 1`` are tried and the first of the best is kept, so the
    result never loses more than :class:`MinMax` (i = 0). Defaults are those of GPTQ's reference (`mse`): 100, 0.8, 2.4.
    """

    steps: int = 100
    max_shrink: float = 0.8
    norm: float = 2.4

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.max_shrink <= 1 or self.norm <= 0:
            raise ValueError(f"clip search needs steps >= 1, 0 < max_shrink <= 1 and norm > 0, found {self}")

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        lo, hi = extremes(x_GK)
        best_shrink = torch.ones_like(lo)
        best = torch.full_like(lo, float("inf"))
        for i in range(max(1, int(self.max_shrink * self.steps))):
            shrink = 1 - i / self.steps
            params = grid.from_range(shrink * lo, shrink * hi)
            loss = (grid.decode(grid.encode(x_GK, params), params) - x_GK).abs_().pow_(self.norm)
            loss = (loss if importance_GK is None else loss * importance_GK).sum(1, keepdim=True)
            better = loss < best
            best = torch.where(better, loss, best)
            best_shrink = torch.where(better, torch.full_like(best_shrink, shrink), best_shrink)
        return grid.from_range(best_shrink * lo, best_shrink * hi)


@dataclass(frozen=True)
class Clipped:
    """A range already chosen, as shares of the extremes: ``[lo_share * min, hi_share * max]``; shares ``[G, 1]`` in (0, 1].

    Shares, not absolute ends, because a column solver moves the weights before it asks for their range.
    """

    lo_share_G1: Tensor
    hi_share_G1: Tensor

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        lo, hi = extremes(x_GK)
        return grid.from_range(lo * self.lo_share_G1, hi * self.hi_share_G1)

    def rows(self, index: slice | Tensor) -> Clipped:
        """The same choice for some of the granules."""
        return Clipped(self.lo_share_G1[index], self.hi_share_G1[index])
