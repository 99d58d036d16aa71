"""The contract of a channel transform."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ChannelTransform(Protocol):
    """x' = T x over the last axis of an activation, and the weights on both sides that absorb T.

    Shapes: x [..., I], w_OI [O, I] as torch stores a linear, b [O] or None. No method changes its arguments, and gradients
    reach the transform's parameters and the weights. `exact`: `fold_in` undoes `forward` for every input.
    """

    exact: ClassVar[bool]

    def forward(self, x: Tensor) -> Tensor:
        """T x. [..., I] -> [..., I'] (I' differs from I for `Split` only)."""
        ...

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights of a consumer that reads T x instead of x, with the same output."""
        ...

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights of a producer that gives T y instead of y."""
        ...

    def dual(self) -> ChannelTransform:
        """The transform U with (T x) . (U y) == x . y for all x and y: keys get U when queries get T."""
        ...

    def tile(self, copies: int) -> ChannelTransform:
        """The transform that acts in the same way on each of `copies` consecutive repetitions of the channels."""
        ...


def through(transforms: Iterable[Any], x: Tensor) -> Tensor:
    """Applies ``transforms`` (objects with a ``forward``) to ``x`` ``[..., I]`` in order.

    Computed in float32 (float64 for float64 inputs); the result has the dtype of ``x``.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for transform in transforms:
        y = transform.forward(y)
    return y.to(x.dtype)
