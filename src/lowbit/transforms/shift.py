"""Per-channel shift: centres channels whose ranges are not symmetric around zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shift:
    """x - d. The consumer adds W d to its bias; the producer subtracts d from its bias.

    Both sides need a bias: if `b` is None the folds return a new one, which the caller must store.

    Args:
        d: [I].
    """

    d: Tensor
    exact: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        return x - self.d

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        moved = w_OI @ self.d
        return w_OI, moved if b is None else b + moved

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w_OI, -self.d if b is None else b - self.d

    def dual(self) -> Shift:
        raise ValueError("a Shift has no dual: (x - d) . U y == x . y holds for no U when d is not zero.")

    def tile(self, copies: int) -> Shift:
        return Shift(self.d.repeat(copies))
