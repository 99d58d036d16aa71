"""Signs with scales of rows and columns: a weight of one bit.

The layer multiplies its input by g, then by the signs, and its output by h, so that its weight is ``S * (h g^T)``. Both
vectors are the layer's own, not those of an input that several linears read: statistics of inputs stay what they are, and
what a step found out about the input before does not hold for the scaled one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.numerics import (
    Clipped,
    Fit,
    Fixed,
    QTensor,
    Sign,
    Spec,
    Statistic,
    Unfitted,
    quantize,
    serializable,
    sign_value_factors,
)
from lowbit.solve.base import Solution, Solver
from lowbit.transforms import ChannelTransform, Normalize, Scale

_LEAST, _MOST = 2.0**-14, 2.0**15
"""Between these, float16 holds all its digits."""


@serializable
@dataclass(frozen=True)
class SignValue(Solver):
    """Stores ``S * (h g^T)``, the best of this form: signs of 1 bit, and one scale for each output and input in float16 (SVID,
    OneBit, arXiv:2402.11295).

    Args:
        normalize: the layer also normalizes its output over its channels, as OneBit's does. That makes training stable and
            needs it: a model whose outputs are normalized computes something else than the original until it is trained.
    """

    normalize: bool = False
    fit: ClassVar[Fit] = Unfitted()  # pyright: ignore[reportIncompatibleVariableOverride]  # there is no other

    @property
    def rescales(self) -> bool:
        return True

    def transforms(self, shape: tuple[int, int]) -> tuple[tuple[ChannelTransform, ...], tuple[ChannelTransform, ...]]:
        one = torch.ones((), dtype=torch.float16)
        return self._around(one.expand(shape[0]), one.expand(shape[1]))

    def check(self, spec: Spec, clipped: bool) -> None:
        if not isinstance(spec.grid, Sign):
            raise ValueError(f"SignValue stores signs, Spec(Sign(), PerTensor()), not weights in {spec.grid}")
        if clipped:
            raise ValueError("SignValue stores signs, which no range places; leave out the step that chooses ranges")

    def solve(
        self, w_OI: Tensor, spec: Spec, stats: Mapping[Statistic, Tensor], clip: Clipped | Fixed | None = None
    ) -> Solution:
        self.check(spec, clip is not None)
        q: QTensor = quantize(w_OI, spec, self.fit)
        h_O, g_I = sign_value_factors(w_OI)
        pre, post = self._around(_stored(1 / h_O), _stored(1 / g_I))
        return Solution(q, pre, post)

    def _around(self, by_O: Tensor, by_I: Tensor) -> tuple[tuple[ChannelTransform, ...], tuple[ChannelTransform, ...]]:
        """What is around the signs of a layer that divides its output by ``by_O`` and its input by ``by_I``."""
        return (Scale(by_I),), (Scale(by_O), *((Normalize(),) if self.normalize else ()))


def _stored(divisor: Tensor) -> Tensor:
    """Divisors in float16. Of a row or column of zeros, whose signs say nothing, it is the largest."""
    return divisor.clamp(_LEAST, _MOST).half()
