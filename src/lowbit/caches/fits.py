"""What finds coordinates of a layer's cache in the queries, keys and values of calibration text.

Shapes: H query head, G key-value head, R query heads that share one of them, T token, D channel of a key, E channel of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowbit.caches.coordinates import hadamard
from lowbit.caches.rotary import turned
from lowbit.numerics import serializable

Sums = dict[str, Tensor]
"""What a fit adds up over windows, by name, float64; empty before the first."""


@dataclass(frozen=True, eq=False)
class Operands:
    """What causal attention over whole windows multiplies.

    Args:
        query, key, value: float32 ``[B, H, T, D]``, ``[B, G, T, D]`` and ``[B, G, T, E]``.
        scaling: the factor of scores; None: 1 / sqrt(D).
        frequencies: of the rotary embedding, where keys are packed before it.
        sink: the first tokens of a window that the cache keeps as they are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None = None
    frequencies: Tensor | None = None
    sink: int = 0

    def as_packed(self, x_BHTD: Tensor) -> Tensor:
        """Keys, or queries, as keys are packed: without the rotary embedding of their own positions where it comes later."""
        return x_BHTD if self.frequencies is None else turned(x_BHTD, self.frequencies, 0, -1)


@runtime_checkable
class CacheFit(Protocol):
    """A frozen value: what is added up of each layer, and what follows from it."""

    @property
    def parts(self) -> frozenset[str]:
        """What it finds: buffers of :class:`~lowbit.modules.CacheCalibration`."""
        ...

    @property
    def skips_sinks(self) -> bool:
        """Whether the tokens that the cache keeps as they are do not count."""
        ...

    def observe(self, sums: Sums, seen: Operands) -> None:
        """Adds windows to ``sums``."""
        ...

    def found(self, sums: Sums, *, shared_heads: bool = False) -> dict[str, Tensor]:
        """The buffers, float32; ``shared_heads``: all heads have the same ranges.

        Raises:
            ValueError: the sums are NaN or Inf.
        """
        ...

    def nbytes(self, heads: int, key_dim: int, value_dim: int) -> int:
        """Bytes of a layer's sums."""
        ...


@serializable
@dataclass(frozen=True)
class SecondMoments:
    """Rotations from second moments (OSCAR, arXiv:2605.17757): eigenvectors, largest first, times a Hadamard matrix.

    Keys of a head are rotated by the eigenvectors of the second moment of the queries that read them, because an error of a key
    counts as those see it. Values are rotated by those of the second moment of what attention mixes from them, that is of score-weighted
    values. The Hadamard matrix then spreads what the eigenvectors have sorted evenly over the channels, which share ranges.

    Where keys are packed before the rotary embedding, queries are taken before it too, as they meet keys of their own position.
    """

    @property
    def parts(self) -> frozenset[str]:
        return frozenset({"key_rotation", "value_rotation"})

    @property
    def skips_sinks(self) -> bool:
        return False

    def observe(self, sums: Sums, seen: Operands) -> None:
        groups = seen.key.shape[1]
        mixed_BHTE = scaled_dot_product_attention(
            seen.query, seen.key, seen.value, is_causal=True, scale=seen.scaling, enable_gqa=True
        )
        for name, x_BHTD in (("key_rotation", seen.as_packed(seen.query)), ("value_rotation", mixed_BHTE)):
            x_BGND = x_BHTD.double().unflatten(1, (groups, -1)).flatten(2, 3)
            moment_GDD = (x_BGND.mT @ x_BGND).sum(0)
            sums[name] = sums[name] + moment_GDD if name in sums else moment_GDD

    def found(self, sums: Sums, *, shared_heads: bool = False) -> dict[str, Tensor]:
        return {name: _rotation(moment) for name, moment in sums.items()}

    def nbytes(self, heads: int, key_dim: int, value_dim: int) -> int:
        return 8 * heads * (key_dim**2 + value_dim**2)


@serializable
@dataclass(frozen=True)
class Extremes:
    """Ranges of keys and of values: the lowest and the highest number of each head over the calibration text, or of all heads
    where they share a range. Tokens that the cache keeps as they are do not count."""

    @property
    def parts(self) -> frozenset[str]:
        return frozenset({"key_range", "value_range"})

    @property
    def skips_sinks(self) -> bool:
        return True

    def observe(self, sums: Sums, seen: Operands) -> None:
        for name, x_BGTD in (("key_range", seen.as_packed(seen.key)), ("value_range", seen.value)):
            x_GK = x_BGTD[:, :, seen.sink :].double().transpose(0, 1).flatten(1)
            range_G2 = torch.stack(x_GK.aminmax(dim=1), 1)
            if name in sums:
                both = torch.stack([sums[name], range_G2])
                range_G2 = torch.stack([both[..., 0].amin(0), both[..., 1].amax(0)], 1)
            sums[name] = range_G2

    def found(self, sums: Sums, *, shared_heads: bool = False) -> dict[str, Tensor]:
        if not all(torch.isfinite(range_G2).all() for range_G2 in sums.values()):
            raise ValueError("keys or values of the calibration text are NaN or Inf")
        if not shared_heads:
            return {name: range_G2.float() for name, range_G2 in sums.items()}
        ends = {name: torch.stack([range_G2[:, 0].amin(), range_G2[:, 1].amax()]) for name, range_G2 in sums.items()}
        return {name: range_2.float().expand(len(sums[name]), 2) for name, range_2 in ends.items()}

    def nbytes(self, heads: int, key_dim: int, value_dim: int) -> int:
        return 8 * heads * 4


def _rotation(moment_GDD: Tensor) -> Tensor:
    if not torch.isfinite(moment_GDD).all():
        raise ValueError("queries, keys or values of the calibration text are NaN or Inf")
    vectors_GDD = torch.linalg.eigh(moment_GDD)[1].flip(-1)
    largest_G1D = vectors_GDD.gather(1, vectors_GDD.abs().argmax(1, keepdim=True))
    signed_GDD = vectors_GDD * torch.where(largest_G1D < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    return (signed_GDD @ hadamard(moment_GDD.shape[-1]).to(signed_GDD)).float()
