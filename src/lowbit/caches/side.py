"""The keys, or the values, of one layer: the first tokens, packed ones, and recent ones.

Shapes: B sequence, H key-value head, T token, D channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.caches.coordinates import Coordinates, hadamard
from lowbit.caches.rotary import turned
from lowbit.caches.tokens import PackedTokens
from lowbit.caches.window import Window
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
        self.waiting: Window | None = None

    @property
    def heads(self) -> int:
        """Key-value heads."""
        return self.shape[1]

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences, heads and channels."""
        assert self.waiting is not None
        batch, heads, _, dim = self.waiting.buffer.shape
        return batch, heads, dim

    @property
    def in_blocks(self) -> bool:
        """Whether neighbouring tokens share ranges."""
        grain = None if self.spec is None else self.spec.granularity
        return isinstance(grain, Block) and grain.rows > 1

    @property
    def turns(self) -> bool:
        """Whether tokens are packed before the rotary embedding."""
        return self._frequencies is not None

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
        return 0 if self.waiting is None else self.waiting.length

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held for the sequences, spare room counted."""
        held = [self.kept, self.packed, self.waiting and self.waiting.buffer]
        return sum(part.nbytes for part in held if part is not None) + self.coordinates.nbytes

    def begin(self, like_BHTD: Tensor) -> None:
        """Takes over sequences, heads, channels, dtype and device of the tokens to come."""
        self.waiting = Window(like_BHTD)

    def append(self, x_BHTD: Tensor) -> None:
        """Adds tokens; they wait until :meth:`settle`."""
        assert self.waiting is not None
        self.waiting.append(x_BHTD)

    def settle(self, padding: int = 0) -> None:
        """Packs the tokens that leave the window.

        Args:
            padding: leading positions that some sequence of the batch does not use; they stay as they came, with the sinks.
        """
        if self.spec is None or self.waiting is None:
            return
        missing = self.missing(padding)
        if missing:
            first = self.waiting.tokens[:, :, :missing].clone()
            self.kept = first if self.kept is None else torch.cat([self.kept, first], 2)
            self.waiting.drop(first.shape[2])
        leaving = self.leaving(self.waiting.length)
        if not leaving:
            return
        tokens = self.waiting.tokens
        if self.packed is None:
            self.packed = PackedTokens(self.spec, tokens)
            self._place(self._unturned(tokens))
        self.packed.append(self.coordinates.forward(self._unturned(tokens[:, :, :leaving])))
        self.waiting.drop(leaving)

    def missing(self, padding: int = 0) -> int:
        """Tokens that are yet to be kept, before any is packed."""
        return 0 if self.packed_length else max(0, self.sink + padding - self.kept_length)

    def leaving(self, waiting: int) -> int:
        """Tokens that leave a window in which ``waiting`` wait."""
        if self.spec is None:
            return 0
        if self.in_blocks:
            return waiting // self.recent * self.recent
        return max(0, waiting - self.recent)

    def _unturned(self, x_BHTD: Tensor) -> Tensor:
        """Waiting tokens from the first on, without the rotary embedding where they are packed so."""
        return self.turned(x_BHTD, self.kept_length + self.packed_length, -1)

    def turned(self, x_BHTD: Tensor, start: int, by: int) -> Tensor:
        """Tokens number ``start`` and following, turned by their number times ``by`` where they are packed before the rotary
        embedding."""
        return x_BHTD if self._frequencies is None else turned(x_BHTD, self._frequencies, start, by)

    def _place(self, waiting_BHTD: Tensor) -> None:
        """Fixes the coordinates, once there are tokens."""
        self.coordinates = self.placed(waiting_BHTD)
        self._centred = self._rotated = False

    def placed(self, waiting_BHTD: Tensor) -> Coordinates:
        """The coordinates of a sequence for which the tokens ``waiting_BHTD`` wait when its first ones are packed."""
        coordinates = self.coordinates
        if self._centred:
            coordinates = replace(coordinates, shift=waiting_BHTD.float().mean(2, keepdim=True))
        if self._rotated:
            rotation = hadamard(waiting_BHTD.shape[-1]).to(waiting_BHTD.device)
            coordinates = replace(coordinates, rotation=rotation)
        return coordinates

    def read(
        self,
        dtype: torch.dtype,
        start: int = 0,
        end: int | None = None,
        tiles: Callable[[int, int], Tensor] | None = None,
    ) -> Tensor:
        """The tokens from ``start`` to ``end``, ``[B, H, T, D]``; ``tiles``: see :meth:`PackedTokens.decode`."""
        assert self.waiting is not None
        end = self.length if end is None else end
        parts, before = [], 0
        for part, count in (
            (self.kept, self.kept_length),
            (None, self.packed_length),
            (self.waiting.tokens, self.waiting_length),
        ):
            first, last = max(start - before, 0), min(end - before, count)
            if first < last:
                parts.append((self.decoded(first, last, tiles) if part is None else part[:, :, first:last]).to(dtype))
            before += count
        if not parts:
            return self.waiting.tokens[:, :, :0].to(dtype)
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts, 2)

    def decoded(
        self, start: int = 0, end: int | None = None, tiles: Callable[[int, int], Tensor] | None = None
    ) -> Tensor:
        """Packed tokens, float32."""
        assert self.packed is not None
        end = self.packed.length if end is None else end
        x = self.coordinates.inverse(self.packed.decode(start, end, tiles))
        return self.turned(x, self.kept_length + start, 1)

    def crop(self, count: int) -> None:
        """Drops the last ``count`` tokens."""
        for part, held in ((self.waiting, self.waiting_length), (self.packed, self.packed_length)):
            taken = min(count, held)
            count -= taken
            if part is not None and taken:
                part.crop(taken)
        if count and self.kept is not None:
            self.kept = self.kept[:, :, :-count].clone()

    def to(self, device: torch.device) -> None:
        """Moves all tokens to ``device``."""
        self.kept = None if self.kept is None else self.kept.to(device)
        for part, names in ((self.waiting, ("buffer",)), (self.packed, ("codes", "scale", "zero"))):
            for name in names if part is not None else ():
                tensor = getattr(part, name)
                setattr(part, name, None if tensor is None else tensor.to(device))
        self.coordinates = self.coordinates.to(device)

    def select(self, index: Tensor) -> None:
        """Keeps the sequences ``index``, in this order; one may come several times."""
        if self.kept is not None:
            self.kept = self.kept.index_select(0, index.to(self.kept.device))
        for part in (self.waiting, self.packed):
            if part is not None:
                part.select(index)
        self.coordinates = self.coordinates.select(index)
