"""Channel reassembly (QLLM, arXiv 2310.08041): outlier channels are split, and similar channels merged to make room.

A split is exact and makes the activation wider. A merge is exact only if the merged channels are equal, so a search
chooses the merges. `Reassembly` does both at unchanged width: further copies of split channels take the places of channels
that are merged into others or dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Channel j becomes counts[j] adjacent copies of x_j / counts[j]; QLLM calls this channel disassembly.

    The width becomes I' = counts.sum(). `fold_in` repeats columns, so the copies add up to x_j; `fold_out` repeats rows and
    divides them.

    Args:
        counts: [I], integers, every entry at least 1.
    """

    counts: Tensor
    exact: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.counts).repeat_interleave(self.counts.long(), dim=-1)

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w_OI.repeat_interleave(self.counts.long(), dim=1), b

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = self.forward(w_OI.T).T
        return rows, None if b is None else self.forward(b)

    def dual(self) -> Split:
        raise ValueError("a Split has no dual of its own kind: its copies add up on one side only.")

    def tile(self, copies: int) -> Split:
        return Split(self.counts.repeat(copies))


@dataclass(frozen=True, eq=False)
class Reassembly:
    """Some channels leave and copies of other channels take their places, so the width stays I.

    Each leaving channel is averaged into another channel, or dropped. A channel copied n times is divided by n + 1; a channel
    with n others averaged in becomes the mean of all n + 1. A channel has at most one of these three roles: leaving,
    averaged into, copied.

    `fold_in` copies columns and adds the columns of merged channels. It undoes `forward` only if merged channels are equal
    and dropped channels zero, so `exact` is False.

    Args:
        size: I, the number of channels.
        slot: [E] integers, the leaving channels, each once.
        into: [E], the channel into which each is averaged; its own number if it is dropped.
        copied: [E], the channel whose copy takes each place.
    """

    size: int
    slot: Tensor
    into: Tensor
    copied: Tensor
    exact: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        slot, merged = self.slot.long(), self._merged()
        y = x.index_add(-1, self.into[merged].long(), x[..., slot[merged]]) / self.shares().to(x.dtype)
        return y.index_copy(-1, slot, y[..., self.copied.long()])

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        slot, merged = self.slot.long(), self._merged()
        added = w_OI.index_add(1, self.into[merged].long(), w_OI[:, slot[merged]])
        return added.index_copy(1, slot, w_OI[:, self.copied.long()]), b

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.forward(w_OI.T).T, None if b is None else self.forward(b)

    def dual(self) -> Reassembly:
        raise ValueError("a Reassembly has no dual: it is not invertible.")

    def tile(self, copies: int) -> Reassembly:
        starts = torch.arange(copies, device=self.slot.device)[:, None] * self.size
        slot, into, copied = ((starts + each.long()).flatten() for each in (self.slot, self.into, self.copied))
        return Reassembly(copies * self.size, slot, into, copied)

    def shares(self) -> Tensor:
        """[I]: the divisor of each channel: the number of its copies, or of the channels averaged in it, else 1."""
        others = torch.cat([self.copied.long(), self.into[self._merged()].long()])
        return 1 + others.bincount(minlength=self.size)

    def _merged(self) -> Tensor:
        return self.into != self.slot
