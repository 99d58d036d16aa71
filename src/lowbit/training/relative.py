"""Trained numbers in units of their own magnitude, so that one relative learning rate serves numbers of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.numerics import straight_through
from lowbit.training.trainable import Start


class Relative:
    """A tensor ``[G, width]`` in units of each row's largest magnitude, or a vector in units of its own magnitudes.

    Args:
        start: its value before training.
        dtype: the dtype in which it is stored; None: its storage is not simulated.
    """

    def __init__(self, start: Tensor, dtype: torch.dtype | None = None):
        self.start, self.dtype = start.float(), dtype
        flat = self.start if start.dim() == 2 else self.start[:, None]
        self.unit = flat.abs().amax(1, keepdim=True).view(-1, *[1] * (start.dim() - 1))
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def value(self) -> Tensor:
        """The value now, rounded to its storage; gradients pass the rounding."""
        value = self.start + self.unit * self.delta
        return value if self.dtype is None else straight_through(value.to(self.dtype).float(), value)


def gains_of(model: nn.Module, start: Start) -> dict[str, Relative]:
    """The gains and biases of norms by name: all parameters of ``model`` that are vectors."""
    return {name: Relative(p.detach(), start.dtypes.get(name)) for name, p in model.named_parameters() if p.dim() == 1}
