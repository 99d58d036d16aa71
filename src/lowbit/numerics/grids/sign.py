"""The grid of signs: -1 and +1, one bit, without a parameter.

Scales are not part of it. The layer that holds signs scales its input and its output instead (OneBit, arXiv:2402.11295),
which costs a number for each row and column, not one for each granule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.numerics.grids.base import Field, NoParams
from lowbit.numerics.serialize import serializable


class _SignWithGradient(torch.autograd.Function):
    """The signs of x, with the gradient ``1.001 - tanh(x)**2``: far from zero, where a sign hardly flips, almost none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _signs(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (1.001 - x.tanh().square())


@serializable
@dataclass(frozen=True)
class Sign:
    """-1 (code 0) and +1 (code 1). Zero is +1. No range places it, and it stores nothing but codes."""

    kind: ClassVar[Any] = NoParams

    @property
    def bits(self) -> int:
        return 1

    @property
    def fields(self) -> tuple[Field, ...]:
        return ()

    def encode(self, x_GK: Tensor, params: NoParams) -> Tensor:
        return (x_GK >= 0).to(torch.uint8)

    def decode(self, codes_GK: Tensor, params: NoParams) -> Tensor:
        return codes_GK.float().mul_(2).sub_(1)

    def fake(self, x_GK: Tensor, params: NoParams) -> Tensor:
        """``decode(encode(x))`` in the dtype of x, with OneBit's gradient ``1.001 - tanh(x)**2``; NaN where x is not finite."""
        return _SignWithGradient.apply(x_GK)  # pyright: ignore[reportReturnType]


def _signs(x: Tensor) -> Tensor:
    one = torch.ones((), dtype=x.dtype, device=x.device)
    return torch.where(x >= 0, one, -one) + 0 * x  # what is added is zero, or NaN
