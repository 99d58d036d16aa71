"""Normalization over the channels of a token: what a linear may do to its output, and no weight can do in its place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Normalize:
    """``(x - mean(x)) / sqrt(var(x) + eps)`` over all channels of a token: layer normalization without gain and bias.

    It is not linear, so that folds and duals raise an error. Only a packed layer runs it, on its output.

    Args:
        eps: added to the variance; positive.
    """

    eps: float = 1e-5
    exact: ClassVar[bool] = False

    def __post_init__(self):
        if not (isinstance(self.eps, float) and math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps is a positive number, found {self.eps!r}")

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> NoReturn:
        raise ValueError("a normalization is not linear: the weight that reads its result cannot undo it")

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> NoReturn:
        raise ValueError("a normalization is not linear: the weight whose output it reads cannot absorb it")

    def dual(self) -> NoReturn:
        raise ValueError("a normalization has no dual: it is not linear")

    def tile(self, copies: int) -> NoReturn:
        raise ValueError("a normalization of some channels is not one of several copies of them")
