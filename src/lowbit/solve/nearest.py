"""Round to nearest: every element takes its nearest code, independent of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.numerics import (
    Clipped,
    Fisher,
    Fit,
    Fixed,
    MinMax,
    QTensor,
    Spec,
    SquareSum,
    Statistic,
    all_finite,
    mean_square,
    quantize,
    serializable,
)
from lowbit.solve.base import Solution, Solver, check_weight
from lowbit.solve.columns import place
from lowbit.solve.outliers import OutlierRule, choose, rules_of, side_terms

_WEIGHTED_BY: dict[str, Statistic] = {"fisher": Fisher(), "inputs": SquareSum()}
"""The statistic of each kind of importance."""


@serializable
@dataclass(frozen=True)
class Nearest(Solver):
    """Fits each granule by ``fit`` and rounds.

    Args:
        fit: places the grid on each granule.
        outliers: one rule or several for weights that stay in float16, which the fit ignores; see ``solve.outliers``.
        importance: weights of the elements in the fit: ``"none"`` (all equal), ``"fisher"``, or ``"inputs"``, the mean square of
            the input that each meets, as in llama.cpp's importance matrix.
        encode_before_storing: take the nearest codes under the parameters as fitted, as code does that quantizes its scales
            afterwards. Otherwise they are nearest under the parameters as stored, which loses less.
    """

    fit: Fit = MinMax()
    outliers: OutlierRule | tuple[OutlierRule, ...] | None = None
    importance: Literal["none", "fisher", "inputs"] = "none"
    encode_before_storing: bool = False

    def __post_init__(self):
        if self.importance not in ("none", *_WEIGHTED_BY):
            raise ValueError(f"importance is 'none', 'fisher' or 'inputs', found {self.importance!r}")
        for rule in rules_of(self.outliers):
            if rule.live:
                raise ValueError(f"{rule} chooses while columns are rounded one after another; use the solver Gptq")

    @property
    def needs(self) -> frozenset[Statistic]:
        own: frozenset[Statistic] = frozenset({_WEIGHTED_BY[self.importance]} if self.importance != "none" else ())
        return own.union(*(rule.needs for rule in rules_of(self.outliers)))

    def check(self, spec: Spec, clipped: bool) -> None:
        check_weight(spec, None if clipped else self.fit)

    def solve(
        self, w_OI: Tensor, spec: Spec, stats: Mapping[Statistic, Tensor], clip: Clipped | Fixed | None = None
    ) -> Solution:
        importance = self._importance(w_OI, stats)
        fit = clip or self.fit
        if self.outliers is None:
            return Solution(quantize(w_OI, spec, fit, importance, encode_before_storing=self.encode_before_storing))
        if not all_finite(w_OI):
            raise ValueError(f"cannot quantize {int((~torch.isfinite(w_OI)).sum())} weights that are NaN or Inf")
        chosen = choose(rules_of(self.outliers), w_OI, spec, fit, stats)
        out = chosen.out_of_fits(w_OI)
        shape = (w_OI.shape[0], w_OI.shape[1])
        raw = place(w_OI, spec, fit, importance, out)
        params = raw if self.encode_before_storing else spec.as_stored(raw, spec.granularity.param_shape(shape)[1])
        coded = w_OI if out is None else w_OI.masked_fill(out, 0)
        codes = spec.grid.encode(spec.granularity.split(coded), params)
        q = QTensor.fitted(spec.granularity.join(codes, shape).contiguous(), raw, spec)
        rest = w_OI - q.dequantize().to(w_OI.dtype)
        side = side_terms(chosen.columns, rest[:, chosen.columns], chosen.elements, rest)
        return Solution(q, side=side, notes=chosen.notes)

    def _importance(self, w_OI: Tensor, stats: Mapping[Statistic, Tensor]) -> Tensor | None:
        """The weight of each element, ``[O, I]``; None: all equal."""
        if self.importance == "none":
            return None
        found = stats[_WEIGHTED_BY[self.importance]]
        return found if self.importance == "fisher" else mean_square(found).to(w_OI).expand_as(w_OI)
