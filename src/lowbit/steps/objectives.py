"""Objectives: the losses that learning minimizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.numerics import serializable

if TYPE_CHECKING:
    from lowbit.steps.block_io import BlockIO


@runtime_checkable
class Objective(Protocol):
    """A loss of the quantized block's hidden states against a target, both ``[B, T, d]``.

    ``augment`` adds a second target: the output of the original weights for the inputs of the quantized block. ``ahead`` is the
    number of further original blocks behind which hidden states are compared too, and ``weight`` what that loss counts.
    """

    @property
    def augment(self) -> bool: ...

    @property
    def ahead(self) -> int: ...

    @property
    def weight(self) -> float: ...

    def __call__(self, output: Tensor, target: Tensor) -> Tensor: ...


def block_loss(objective: Objective, io: BlockIO, output: Tensor, first: int) -> Tensor:
    """``objective`` of the quantized block's ``output`` ``[B, T, d]`` for windows ``first`` and following: against the original
    block's, and behind the original blocks to which it looks ahead, as far as there are any."""
    assert io.y is not None
    windows = slice(first, first + len(output))
    loss = objective(output, io.y[windows])
    if objective.ahead and io.ahead is not None:
        further = objective(io.ahead.run(output, first), io.ahead.y[windows])
        loss = loss + objective.weight * further
    return loss


class _OfTheBlock:
    """An error of the block's output alone."""

    @property
    def ahead(self) -> int:
        return 0

    @property
    def weight(self) -> float:
        return 0.0


@serializable
@dataclass(frozen=True)
class BlockMSE(_OfTheBlock):
    """Mean squared error of the block's output (OmniQuant, arXiv:2308.13137, equation 1); ``augment`` is its aug_loss."""

    augment: bool = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output.float(), target.float())


@serializable
@dataclass(frozen=True)
class TokenMSE(_OfTheBlock):
    """Squared error of each token's hidden state, relative to the squared norm of its target; the mean over all tokens.

    The next block normalizes every token, so this is the error that it sees. In the plain mean the few tokens with massive
    activations (arXiv:2402.17762) outweigh all others: theirs are errors of earlier blocks, which this block cannot correct.
    """

    augment: bool = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        target = target.float()
        size = target.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return ((output.float() - target).square().mean(-1) / size).mean()


@serializable
@dataclass(frozen=True)
class CrossBlockMAE:
    """Mean absolute error of the block's output, plus ``weight`` times that of the output ``ahead`` blocks further.

    The quantized output passes through the next ``ahead`` original blocks, or as many as there are, and is compared with the
    original stream behind them (cross-block reconstruction, WKVQuant, arXiv:2402.12065). Absolute errors let outliers count
    less. ``ahead=0`` is the loss of the block alone.
    """

    ahead: int = 5
    weight: float = 1.0

    def __post_init__(self):
        if self.ahead < 0 or self.weight < 0:
            raise ValueError(f"an objective looks 0 blocks or more ahead, with a weight of 0 or more, found {self}")

    @property
    def augment(self) -> bool:
        return False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(output.float(), target.float())
