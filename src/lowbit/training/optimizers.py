"""torch's optimizers and schedules as frozen values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from lowbit.numerics import serializable


@serializable
@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self):
        if not all(0 <= beta < 1 for beta in self.betas) or self.weight_decay < 0:
            raise ValueError(f"AdamW needs betas from 0 to below 1 and a weight_decay of 0 or more, found {self}")

    def make(self, leaves: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """An optimizer of ``leaves``."""
        return torch.optim.AdamW(leaves, lr=lr, betas=self.betas, weight_decay=self.weight_decay)


@serializable
@dataclass(frozen=True)
class OneCycle:
    """A learning rate that rises along a cosine for the share ``warmup`` of all steps, then falls to almost zero."""

    warmup: float = 0.1

    def __post_init__(self):
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, 0 to 1, found {self.warmup}")

    def make(self, optimizer: torch.optim.Optimizer, lr: float, steps: int) -> LRScheduler:
        """A schedule of ``steps`` steps up to rate ``lr``; call ``step()`` after each."""
        return OneCycleLR(optimizer, lr, total_steps=steps, pct_start=self.warmup)
