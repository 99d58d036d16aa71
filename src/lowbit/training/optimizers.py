"""torch's optimizers and schedules as frozen values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from lowbit.numerics import serializable
from lowbit.training.trainable import Group


@serializable
@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self):
        if not all(0 <= beta < 1 for beta in self.betas) or self.weight_decay < 0:
            raise ValueError(f"AdamW needs betas from 0 to below 1 and a weight_decay of 0 or more, found {self}")

    def make(self, groups: Sequence[Group], lr: float) -> torch.optim.Optimizer:
        """An optimizer of the leaves of ``groups``, each at its own multiple of ``lr``."""
        parts = [{"params": group.leaves, "lr": lr * group.rate} for group in groups if group.leaves]
        return torch.optim.AdamW(parts, lr=lr, betas=self.betas, weight_decay=self.weight_decay)


@runtime_checkable
class Schedule(Protocol):
    """How learning rates change from step to step, as a frozen value."""

    def make(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """A schedule of ``steps`` steps up to the rates that ``optimizer`` has; call ``step()`` after each."""
        ...


@serializable
@dataclass(frozen=True)
class OneCycle:
    """A learning rate that rises along a cosine for the share ``warmup`` of all steps, then falls to almost zero.

    Adam's first beta falls while the rate rises, and rises again (arXiv:1708.07120).
    """

    warmup: float = 0.1

    def __post_init__(self):
        _check_warmup(self.warmup)

    def make(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        rates = [group["lr"] for group in optimizer.param_groups]
        share = 0.0 if self.warmup * steps == 1 else self.warmup  # torch divides by a warm-up of a single step
        return OneCycleLR(optimizer, rates, total_steps=steps, pct_start=share)


@serializable
@dataclass(frozen=True)
class Cosine:
    """A learning rate that rises linearly for the share ``warmup`` of all steps, then falls along half a cosine.

    Args:
        warmup: share of the steps.
        floor: share of the largest rate that is left at the end; 1: the rate is constant behind the warm-up.
    """

    warmup: float = 0.0
    floor: float = 0.0

    def __post_init__(self):
        _check_warmup(self.warmup)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a share of the learning rate, 0 to 1, found {self.floor}")

    def make(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        rising = math.ceil(self.warmup * steps)

        def share(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            done = (step - rising) / max(1, steps - rising)
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2

        return LambdaLR(optimizer, share)


def _check_warmup(warmup: float) -> None:
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is a share of the steps, 0 to 1, found {warmup}")
