"""Channel permutation: puts channels with similar ranges next to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Permute:
    """x[..., index]: channel j of the result is channel index[j] of x.

    Both folds only move rows or columns, so they are exact bit for bit.

    Args:
        index: [I], int64, a permutation of 0 .. I-1 (as torch.argsort returns it).
    """

    index: Tensor
    exact: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.index]

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w_OI[:, self.index], b

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w_OI[self.index], None if b is None else b[self.index]

    def dual(self) -> Permute:
        return self

    def tile(self, copies: int) -> Permute:
        starts = torch.arange(copies, device=self.index.device) * len(self.index)
        return Permute((starts[:, None] + self.index).flatten())
