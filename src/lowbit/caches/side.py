"""The keys, or the values, of one layer: the first tokens, packed ones, and recent ones.

Shapes: B sequence, H key-value head, T token, D channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.caches.coordinates import Coordinates, hadamard
from lowbit.caches.rotary import turned
from lowbit.caches.tokens import PackedTokens
from lowbit.numerics import Block, Spec


class Side:
    """Tokens in order: ``kept`` (sinks) as they came, ``packed``, and ``waiting`` (recent) as they came.

    Args:
        spec: the format of packed tokens; None: nothing is packed.
        recent: tokens that wait.
        sink: the sequence's first tokens, which stay.
        coordinates: in which tokens are packed.
        rotated: rotate heads by :func:`~lowbit.caches.coordinates.hadamard`.
        centred: take each sequence's channel means, over the first tokens, off before.
        frequencies: of the rotary embedding, before which tokens are packed; None: they are packed as they came.
    """

    def __init__(
        self,
        spec: Spec | None,
        recent: int,
        sink: int,
        coordinates: Coordinates,
        *,
        rotated: bool = False,
        centred: bool = False,
        frequencies: Tensor | None = None,
    ):
        self.spec, self.recent, self.sink = spec, recent, sink
        self.coordinates = coordinates
        self._rotated, self._centred, self._frequencies = rotated, centred, frequencies
        self.kept: Tensor | None = None
        self.packed: PackedTokens | None = None
        self.waiting: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return self.kept_length + self.packed_length + self.waiting_length

    @property
    def kept_length(self) -> int:
        return 0 if self.kept is None else self.kept.shape[2]

    @property
    def packed_length(self) -> int:
        return 0 if self.packed is None else self.packed.length

    @property
    def waiting_length(self) -> int:
        return 0 if self.waiting is None else self.waiting.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held for the sequences."""
        held = sum(part.nbytes for part in (self.kept, self.packed, self.waiting) if part is not None)
        return held + self.coordinates.nbytes

    def append(self, x_BHTD: Tensor) -> None:
        """Adds tokens; they wait until :meth:`settle`."""
        self.waiting = x_BHTD if self.waiting is None else torch.cat([self.waiting, x_BHTD], 2)

    def settle(self, padding: int = 0) -> None:
        """Packs the tokens that leave the window.

        Args:
            padding: leading positions that some sequence of the batch does not use; they stay as they came, with the sinks.
        """
        if self.spec is None or self.waiting is None:
            return
        missing = 0 if self.packed_length else max(0, self.sink + padding - self.kept_length)
        if missing:
            first, self.waiting = self.waiting[:, :, :missing], self.waiting[:, :, missing:]
            self.kept = first.clone() if self.kept is None else torch.cat([self.kept, first], 2)
        leaving = self._leaving(self.waiting_length)
        if not leaving:
            self.waiting = self.waiting.contiguous()
            return
        if self.packed is None:
            self.packed = PackedTokens(self.spec, self.waiting)
            self._place(self._turned(self.waiting, -1))
        self.packed.append(self.coordinates.forward(self._turned(self.waiting[:, :, :leaving], -1)))
        self.waiting = self.waiting[:, :, leaving:].clone()  # a view would hold the memory of what left

    def _turned(self, x_BHTD: Tensor, by: int) -> Tensor:
        """Tokens behind those that are kept and, for ``by`` -1, packed; without the rotary embedding, or with it again."""
        if self._frequencies is None:
            return x_BHTD
        start = self.kept_length + (self.packed_length if by < 0 else 0)
        return turned(x_BHTD, self._frequencies, start, by)

    def _leaving(self, waiting: int) -> int:
        assert self.spec is not None
        if isinstance(self.spec.granularity, Block) and self.spec.granularity.rows > 1:
            return waiting // self.recent * self.recent
        return max(0, waiting - self.recent)

    def _place(self, waiting_BHTD: Tensor) -> None:
        """Fixes the coordinates, once there are tokens."""
        if self._centred:
            self.coordinates = self.coordinates.shifted(waiting_BHTD.float().mean(2, keepdim=True))
        if self._rotated:
            rotation = hadamard(waiting_BHTD.shape[-1]).to(waiting_BHTD.device)
            self.coordinates = Coordinates(rotation, self.coordinates.scale, self.coordinates.shift)
        self._centred = self._rotated = False

    def read(self, dtype: torch.dtype) -> Tensor:
        """All tokens, ``[B, H, T, D]``."""
        parts = [self.kept, self.decoded(), self.waiting]
        present = [part.to(dtype) for part in parts if part is not None and part.shape[2]]
        if present:
            return present[0] if len(present) == 1 else torch.cat(present, 2)
        assert self.waiting is not None
        return self.waiting

    def decoded(self) -> Tensor | None:
        """The packed tokens, float32; None where none are."""
        if self.packed is None or not self.packed.length:
            return None
        return self._turned(self.coordinates.inverse(self.packed.decode()), 1)

    def crop(self, count: int) -> None:
        """Drops the last ``count`` tokens."""
        for name in ("waiting", "packed", "kept"):
            part = getattr(self, name)
            taken = min(count, getattr(self, f"{name}_length"))
            if part is not None and taken:
                count -= taken
                if name == "packed":
                    part.crop(taken)
                else:
                    setattr(self, name, part[:, :, : part.shape[2] - taken].clone())

    def select(self, index: Tensor) -> None:
        """Keeps the sequences ``index``, in this order; one may come several times."""
        for name in ("kept", "waiting"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part.index_select(0, index.to(part.device)))
        if self.packed is not None:
            self.packed.select(index)
        self.coordinates = self.coordinates.select(index)
