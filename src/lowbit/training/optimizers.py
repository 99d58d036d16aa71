"""torch's optimizers and schedules as frozen values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from lowbit.numerics import serializable
from lowbit.training.trainable import Group


class Optimizer:
    """How leaves are moved, as a frozen value. Subclasses are frozen dataclasses."""

    @property
    def rotates(self) -> bool:
        """Whether it moves square matrices so that orthogonal ones stay orthogonal; else leaves of any shape, freely."""
        return False

    def make(self, groups: Sequence[Group], lr: float) -> torch.optim.Optimizer:
        """An optimizer of the leaves of ``groups``, each at its own multiple of ``lr``."""
        raise NotImplementedError


@serializable
@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self):
        if not all(0 <= beta < 1 for beta in self.betas) or self.weight_decay < 0:
            raise ValueError(f"AdamW needs betas from 0 to below 1 and a weight_decay of 0 or more, found {self}")

    def make(self, groups: Sequence[Group], lr: float) -> torch.optim.Optimizer:
        parts = [{"params": group.leaves, "lr": lr * group.rate} for group in groups if group.leaves]
        return torch.optim.AdamW(parts, lr=lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)


@serializable
@dataclass(frozen=True)
class CayleySGD(Optimizer):
    """Gradient descent of square matrices that stay orthogonal (Cayley SGD, arXiv:2002.01113; SpinQuant, arXiv:2405.16406,
    section 3.2).

    With the gradient G of X, the transpose of a leaf, X moves along the skew-symmetric ``W = (X G^T - G X^T) / 2``: it becomes
    ``(I - a W / 2)^-1 (I + a W / 2) X``, where a is the learning rate, or 1 over the largest column sum of ``|W|`` if that is less. The
    authors' code iterates five times towards this product and makes matrices orthogonal again from time to time; here it is solved for
    in float64.
    """

    @property
    def rotates(self) -> bool:
        return True

    def make(self, groups: Sequence[Group], lr: float) -> torch.optim.Optimizer:
        return _Cayley([{"params": group.leaves, "lr": lr * group.rate} for group in groups if group.leaves], lr)


class _Cayley(torch.optim.Optimizer):
    def __init__(self, parts: list[dict[str, Any]], lr: float):
        super().__init__(parts, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is not None:
                    leaf.copy_(_turned(leaf.T.double(), leaf.grad.T.double(), group["lr"]).T)


def _turned(x_NN: Tensor, g_NN: Tensor, lr: float) -> Tensor:
    w_NN = (x_NN @ g_NN.T - g_NN @ x_NN.T) / 2
    largest = w_NN.abs().sum(0).amax().clamp(min=torch.finfo(w_NN.dtype).tiny)
    half_NN = w_NN * (torch.clamp(1 / largest, max=lr) / 2)
    one_NN = torch.eye(len(x_NN), dtype=x_NN.dtype, device=x_NN.device)
    return torch.linalg.solve(one_NN - half_NN, (one_NN + half_NN) @ x_NN)


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
