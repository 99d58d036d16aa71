"""Training objectives: losses on what a model gives for a batch of windows.

All are means over tokens, in nats or in their own unit. The authors' codes differ in this: LLM-QAT and BitDistiller sum over the
tokens of a window. Adam's steps do not depend on such a factor; a limit on the gradient's norm does.

Shapes: B window of a batch, T token, V vocabulary, L layer, d hidden channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.numerics import serializable
from lowbit.numerics.compiled_divergence import compare


class Answer(NamedTuple):
    """What the original model gives for a window: logits ``[T, V]``, and hidden states ``[T, d]`` as the objective asks."""

    logits_TV: Tensor
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of tokens, and what the original model makes of them.

    Attributes:
        ids_NT: their tokens.
        original: gives the original model's answer for window i.
    """

    ids_NT: Tensor
    original: Callable[[int], Answer]

    def __len__(self) -> int:
        return len(self.ids_NT)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some windows of a text, and what the model in training gives for them.

    Attributes:
        windows: their numbers.
        ids_BT: their tokens.
        logits_BTV: logits of the model in training; part of the graph.
        original: as of :class:`Text`.
        hidden: hidden states ``[B, T, d]`` of the model in training: the embedding's output, then that of each block.
    """

    windows: Sequence[int]
    ids_BT: Tensor
    logits_BTV: Tensor
    original: Callable[[int], Answer]
    hidden: tuple[Tensor, ...] = ()

    @cached_property
    def logits(self) -> tuple[Tensor, ...]:
        """Of each window, ``[T, V]``. Their gradients are joined once, where indices would add up one of all windows for each."""
        return self.logits_BTV.unbind()


class Objective:
    """A loss. Subclasses are frozen dataclasses."""

    @property
    def name(self) -> str:
        """As progress shows it."""
        raise NotImplementedError

    @property
    def reads_original(self) -> bool:
        """Whether it compares with the original model."""
        return True

    @property
    def reads_hidden(self) -> bool:
        """Whether it reads hidden states."""
        return False

    @property
    def reads_next(self) -> bool:
        """Whether it is a mean over tokens of what their logits and the token after each say, and reads nothing else. It then has
        :meth:`of_tokens`, and can be computed on a piece of a window at a time."""
        return False

    def settled(self, text: Text) -> tuple[Objective, str]:
        """This objective with all that it must find out of the training text first, and a note for the report or ""."""
        return self, ""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of ``batch``: a scalar, averaged over tokens and windows."""
        loss = torch.zeros((), device=batch.logits_BTV.device)
        for b in range(len(batch.windows)):
            loss = loss + self.of_window(batch, b) / len(batch.windows)
        return loss

    def of_window(self, batch: Batch, b: int) -> Tensor:
        """The mean loss of the tokens of window ``b`` of the batch."""
        raise NotImplementedError

    def of_tokens(self, logits_NV: Tensor, next_N: Tensor) -> Tensor:
        """The sum of the losses of N tokens, whose next tokens are ``next_N``; for objectives with :attr:`reads_next`."""
        raise NotImplementedError


def divergence(logits_TV: Tensor, target_TV: Tensor, reverse: float = 0.0) -> Tensor:
    """Mean over tokens of ``reverse KL(model || target) + (1 - reverse) KL(target || model)`` in nats, a scalar in float32.

    Gradients reach ``logits_TV`` alone.
    """
    value = _Divergence.apply(logits_TV, target_TV, reverse)
    assert isinstance(value, Tensor)
    return value


_PIECE = 1 << 20  # logits that are worked on at once: they stay in cache


def _piece(p_NV: Tensor, q_NV: Tensor, reverse: float, gradient_NV: Tensor | None, weight: float) -> Tensor | float:
    """The sum over tokens of the divergence; fills ``gradient_NV`` with ``weight`` times its gradient for ``q``."""
    compared = compare(p_NV, q_NV, reverse, gradient_NV, weight)
    if compared is not None:
        return ((1 - reverse) * compared.kl + reverse * compared.reverse_kl).sum() if reverse else compared.kl.sum()
    logp_NV, logq_NV = p_NV.log_softmax(-1), q_NV.log_softmax(-1)
    p_NV, q_NV, apart_NV = logp_NV.exp(), logq_NV.exp(), logp_NV.sub_(logq_NV)
    value = (1 - reverse) * torch.linalg.vecdot(p_NV, apart_NV).sum()
    grad_NV = q_NV.sub(p_NV).mul_(1 - reverse)
    if reverse:
        reverse_N = -torch.linalg.vecdot(q_NV, apart_NV)
        value = value + reverse * reverse_N.sum()
        grad_NV.sub_(q_NV.mul_(apart_NV.add_(reverse_N[:, None])), alpha=reverse)
    if gradient_NV is not None:
        torch.mul(grad_NV, weight, out=gradient_NV)
    return value


class _Divergence(torch.autograd.Function):
    """The divergence and its gradient in one pass over pieces of the tokens: nothing of the size of the logits is made but the
    gradient, in their dtype."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_TV: Tensor, reverse: float) -> Tensor:
        tokens, vocabulary = logits_TV.shape
        size = max(1, _PIECE // vocabulary)
        grad_TV = torch.empty_like(logits_TV) if ctx.needs_input_grad[0] else None
        value = torch.zeros((), device=logits_TV.device)
        with torch.autocast(logits_TV.device.type, enabled=False):  # which takes dot products in bfloat16
            for first in range(0, tokens, size):
                rows = slice(first, first + size)
                p_NV, q_NV = target_TV[rows].float(), logits_TV[rows].float()
                piece_NV = None if grad_TV is None else torch.empty_like(q_NV)
                value += _piece(p_NV, q_NV, reverse, piece_NV, 1 / tokens)
                if grad_TV is not None and piece_NV is not None:
                    grad_TV[rows] = piece_NV
        ctx.save_for_backward(grad_TV)
        return value / tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_TV,) = ctx.saved_tensors
        return grad_TV * grads[0], None, None


@serializable
@dataclass(frozen=True)
class OriginalKL(Objective):
    """KL divergence of the model from the original model's next-token distribution (LLM-QAT, arXiv:2305.17888)."""

    @property
    def name(self) -> str:
        return "KL"

    def of_window(self, batch: Batch, b: int) -> Tensor:
        return divergence(batch.logits[b], batch.original(batch.windows[b]).logits_TV)


@serializable
@dataclass(frozen=True)
class ReverseKL(Objective):
    """KL divergence of the original's next-token distribution from the model's: it does not ask the model for every mode."""

    @property
    def name(self) -> str:
        return "reverse KL"

    def of_window(self, batch: Batch, b: int) -> Tensor:
        return divergence(batch.logits[b], batch.original(batch.windows[b]).logits_TV, reverse=1.0)


@serializable
@dataclass(frozen=True)
class ConfidenceKL(Objective):
    """``c KL(model || original) + (1 - c) KL(original || model)``, CAKLD of BitDistiller (arXiv:2402.10631).

    The more confident the original is of the text, the more its modes count.

    Args:
        coefficient: c, from 0 (forward KL) to 1 (reverse KL); None: estimated once, before the first step.
        estimate: ``"target"``: the original's mean probability of the text's next tokens, as in the paper; ``"largest"``: its
            mean largest probability, as in the authors' code (which divides by 10 what it sums over 11 batches).
        windows: on which c is estimated, at most.
    """

    coefficient: float | None = None
    estimate: Literal["target", "largest"] = "target"
    windows: int = 32

    def __post_init__(self):
        if self.coefficient is not None and not 0 <= self.coefficient <= 1:
            raise ValueError(f"the coefficient is a share from 0 to 1, or None; found {self.coefficient}")
        if self.estimate not in ("target", "largest") or self.windows < 1:
            raise ValueError(f"estimate is 'target' or 'largest', over 1 window or more; found {self}")

    @property
    def name(self) -> str:
        return "CAKLD"

    @torch.no_grad()
    def settled(self, text: Text) -> tuple[Objective, str]:
        if self.coefficient is not None:
            return self, ""
        means = []
        for w in range(min(self.windows, len(text))):
            p_TV = text.original(w).logits_TV.float().softmax(-1)
            if self.estimate == "largest":
                p_T = p_TV.amax(-1)
            else:
                p_T = p_TV[:-1].gather(1, text.ids_NT[w, 1:, None].to(p_TV.device))[:, 0]
            means.append(p_T.double().mean())
        coefficient = min(1.0, torch.stack(means).mean().item())
        return replace(self, coefficient=coefficient), f"the share of the reverse KL divergence is {coefficient:.3f}"

    def of_window(self, batch: Batch, b: int) -> Tensor:
        assert self.coefficient is not None
        return divergence(batch.logits[b], batch.original(batch.windows[b]).logits_TV, reverse=self.coefficient)


@serializable
@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of the text's next tokens, in nats. It needs no original model."""

    @property
    def name(self) -> str:
        return "cross-entropy"

    @property
    def reads_original(self) -> bool:
        return False

    @property
    def reads_next(self) -> bool:
        return True

    def of_window(self, batch: Batch, b: int) -> Tensor:
        return F.cross_entropy(batch.logits[b][:-1].float(), batch.ids_BT[b, 1:].to(batch.logits_BTV.device))

    def of_tokens(self, logits_NV: Tensor, next_N: Tensor) -> Tensor:
        return F.cross_entropy(logits_NV.float(), next_N.to(logits_NV.device), reduction="sum")


@serializable
@dataclass(frozen=True)
class HiddenStates(Objective):
    """``kl`` times the KL divergence from the original, and ``hidden`` times the distance of hidden states.

    The distance is ``sum over layers of mean over tokens of |h / |h| - h' / |h'||^2``, for the embedding's output and the outputs
    of all blocks but the last, as in the code of OneBit (arXiv:2402.11295).
    """

    kl: float = 1.0
    hidden: float = 1.0

    def __post_init__(self):
        if self.kl < 0 or self.hidden <= 0:
            raise ValueError(f"kl is 0 or more and hidden positive, found {self}")

    @property
    def name(self) -> str:
        return "KL and hidden states"

    @property
    def reads_hidden(self) -> bool:
        return True

    def of_window(self, batch: Batch, b: int) -> Tensor:
        original = batch.original(batch.windows[b])
        loss = self.kl * divergence(batch.logits[b], original.logits_TV)
        for mine, other in zip(batch.hidden[:-1], original.hidden[:-1], strict=True):
            apart = F.normalize(mine[b].float(), dim=-1) - F.normalize(other.float(), dim=-1)
            loss = loss + self.hidden * apart.square().sum(-1).mean()
        return loss
