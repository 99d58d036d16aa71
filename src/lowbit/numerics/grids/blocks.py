"""Integers as the blocks of llama.cpp hold them: the scale may have either sign or be zero, or a minimum is stored.

* :class:`SignedScale`: ``scale * (code - 2**(bits-1))``. The extreme of a granule takes the lowest code, whatever its sign, so
  every code is used (llama.cpp's types of kind 0: Q4_0, Q6_K, ...).
* :class:`Minimum`: ``scale * code - minimum``, two stored numbers for each granule (kind 1: Q4_1, Q4_K, ...).
* :class:`Unsigned`: ``scale * code``, for values that are not negative: scales and minima of the second level.

A scale of zero is a number like others here: all values of its granule are zero, or the negative minimum. ``Int`` has neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.numerics.grids.base import Affine, Field, Offset
from lowbit.numerics.grids.int import round_ste
from lowbit.numerics.serialize import serializable


@dataclass(frozen=True)
class _Evenly:
    """What the three have in common.

    Args:
        bits: 1 to 8.
    """

    bits: int

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"an integer grid has 1 to 8 bits, found {self.bits}")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1


def _divided(x_GK: Tensor, scale_G1: Tensor) -> Tensor:
    """``x / scale``, and zero where the scale is zero."""
    none = scale_G1 == 0
    return (x_GK / torch.where(none, 1, scale_G1)).masked_fill(none, 0)


@serializable
@dataclass(frozen=True)
class SignedScale(_Evenly):
    """``scale * (code - 2**(bits-1))`` with a scale of either sign or zero."""

    kind: ClassVar[Any] = Affine

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field("scale"),)

    @property
    def middle(self) -> int:
        """The code of zero."""
        return 2 ** (self.bits - 1)

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Affine:
        return Affine(torch.where(lo_G1.abs() >= hi_G1.abs(), lo_G1, hi_G1) / -self.middle)

    def encode(self, x_GK: Tensor, params: Affine) -> Tensor:
        return self._level(x_GK, params, torch.round).to(torch.uint8)

    def _level(self, x_GK: Tensor, params: Affine, rounding: Any) -> Tensor:
        return (rounding(_divided(x_GK, params.scale)) + self.middle).clamp(0, self.max_code)

    def decode(self, codes_GK: Tensor, params: Affine) -> Tensor:
        return (codes_GK.to(params.scale.dtype) - self.middle) * params.scale

    def fake(self, x_GK: Tensor, params: Affine) -> Tensor:
        return (self._level(x_GK, params, round_ste) - self.middle) * params.scale


@serializable
@dataclass(frozen=True)
class Minimum(_Evenly):
    """``scale * code - minimum``; the range contains zero, so the minimum is not negative."""

    kind: ClassVar[Any] = Offset

    @property
    def fields(self) -> tuple[Field, ...]:
        return Field("scale"), Field("minimum")

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Offset:
        lo, hi = lo_G1.clamp(max=0), hi_G1.clamp(min=0)
        return Offset((hi - lo) / self.max_code, -lo)

    def encode(self, x_GK: Tensor, params: Offset) -> Tensor:
        return self._level(x_GK, params, torch.round).to(torch.uint8)

    def _level(self, x_GK: Tensor, params: Offset, rounding: Any) -> Tensor:
        return rounding(_divided(x_GK + params.minimum, params.scale)).clamp(0, self.max_code)

    def decode(self, codes_GK: Tensor, params: Offset) -> Tensor:
        return codes_GK.to(params.scale.dtype) * params.scale - params.minimum

    def fake(self, x_GK: Tensor, params: Offset) -> Tensor:
        return self._level(x_GK, params, round_ste) * params.scale - params.minimum


@serializable
@dataclass(frozen=True)
class Unsigned(_Evenly):
    """``scale * code``: numbers from zero up; negative ones become zero."""

    kind: ClassVar[Any] = Affine

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field("scale"),)

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Affine:
        return Affine(hi_G1.clamp(min=0) / self.max_code)

    def encode(self, x_GK: Tensor, params: Affine) -> Tensor:
        return self._level(x_GK, params, torch.round).to(torch.uint8)

    def _level(self, x_GK: Tensor, params: Affine, rounding: Any) -> Tensor:
        return rounding(_divided(x_GK, params.scale)).clamp(0, self.max_code)

    def decode(self, codes_GK: Tensor, params: Affine) -> Tensor:
        return codes_GK.to(params.scale.dtype) * params.scale

    def fake(self, x_GK: Tensor, params: Affine) -> Tensor:
        return self._level(x_GK, params, round_ste) * params.scale
