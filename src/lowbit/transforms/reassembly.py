"""Splitting outlier channels into several and merging similar ones: the pair behind channel reassembly.

Splitting is exact and grows the width; merging brings the width back and is exact only where the merged channels are
equal, which is why it is chosen by a search and marked `exact = False`. `Reassembly` does both at once, in place: the
further copies of split channels move into the places of channels that were merged into others or dropped. It is stored
in three numbers for each channel that moved, where `Split` and `Merge` store one for every channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Channel j becomes counts[j] adjacent copies of x_j / counts[j].

    counts: [I], integers, every entry at least 1. I' = counts.sum(). `fold_in` repeats columns, so the copies add up to
    x_j again; `fold_out` repeats rows and divides them. QLLM (arXiv 2310.08041) calls it channel disassembly.
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
    """Some channels give up their places to further copies of others: `Split`, then `Merge`, at an unchanged width.

    size: I, the number of channels. slot: [E] integers, the channels that leave, each once. into: [E], the channel with
    which each is averaged, itself where it is dropped. copied: [E], the channel of which a further copy takes the place.
    No channel that leaves is one that another is averaged with, or copied, and none of those is both. A channel copied n
    times is divided by n + 1, and one with n others averaged in becomes the mean of n + 1. QLLM (arXiv 2310.08041) calls
    it channel reassembly.

    `fold_in` copies columns and adds those of merged channels, so it undoes `forward` where merged channels carry equal
    values and dropped ones none (`exact` is False).
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
        """[I]: by what each channel is divided: its copies, or the channels averaged in it; 1 for all others."""
        others = torch.cat([self.copied.long(), self.into[self._merged()].long()])
        return 1 + others.bincount(minlength=self.size)

    def _merged(self) -> Tensor:
        return self.into != self.slot
