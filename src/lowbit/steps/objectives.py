"""Objectives: the losses that learning minimizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from lowbit.numerics import serializable


@runtime_checkable
class Objective(Protocol):
    """A loss of the quantized block's hidden states against a target, both ``[B, T, d]``.

    ``augment`` adds a second target: the output of the original weights for the inputs of the quantized block.
    """

    @property
    def augment(self) -> bool: ...

    def __call__(self, output: Tensor, target: Tensor) -> Tensor: ...


@serializable
@dataclass(frozen=True)
class BlockMSE:
    """Mean squared error of the block's output (OmniQuant, arXiv:2308.13137, equation 1); ``augment`` is its aug_loss."""

    augment: bool = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output.float(), target.float())
