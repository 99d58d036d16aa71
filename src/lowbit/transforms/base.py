"""What a channel transform is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ChannelTransform(Protocol):
    """x' = T x over the last axis of an activation, with weights that absorb T on either side of it.

    Shapes: x [..., I], w_OI [O, I] as torch stores a linear, b [O] or None. Nothing is changed in place, and gradients
    reach the transform's parameters and the weights. `exact` says whether `fold_in` undoes `forward` for every input.
    """

    exact: ClassVar[bool]

    def forward(self, x: Tensor) -> Tensor:
        """T x. [..., I] -> [..., I'] (I' differs from I for `Split` and `Merge` only)."""
        ...

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights of a consumer that reads T x instead of x and gives the same output."""
        ...

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights of a producer that gives T y where it gave y."""
        ...

    def dual(self) -> ChannelTransform:
        """The transform U with (T x) . (U y) == x . y for all x and y: what keys get when queries get T."""
        ...

    def tile(self, copies: int) -> ChannelTransform:
        """The transform that acts alike on `copies` consecutive repetitions of the channels."""
        ...


def through(transforms: Iterable[Any], x: Tensor) -> Tensor:
    """``x`` ``[..., I]`` after ``transforms`` (anything with a ``forward``), in order: in float32 (float64 stays) and back."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for transform in transforms:
        y = transform.forward(y)
    return y.to(x.dtype)
