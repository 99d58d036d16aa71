"""A weight's granules by column, for solvers that round one column after another.

Every granularity of a weight is a tiling of row strips and column bands. Per channel: one band, and one strip for each
row. Per group: one band for each group. Per tensor: one strip and one band. Blocks: several of both. One description
thus serves all granularities, and a solver can place the grid of a band when it reaches it.

Shapes: O output channel (row), I input channel (column), K columns of one band.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.numerics import Block, Fit, Granularity, Params, PerToken, QTensor, Spec, fit_raw

_CHECKED = 64
"""Rows of a tiling that are checked at once."""
_TRIED = 2**18
"""Weights that trials fit at once."""


@dataclass(frozen=True, eq=False)
class Tiling:
    """Strips of rows and bands of columns.

    Args:
        height: rows in each strip; the last may have fewer.
        band_I: the band of each column, int64, rising.
    """

    height: int
    band_I: Tensor

    @staticmethod
    def of(granularity: Granularity, w_OI: Tensor) -> Tiling:
        """The tiling that ``granularity`` makes of ``w_OI``.

        Raises:
            ValueError: granules that are not tiles, so no column can be finished alone.
        """
        if isinstance(granularity, PerToken):
            raise ValueError("PerToken() is for activations; a weight is quantized PerChannel(), PerGroup(size), ...")
        shape = (w_OI.shape[0], w_OI.shape[1])
        high, wide = granularity.param_shape(shape)
        number_G1 = torch.arange(high * wide, dtype=torch.int32, device=w_OI.device)[:, None]
        granule_OI = granularity.join(number_G1.expand(-1, granularity.split(w_OI).shape[1]), shape)
        band_I, strip_O = granule_OI[0].long(), granule_OI[:, 0].long() // wide
        height = int((strip_O == 0).sum())
        pieces = zip(granule_OI.split(_CHECKED), strip_O.split(_CHECKED), strict=True)
        if not (
            all(torch.equal(piece, (strips[:, None] * wide + band_I).int()) for piece, strips in pieces)
            and torch.equal(strip_O, torch.arange(shape[0], device=w_OI.device) // height)
            and torch.equal(band_I, band_I.sort().values)
        ):
            raise ValueError(f"{granularity} does not cut a weight into strips of rows and bands of columns")
        return Tiling(height, band_I)

    @property
    def wide(self) -> int:
        """The number of bands."""
        return int(self.band_I[-1]) + 1

    def place(self, w_OK: Tensor, spec: Spec, fit: Fit, importance: Tensor, out_OK: Tensor | None = None) -> Params:
        """Fitted parameters of one band, before rounding to storage; leading axis: strips.

        Args:
            w_OK: the columns of the band, in any order.
            spec, fit: format, and the fit that places its grid.
            importance: ``[K]`` of each column, or ``[O, K]``.
            out_OK: weights that the fit ignores.
        """
        tile = Block(self.height, w_OK.shape[1])
        here = Spec(spec.grid, tile, spec.stats, spec.scale_dtype, spec.stats_centred)
        return place(w_OK, here, fit, importance.expand_as(w_OK), out_OK)

    def of_rows(self, params: Params, rows: int) -> Params:
        """The parameters of one band, repeated for each of the ``rows`` rows: leading axis O."""
        if self.height == 1:
            return params
        return params._make(None if p is None else p.repeat_interleave(self.height, 0)[:rows] for p in params)


def place(w_OI: Tensor, spec: Spec, fit: Fit, importance_OI: Tensor | None, out_OI: Tensor | None) -> Params:
    """``fit_raw`` without the weights that ``out_OI`` masks: neither ranges nor searches include them."""
    if out_OI is None:
        return fit_raw(w_OI, spec, fit, importance_OI)
    weight = torch.ones_like(w_OI) if importance_OI is None else importance_OI
    return fit_raw(without(w_OI, out_OI, spec.granularity), spec, fit, weight.masked_fill(out_OI, 0))


def without(w_OI: Tensor, mask_OI: Tensor, granularity: Granularity) -> Tensor:
    """``w_OI`` with masked weights replaced by the mean of the rest of their granule, which no range notices."""
    w, mask = granularity.split(w_OI), granularity.split(mask_OI)
    count = (~mask).sum(1, keepdim=True).clamp(min=1)
    mean = w.masked_fill(mask, 0).sum(1, keepdim=True) / count
    return granularity.join(torch.where(mask, mean, w), tuple(w_OI.shape))


@dataclass(frozen=True, eq=False)
class Placed:
    """Parameters of all granules as stored.

    Args:
        params: leading axis G, strips x bands, row-major.
        second: the stored second level of each floating field; empty without one.
    """

    params: Params
    second: Mapping[str, QTensor]


class Bands:
    """The grids of the bands of ``tiling``, placed when the solver reaches them; kept as fitted and as stored.

    Args:
        tiling: strips and bands of the weight.
        spec: its format.
        fit: for all granules.
        rows: number of rows of the weight.
        importance_I: of each column, in the stored order.
    """

    def __init__(self, tiling: Tiling, spec: Spec, fit: Fit, rows: int, importance_I: Tensor):
        self.tiling, self.spec, self.fit, self.rows, self.importance_I = tiling, spec, fit, rows, importance_I
        self._fitted: dict[int, Params] = {}  # leading axis: strips
        self._by_row: dict[int, Params] = {}  # as stored; leading axis: rows
        self._settled: Placed | None = None  # where they were replaced

    def __contains__(self, b: int) -> bool:
        return b in self._fitted

    def place_all(self, w_OI: Tensor, out_OI: Tensor | None) -> None:
        """Places every band on ``w_OI``, whose columns are in the stored order."""
        wide = self.tiling.wide
        fitted = place(w_OI, self.spec, self.fit, self.importance_I.expand_as(w_OI), out_OI)
        stored = self.spec.as_stored(fitted, wide)
        for b in range(wide):
            self._fitted[b] = _every(fitted, b, wide)
            self._by_row[b] = self.tiling.of_rows(_every(stored, b, wide), self.rows)

    def place(self, b: int, w_OK: Tensor, columns: Tensor, out_OK: Tensor | None) -> None:
        """Places band b on its columns ``w_OK``, which are stored at ``columns``."""
        self._fitted[b] = self.tiling.place(w_OK, self.spec, self._fit_of(b), self.importance_I[columns], out_OK)
        self._by_row[b] = self.tiling.of_rows(self.spec.as_stored(self._fitted[b]), self.rows)

    def trials(
        self, b: int, w_OK: Tensor, columns: Tensor, some_FN: Tensor, out_OK: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Params]]:
        """What :meth:`place` would fit to some columns of the band alone, without keeping it.

        Args:
            b, w_OK, columns, out_OK: as for :meth:`place`.
            some_FN: F choices of N columns each, as indices into the K columns.

        Yields:
            For some of the choices at a time: their weights ``[O * f, N]``, every row f times, and the parameters as fitted,
            one set for each of these rows.
        """
        rows, width = len(w_OK), some_FN.shape[1]
        together = max(1, _TRIED // (rows * width)) if self.tiling.height == 1 else 1
        for some in some_FN.split(together):
            shape = rows * len(some), width
            w, out = (None if x is None else x[:, some.flatten()].view(shape) for x in (w_OK, out_OK))
            assert w is not None
            importance = self.importance_I[columns[some]].expand(rows, *some.shape).reshape(shape)
            fitted = self.tiling.place(w, self.spec, self._fit_of(b, len(some)), importance, out)
            yield w, self.tiling.of_rows(fitted, len(w))

    def _fit_of(self, b: int, copies: int = 1) -> Fit:
        """The fit of band b; a choice for each granule becomes that of the band's granules, each ``copies`` times."""
        of_granules = getattr(self.fit, "rows", None)
        if of_granules is None:
            return self.fit
        strips = -(-self.rows // self.tiling.height)
        return of_granules(torch.arange(b, strips * self.tiling.wide, self.tiling.wide).repeat_interleave(copies))

    def of_rows(self, b: int) -> Params:
        """Parameters of band b as stored, one set for each row."""
        return self._by_row[b]

    def qtensor(self, codes_OI: Tensor) -> QTensor:
        """The weight with these codes, in the stored order."""
        if self._settled is None:
            return QTensor.fitted(codes_OI, self._all(self._fitted), self.spec)
        return QTensor(codes_OI, self._settled.params, self.spec, self._settled.second)

    def settled(self) -> Placed:
        """Parameters of all granules as stored."""
        if self._settled is None:
            fitted = QTensor.fitted(self._no_codes(), self._all(self._fitted), self.spec)
            self._settled = Placed(fitted.params, fitted.second)
        return self._settled

    def settle(self, placed: Placed) -> None:
        """Replaces the parameters of all granules."""
        self._settled, wide = placed, self.tiling.wide
        for b in range(wide):
            self._by_row[b] = self.tiling.of_rows(_every(placed.params, b, wide), self.rows)

    def _no_codes(self) -> Tensor:
        return torch.zeros(self.rows, len(self.tiling.band_I), dtype=torch.uint8, device=self.tiling.band_I.device)

    def _all(self, by_band: dict[int, Params]) -> Params:
        """Parameters of all granules; G is strips x bands, row-major."""
        bands = [by_band[b] for b in range(self.tiling.wide)]
        both = zip(*bands, strict=True)
        return bands[0]._make(None if parts[0] is None else torch.stack(parts, 1).flatten(0, 1) for parts in both)


def _every(params: Params, b: int, wide: int) -> Params:
    """The parameters of band b, from those of all granules."""
    return params._make(None if p is None else p[b::wide] for p in params)


def by_score(score_I: Tensor) -> Tensor:
    """Columns by falling score, such as the diagonal of H: the most costly errors first. Ties keep their order."""
    return score_I.argsort(descending=True, stable=True)


def by_band_and_score(score_I: Tensor, band_I: Tensor) -> Tensor:
    """Columns by falling score inside each band, and bands by their largest score: the columns of a band stay together."""
    largest = score_I.new_zeros(int(band_I[-1]) + 1).scatter_reduce(0, band_I, score_I, "amax", include_self=False)
    rank = by_score(largest).argsort()  # place of each band; unique, so bands with equal maxima do not mix
    columns = by_score(score_I)
    return columns[rank[band_I[columns]].argsort(stable=True)]


def lazy_blocks(width_of_runs: list[int], block: int) -> list[tuple[int, int]]:
    """Cuts columns into blocks ``[i1, i2)`` of at most ``block`` columns, never inside a run that fits into a block.

    Longer runs start a block. At the first column of a run the weights of the whole run are therefore up to date: the run
    lies inside the current block, or has no outstanding corrections.
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
