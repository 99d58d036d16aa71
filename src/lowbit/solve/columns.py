"""A weight's granules seen column by column: what a solver needs that fixes one column after another.

Every granularity of a weight is a tiling: strips of rows crossed with bands of columns. Per channel is one band and a
strip a row; per group is a band a group; per tensor is one strip and one band; blocks are both. So one description
serves all granularities, and a solver can place the grid on one band when it arrives there.

Shapes: O output channel (row), I input channel (column), K columns of one band.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.numerics import Block, Fit, Granularity, Params, PerToken, Spec, fit_raw


@dataclass(frozen=True, eq=False)
class Tiling:
    """Strips of ``height`` rows (the last may be lower) and bands of columns; ``band_I`` (int64, rising): each column's."""

    height: int
    band_I: Tensor

    @staticmethod
    def of(granularity: Granularity, w_OI: Tensor) -> Tiling:
        """The tiling that ``granularity`` makes of ``w_OI``.

        Raises:
            ValueError: granules that are no tiles, so that no column can be finished alone.
        """
        if isinstance(granularity, PerToken):
            raise ValueError("PerToken() is for activations; a weight is quantized PerChannel(), PerGroup(size), ...")
        shape = (w_OI.shape[0], w_OI.shape[1])
        high, wide = granularity.param_shape(shape)
        number_G1 = torch.arange(high * wide, device=w_OI.device)[:, None]
        granule_OI = granularity.join(number_G1.expand_as(granularity.split(w_OI)), shape)
        band_I, strip_O = granule_OI[0], granule_OI[:, 0] // wide
        height = int((strip_O == 0).sum())
        if not (
            torch.equal(granule_OI, strip_O[:, None] * wide + band_I)
            and torch.equal(strip_O, torch.arange(shape[0], device=w_OI.device) // height)
            and torch.equal(band_I, band_I.sort().values)
        ):
            raise ValueError(f"{granularity} does not cut a weight into strips of rows and bands of columns")
        return Tiling(height, band_I)

    @property
    def wide(self) -> int:
        """The number of bands."""
        return int(self.band_I[-1]) + 1

    def place(self, w_OK: Tensor, spec: Spec, fit: Fit, importance_K: Tensor) -> Params:
        """Parameters, not yet as stored, of one band whose columns are ``w_OK`` (in any order); leading axis: strips."""
        tile = Block(self.height, w_OK.shape[1])
        return fit_raw(w_OK, Spec(spec.grid, tile, spec.stats, spec.scale_dtype), fit, importance_K.expand_as(w_OK))

    def of_rows(self, params: Params, rows: int) -> Params:
        """One band's parameters, repeated for each of the ``rows`` rows: leading axis O."""
        if self.height == 1:
            return params
        return params._make(None if p is None else p.repeat_interleave(self.height, 0)[:rows] for p in params)


def by_diagonal(diag_I: Tensor) -> Tensor:
    """Columns by falling diagonal of the Gram matrix: those whose errors cost most first. Ties keep their order."""
    return diag_I.argsort(descending=True, stable=True)


def by_band_and_diagonal(diag_I: Tensor, band_I: Tensor) -> Tensor:
    """Columns by falling diagonal inside each band, bands by their largest diagonal: a band's columns stay together."""
    largest = diag_I.new_zeros(int(band_I[-1]) + 1).scatter_reduce(0, band_I, diag_I, "amax", include_self=False)
    rank = by_diagonal(largest).argsort()  # place of each band; unique, so bands of equal maximum do not mix
    columns = by_diagonal(diag_I)
    return columns[rank[band_I[columns]].argsort(stable=True)]


def lazy_blocks(width_of_runs: list[int], block: int) -> list[tuple[int, int]]:
    """Cuts columns into blocks ``[i1, i2)`` of at most ``block``, never through a run that fits into a block.

    Longer runs start a block. So at the first column of any run, all of the run is either inside the current block or
    waits for no correction of it: its weights are up to date.
    """
    edges = [0]
    end = 0
    for width in width_of_runs:
        if end + width - edges[-1] > block and end > edges[-1]:
            edges.append(end)
        end += width
        while end - edges[-1] > block:
            edges.append(edges[-1] + block)
    edges.append(end)
    return list(pairwise(edges))
