"""A search of the floating format of a weight, and of the share of its range for every output channel.

Shapes: O output channel, I input channel, G granule, K element within a granule, C candidate (a format and a share).
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from lowbit.numerics import Affine, Clipped, Float, Spec, extremes
from lowbit.steps.product_errors import ProductErrors
from lowbit.steps.race import hopeless, spread

_PROBED = 8  # one in so many channels shows whether a format is hopeless
_BEHIND = 1.25  # a format that lost more than so many times the least is not looked at again


class WeightRanges:
    """Repeated searches of one weight, while what it is multiplied by changes.

    A search tries every share of every format, unless the format is far behind: its lag behind an earlier one on some channels is
    more than chance explains (:func:`~lowbit.steps.race.hopeless`), or it was in the search before. Where channels share ranges, or
    scales of channels are stored together, every search tries all.

    Args:
        w_OI: the weight.
        spec: its format; ``formats`` are in place of its grid.
        shares: multiples of the largest magnitude, the first one where all are equal.
    """

    def __init__(self, w_OI: Tensor, spec: Spec, formats: tuple[Float, ...], shares: tuple[float, ...]):
        self.w_OI, self.spec, self.formats, self.shares = w_OI, spec, formats, shares
        self.height, self.columns = spec.granularity.param_shape((w_OI.shape[0], w_OI.shape[1]))
        self.by_row = self.height == len(w_OI)
        self.narrows = self.by_row and spec.stats is None
        self.share_C = w_OI.new_tensor(shares)
        self.x_GK = spec.granularity.split(w_OI)
        self.lo_G1, self.hi_G1 = extremes(self.x_GK)
        self.rivals = list(range(len(formats)))
        """The formats that are looked at."""

    def search(self, errors: ProductErrors) -> tuple[Spec, Clipped]:
        """The format with the least error, and the share of every granule: the first of equals.

        Args:
            errors: of rows of the weight.
        """
        lost_FSO = self._all_lost(errors)
        least_FO, chosen = lost_FSO.min(1)
        sums_F = least_FO.sum(1, dtype=torch.float64) if self.by_row else least_FO[:, 0].double()
        best = int(sums_F.argmin())
        if self.narrows:
            self.rivals = [i for i in self.rivals if i == best or sums_F[i] <= _BEHIND * sums_F[best]]
        share_G1 = self.share_C[chosen[best]][: self.height].repeat_interleave(self.columns)[:, None]
        return self._spec(best), Clipped(share_G1, share_G1)

    def _spec(self, number: int) -> Spec:
        return replace(self.spec, grid=self.formats[number])

    def _all_lost(self, errors: ProductErrors) -> Tensor:
        """The errors ``[formats, shares, O]``; infinite for formats that are not looked at, and where they are NaN."""
        found, least_O = self.w_OI.new_full((len(self.formats), len(self.shares), len(self.w_OI)), inf), None
        for i in self.rivals:
            candidates = range(i * len(self.shares), (i + 1) * len(self.shares))
            if least_O is not None and self._is_hopeless(candidates, errors, least_O):
                continue
            lost_SO = torch.stack([self._lost(c, errors) for c in candidates])
            found[i] = lost_SO.where(lost_SO >= 0, inf)
            of_format_O = found[i].amin(0)
            if least_O is None or of_format_O.sum() < least_O.sum():
                least_O = of_format_O
        return found

    def _is_hopeless(self, candidates: range, errors: ProductErrors, least_O: Tensor) -> bool:
        """Whether some channels show that the best of ``candidates`` lose more than ``least_O`` in all."""
        count = len(least_O)
        rows = torch.tensor(spread(count)[: count // _PROBED], dtype=torch.int64, device=least_O.device)
        if not self.narrows or not len(rows):
            return False
        lost_R = torch.stack([errors.of(self.restored(c, rows), rows) for c in candidates]).amin(0)
        return hopeless((lost_R - least_O[rows]).double(), 0, count / len(rows) - 1)

    def _lost(self, c: int, errors: ProductErrors) -> Tensor:
        """The error of each channel ``[O]``."""
        lost_O = errors.of(self.restored(c))
        return lost_O if self.by_row else lost_O.sum().expand_as(lost_O)

    def restored(self, c: int, rows: Tensor | None = None) -> Tensor:
        """The weight, or some of its rows, as candidate ``c`` will store it: what ``fake_quantize`` makes of the same shares."""
        number, share = c // len(self.shares), self.share_C[c % len(self.shares)]
        spec, shape, x_GK, lo_G1, hi_G1 = self._spec(number), self.w_OI.shape, self.x_GK, self.lo_G1, self.hi_G1
        if rows is not None:
            shape = (len(rows), shape[1])
            x_GK, lo_G1, hi_G1 = (
                t.reshape(self.height, self.columns, -1)[rows].flatten(0, 1) for t in (x_GK, lo_G1, hi_G1)
            )
        assert isinstance(spec.grid, Float)
        placed = spec.grid.from_range(lo_G1 * share, hi_G1 * share)
        params = spec.as_stored(placed, spec.granularity.param_shape((shape[0], shape[1]))[1], check=False)
        assert isinstance(params, Affine)
        return spec.granularity.join(spec.grid.fake(x_GK, params), (shape[0], shape[1]))
