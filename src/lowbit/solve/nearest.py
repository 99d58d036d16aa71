"""Round to nearest: every element takes its nearest code, whatever the inputs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lowbit.numerics import Clipped, Fit, MinMax, PerToken, Spec, Statistic, quantize, tagged
from lowbit.solve.base import Solution


@tagged
@dataclass(frozen=True)
class Nearest:
    """Fits each granule by ``fit`` and rounds. Needs no statistics."""

    fit: Fit = MinMax()

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset()

    @property
    def moves_groups(self) -> bool:
        return False

    def check(self, spec: Spec, clipped: bool) -> None:
        if isinstance(spec.granularity, PerToken):
            raise ValueError("PerToken() is for activations; a weight is quantized PerChannel(), PerGroup(size), ...")

    def solve(
        self, w_OI: Tensor, spec: Spec, stats: Mapping[Statistic, Tensor], clip: Clipped | None = None
    ) -> Solution:
        return Solution(quantize(w_OI, spec, clip or self.fit))
