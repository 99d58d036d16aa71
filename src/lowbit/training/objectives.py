"""Training objectives: losses on the logits of a batch of calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.numerics import serializable


@dataclass(frozen=True, eq=False)
class Batch:
    """Some calibration windows, and the logits of the model in training on them.

    Attributes:
        windows: their numbers.
        ids_BT: their tokens.
        logits_BTV: logits of the model in training; part of the graph.
        original: gives the original model's logits ``[T, V]`` for window i.
    """

    windows: Sequence[int]
    ids_BT: Tensor
    logits_BTV: Tensor
    original: Callable[[int], Tensor]


@runtime_checkable
class Objective(Protocol):
    """A loss, as a frozen value. Progress shows it as ``name``."""

    @property
    def name(self) -> str: ...

    def loss(self, batch: Batch) -> Tensor:
        """The loss of ``batch``: a scalar, averaged over tokens and windows."""
        ...


@serializable
@dataclass(frozen=True)
class OriginalKL:
    """KL divergence from the original model's next-token distribution, in nats per token."""

    @property
    def name(self) -> str:
        return "KL"

    def loss(self, batch: Batch) -> Tensor:
        loss = torch.zeros(())
        for i, logits_TV in zip(batch.windows, batch.logits_BTV, strict=True):
            with torch.no_grad():
                target = batch.original(i).float().log_softmax(-1)
            predicted = logits_TV.float().log_softmax(-1)
            divergence = F.kl_div(predicted, target, log_target=True, reduction="batchmean")
            loss = loss + divergence / len(batch.windows)
        return loss
