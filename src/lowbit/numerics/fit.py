"""Fits: parameters from values.

A fit looks at the granules ``[G, K]`` and places the grid on each. Most fits choose a range (the extremes, a quantile, or
the shrunk range with the least error), call ``grid.from_range`` and serve any range grid. Fits that place a table or a
zero point freely serve one kind of grid; ``why_not`` says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.numerics import compiled_fake
from lowbit.numerics.grids.base import OF_NOTHING, Affine, Grid, Lut, NoParams, Params, RangeGrid
from lowbit.numerics.grids.codebook import Codebook
from lowbit.numerics.grids.int import Int
from lowbit.numerics.kmeans import kmeans_rows
from lowbit.numerics.serialize import serializable


@runtime_checkable
class Fit(Protocol):
    """Places a grid on each granule.

    Calling it fits ``grid`` to the values ``x_GK`` ``[G, K]``, weighed by ``importance_GK`` ``[G, K]`` (at least 0; None: all
    equal), and returns parameters with leading axis G.
    """

    def why_not(self, grid: Grid) -> str | None:
        """The reason why this fit cannot place ``grid``; None if it can."""
        ...

    def __call__(self, x_GK: Tensor, grid: Any, importance_GK: Tensor | None = None) -> Params: ...


class RangeFit:
    """Fits that end in ``grid.from_range``."""

    def why_not(self, grid: Grid) -> str | None:
        name = type(self).__name__
        return None if isinstance(grid, RangeGrid) else f"{name} finds a range, and {grid} is not placed by one"


def extremes(x_GK: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each granule, ``[G, 1]`` each; NaN where a value is."""
    found = compiled_fake.extremes(x_GK)
    if found is None:
        lo, hi = torch.aminmax(x_GK, dim=1, keepdim=True)
        return lo, hi
    return found


@serializable
@dataclass(frozen=True)
class MinMax(RangeFit):
    """The extremes of the values; nothing is clipped."""

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        return grid.from_range(*extremes(x_GK))


@serializable
@dataclass(frozen=True)
class Magnitude(RangeFit):
    """A range of ``factor`` times the mean or the largest magnitude, on both sides of zero.

    With two and one bits the extremes leave most values at the inner levels. LLM-QAT's code (arXiv:2305.17888) takes
    1.5 times the mean magnitude for four half-integer levels, and the mean for two.
    """

    of: Literal["mean", "largest"] = "mean"
    factor: float = 1.0

    def __post_init__(self):
        if self.of not in ("mean", "largest") or self.factor <= 0:
            raise ValueError(f"a magnitude is the 'mean' or the 'largest', times a positive factor; found {self}")

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Params:
        if self.of == "largest":
            size = x_GK.abs().amax(1, keepdim=True)
        else:
            counted = torch.ones_like(x_GK) if importance_GK is None else (importance_GK > 0).to(x_GK)
            size = (x_GK.abs() * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
        return grid.from_range(-self.factor * size, self.factor * size)


@serializable
@dataclass(frozen=True)
class Percentile(RangeFit):
    """Clips the share ``1 - p`` of the values at each end, ``0.5 < p <= 1``; quantiles are interpolated linearly."""

    p: float = 0.999

    def __post_init__(self):
        if not 0.5 < self.p <= 1:
            raise ValueError(f"percentile is a share over 0.5 and at most 1, found {self.p} (99.9 % is 0.999)")

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        # torch.quantile refuses more than 2**24 elements, so a sort gives the order statistics. The filling of a short
        # granule (importance 0) sorts last and is not counted.
        counted = torch.ones_like(x_GK, dtype=torch.bool) if importance_GK is None else importance_GK > 0
        counted = counted | ~counted.any(1, keepdim=True)
        ordered = x_GK.masked_fill(~counted, float("inf")).sort(dim=1).values
        last = counted.sum(1, keepdim=True) - 1
        at = last.double() * self.p
        below, part = at.long(), at - at.long()
        above = torch.minimum(below + 1, last)

        def between(i: Tensor, j: Tensor) -> Tensor:
            return ordered.gather(1, i).lerp(ordered.gather(1, j), part.to(ordered.dtype))

        return grid.from_range(between(last - below, last - above), between(below, above))


@dataclass(frozen=True)
class Clipped(RangeFit):
    """A range chosen before, as shares of the extremes: ``[lo_share * min, hi_share * max]``; shares ``[G, 1]`` in (0, 1].

    It holds shares and not absolute ends because a column solver changes the weights before it fits them.
    """

    lo_share_G1: Tensor
    hi_share_G1: Tensor

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        lo, hi = extremes(x_GK)
        return grid.from_range(lo * self.lo_share_G1, hi * self.hi_share_G1)

    def rows(self, index: slice | Tensor) -> Clipped:
        """The same choice for some of the granules."""
        return Clipped(self.lo_share_G1[index], self.hi_share_G1[index])


@dataclass(frozen=True, eq=False)
class Fixed:
    """Parameters chosen before, independent of the values; leading axis G, for granules in the same order."""

    params: Params

    def why_not(self, grid: Grid) -> str | None:
        return None if isinstance(self.params, grid.kind) else f"the parameters chosen before are not those of {grid}"

    def __call__(self, x_GK: Tensor, grid: Grid, importance_GK: Tensor | None = None) -> Params:
        fits = all(p is None or len(p) == len(x_GK) for p in self.params)
        assert fits, "parameters were chosen for other granules"
        return self.params._make(None if p is None else p.to(x_GK) for p in self.params)  # pyright: ignore[reportReturnType]

    def rows(self, index: slice | Tensor) -> Fixed:
        """The same choice for some of the granules."""
        return Fixed(self.params._make(None if p is None else p[index] for p in self.params))  # pyright: ignore[reportArgumentType]


# Outermost level, in standard deviations, of the uniform grid of 2^bits levels with the least squared error on a normal
# distribution.
_NORMAL = {1: 0.798, 2: 1.494, 3: 2.051, 4: 2.514, 5: 2.916, 6: 3.278, 7: 3.611, 8: 3.922}


@serializable
@dataclass(frozen=True)
class RmsRange:
    """A range of ``factor`` times the root mean square on both sides of zero (QuIP, arXiv:2307.13304).

    Incoherent weights have no extremes worth covering. The levels are symmetric and none of them is zero; the zero point
    is the real number halfway between the two middle levels.

    Args:
        factor: None: the factor with the least error on a normal distribution at the grid's width (J. Max, 1960); QuIP's
            code uses 2.4.
    """

    factor: float | None = None

    def why_not(self, grid: Grid) -> str | None:
        fits = isinstance(grid, Int) and grid.real_zero
        return None if fits else f"a range by the root mean square needs integers with a real zero point, not {grid}"

    def __call__(self, x_GK: Tensor, grid: Int, importance_GK: Tensor | None = None) -> Affine:
        counted = torch.ones_like(x_GK) if importance_GK is None else (importance_GK > 0).to(x_GK)
        mean = (x_GK.square() * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
        half = (_NORMAL[grid.bits] if self.factor is None else self.factor) * mean.sqrt()
        scale = torch.where(half > 0, 2 * half / grid.max_code, torch.full_like(half, OF_NOTHING))
        return Affine(scale, torch.full_like(scale, grid.max_code / 2))


@serializable
@dataclass(frozen=True)
class KMeans:
    """The table with the least ``sum importance * (x - q(x))**2``: optimal k-means for each granule."""

    def why_not(self, grid: Grid) -> str | None:
        return None if isinstance(grid, Codebook) else f"k-means places codebooks, not {grid}"

    def __call__(self, x_GK: Tensor, grid: Codebook, importance_GK: Tensor | None = None) -> Lut:
        return Lut(kmeans_rows(x_GK, importance_GK, 2**grid.bits).to(x_GK.dtype))


@serializable
@dataclass(frozen=True)
class Unfitted:
    """For grids without parameters, such as :class:`~lowbit.numerics.Sign`: there is nothing to place."""

    def why_not(self, grid: Grid) -> str | None:
        return None if grid.kind is NoParams else f"{grid} has parameters, which must be fitted"

    def __call__(self, x_GK: Tensor, grid: Grid, importance_GK: Tensor | None = None) -> NoParams:
        return NoParams()
