"""Per-channel scale: moves the difficulty of quantization from activations to weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scale:
    """x / s. Consumer columns are multiplied by s; producer rows and bias are divided by s.

    Args:
        s: [I], nonzero. Not checked: a zero or denormal entry gives Inf or NaN.
    """

    s: Tensor
    exact: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        return x / self.s

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w_OI * self.s, b

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w_OI / self.s[:, None], None if b is None else b / self.s

    def dual(self) -> Scale:
        return Scale(1 / self.s)

    def tile(self, copies: int) -> Scale:
        return Scale(self.s.repeat(copies))
