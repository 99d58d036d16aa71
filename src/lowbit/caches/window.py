"""Tokens as they came, in a buffer with room at its end.

Shapes: B sequence, H key-value head, T token, D channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 16
"""Tokens of room at least."""


class Window:
    """The newest tokens ``[B, H, T, D]``: added at the end, taken off at either end.

    Args:
        like: whose sequences, heads, channels, dtype and device the tokens have.

    Attributes:
        buffer: ``[B, H, room, D]``; the tokens are those from ``start``, ``length`` of them.
    """

    def __init__(self, like: Tensor):
        self.buffer = _empty(like, _LEAST)
        self.start = self.length = 0

    @property
    def tokens(self) -> Tensor:
        """The tokens, a view."""
        return self.buffer[:, :, self.start : self.start + self.length]

    def append(self, x_BHTD: Tensor) -> None:
        """Adds tokens."""
        count = x_BHTD.shape[2]
        self.reserve(count)
        end = self.start + self.length
        self.buffer[:, :, end : end + count] = x_BHTD
        self.length += count

    def reserve(self, count: int) -> None:
        """Makes room for ``count`` more tokens."""
        room = self.buffer.shape[2]
        if self.start + self.length + count <= room:
            return
        if self.length + count > room or self.start < self.length:  # else moving to the front is cheap and lasts
            room = max(_LEAST, self.length + count + min(self.length, 128))
        self._move(room)

    def drop(self, count: int) -> None:
        """Takes off the first tokens, and gives memory back where much is free."""
        self.start += count
        self.length -= count
        if self.buffer.shape[2] > 2 * (self.length + _LEAST):
            self._move(self.length + _LEAST)

    def crop(self, count: int) -> None:
        """Takes off the last tokens."""
        self.length -= count

    def select(self, index: Tensor) -> None:
        """Keeps the sequences ``index``, in this order."""
        self.buffer = self.buffer.index_select(0, index.to(self.buffer.device))

    def _move(self, room: int) -> None:
        moved = _empty(self.buffer, room)
        moved[:, :, : self.length] = self.tokens
        self.buffer, self.start = moved, 0


def _empty(like: Tensor, room: int) -> Tensor:
    with torch.inference_mode(False):  # so that it can be written in any mode later
        return torch.empty(*like.shape[:2], room, like.shape[-1], dtype=like.dtype, device=like.device)
