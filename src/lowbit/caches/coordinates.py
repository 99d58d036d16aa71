"""Coordinates in which the channels of a head are quantized: shifted, scaled, rotated.

A key ``k`` is stored as ``((k - shift) / scale) @ rotation``. Scores need no key restored:
``q . k = ((q * scale) @ rotation) . stored + q . shift``, and the mixture of values goes back once for each query.

Shapes: B sequence, H key-value head, T token, D channel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.transforms import Rotate


@dataclass(frozen=True, eq=False)
class Coordinates:
    """An invertible affine map of each head's channels, computed in float32.

    Args:
        rotation: orthogonal, ``[D, D]`` or ``[H, D, D]``.
        scale: positive, ``[H, 1, D]``.
        shift: ``[H, 1, D]``, or ``[B, H, 1, D]`` where it is each sequence's own.
    """

    rotation: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def forward(self, x_BHTD: Tensor) -> Tensor:
        """Tokens in these coordinates, float32."""
        x = x_BHTD.float()
        x = x if self.shift is None else x - self.shift
        x = x if self.scale is None else x / self.scale
        return x if self.rotation is None else x @ self.rotation

    def inverse(self, x_BHTD: Tensor) -> Tensor:
        """Tokens back from them, float32."""
        x = x_BHTD if self.rotation is None else x_BHTD @ self.rotation.mT
        x = x if self.scale is None else x * self.scale
        return x if self.shift is None else x + self.shift

    def to(self, device: torch.device) -> Coordinates:
        """On ``device``."""
        return Coordinates(*(None if t is None else t.to(device) for t in (self.rotation, self.scale, self.shift)))

    def select(self, index: Tensor) -> Coordinates:
        """For the sequences ``index``."""
        if self.shift is None or self.shift.dim() == 3:
            return self
        return replace(self, shift=self.shift.index_select(0, index.to(self.shift.device)))

    @property
    def nbytes(self) -> int:
        """Bytes of what belongs to the sequences themselves."""
        return 0 if self.shift is None or self.shift.dim() == 3 else self.shift.nbytes


@lru_cache
def hadamard(dim: int) -> Tensor:
    """The rotation of every head of ``dim`` channels: a Hadamard matrix with random signs, always the same, float32."""
    with torch.inference_mode(False):
        return Rotate.hadamard(dim, seed=0).q.float()
