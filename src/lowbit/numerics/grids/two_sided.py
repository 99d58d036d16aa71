"""Tables whose negative and positive levels have scales of their own (NF3 of BitDistiller, arXiv:2402.10631)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.numerics.grids.base import OF_NOTHING, Field, Sides
from lowbit.numerics.grids.levels import _looked_up, _rank
from lowbit.numerics.serialize import serializable


@serializable
@dataclass(frozen=True)
class TwoSided:
    """Given levels; the negative ones are in units of one scale, the others of another. A code is an index.

    Both ends of a range are then met, however skewed it is, and zero stays zero. The nearest level is found on the value's own
    side. A value between the largest negative level and zero is in units of the negative scale.

    Args:
        values: 3 to 256 rising numbers, among them zero, and numbers of both signs.
    """

    values: tuple[float, ...]
    kind: ClassVar[Any] = Sides

    def __post_init__(self):
        object.__setattr__(self, "values", tuple(self.values))
        rising = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        if not 3 <= len(self.values) <= 256 or not rising or 0.0 not in self.values:
            raise ValueError(f"a two-sided table has 3 to 256 rising values and zero, found {self.values}")
        if not self.values[0] < 0 < self.values[-1] or max(map(abs, self.values)) > torch.finfo(torch.float32).max:
            raise ValueError(f"a two-sided table has finite values on both sides of zero, found {self.values}")

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field("negative", floored=True), Field("positive", floored=True))

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Sides:
        negative, positive = lo_G1.clamp(max=0) / self.values[0], hi_G1.clamp(min=0) / self.values[-1]
        nothing = torch.full_like(negative, OF_NOTHING)
        return Sides(torch.where(negative > 0, negative, nothing), torch.where(positive > 0, positive, nothing))

    def encode(self, x_GK: Tensor, params: Sides) -> Tensor:
        _, midpoints = self._levels(params.negative)
        return _rank(x_GK / self._scale(x_GK < 0, params), midpoints).to(torch.uint8)

    def decode(self, codes_GK: Tensor, params: Sides) -> Tensor:
        levels, _ = self._levels(params.negative)
        value = _looked_up(levels, codes_GK.int())
        return value * self._scale(value < 0, params)

    def fake(self, x_GK: Tensor, params: Sides) -> Tensor:
        levels, midpoints = self._levels(params.negative)
        scale = self._scale(x_GK < 0, params)
        v = x_GK / scale
        inside = v.clamp(self.values[0], self.values[-1])
        nearest = _looked_up(levels, _rank(v.detach(), midpoints))
        return (nearest + (inside - inside.detach())) * scale  # the bracket is exactly zero, with a gradient

    def _levels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The levels, and the midpoints between neighbours."""
        values = torch.tensor(self.values, dtype=like.dtype, device=like.device)
        return values, (values[1:] + values[:-1]) / 2

    @staticmethod
    def _scale(negative_GK: Tensor, params: Sides) -> Tensor:
        return torch.where(negative_GK, params.negative, params.positive)


NF3 = TwoSided(
    (
        -1.0,
        -0.5350227355957031,
        -0.2469314038753510,
        0.0,
        0.1833375245332718,
        0.3819939494132996,
        0.6229856610298157,
        1.0,
    )
)
"""NormalFloat 3 (BitDistiller): the quantiles of a normal distribution as in NF4, with 3 negative and 4 positive levels."""
