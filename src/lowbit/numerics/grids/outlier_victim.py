"""Outlier-victim pairs: two neighbours share their bits, and an outlier uses its neighbour's (OliVe, arXiv:2304.07493).

The values 2i and 2i + 1 of a granule are coded as a pair. A pair is stored in one of two ways:

* two normal values, each an index ``k`` in two's complement, ``|k| <= 2**(b-1) - 1``, into rising levels;
* an outlier and its victim. The victim's value is zero and its code is the identifier ``100..0``, which no normal value
  has. Its partner is then read as an *abfloat*: a sign and an index ``i = 1 .. 2**(b-1) - 1`` for
  ``+-2**(i >> m) * (1 + (i mod 2**m) / 2**m)`` times the next power of two above the normal levels, with ``m = b - 3``
  mantissa bits and 2 exponent bits. Index 0 is left out, so that no abfloat looks like the identifier.

A format of b bits thus reaches ``2**4`` times as far as its integers without an index or a side term, and every pair stays
in its place: with 4 bits a pair is a byte. A value can only be decoded with its partner, so solvers that round one column
after another cannot use this grid.

With 8 bits the paper and its code differ: the paper says E4M3, the code computes E2M5. This grid follows the code.

Shapes: G granule, K element within a granule (even), P pair.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lowbit.numerics.grids.base import OF_NOTHING, Affine, Field
from lowbit.numerics.serialize import serializable

_NORMAL = {"int": None, "flint": (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)}
"""Magnitudes of the normal values; None: evenly spaced, as many as the bits allow. Flint is from ANT (arXiv:2208.14286)."""


@serializable
@dataclass(frozen=True)
class OutlierVictim:
    """Normal values of ``bits`` around zero, and outliers up to 16 times as large that zero their neighbour.

    The range that places the grid is that of its normal values; values outside are coded as outliers.

    Args:
        bits: 3 to 8.
        normal: ``"int"``, evenly spaced, or ``"flint"``, 0 1 2 3 4 6 8 16 with both signs (4 bits).
        keep: which of two neighbours outside the normal values stays. ``"first"``, as published: outliers are never clipped,
            and of two outliers the even one stays. ``"nearest"``: the choice with the least error of the pair, where
            clipping both to normal values is also a choice. The stored format is the same.
    """

    bits: int = 4
    normal: Literal["int", "flint"] = "int"
    keep: Literal["first", "nearest"] = "first"
    kind: ClassVar[Any] = Affine
    arity: ClassVar[int] = 2

    def __post_init__(self):
        if not 3 <= self.bits <= 8:
            raise ValueError(f"outlier-victim pairs have 3 to 8 bits for each value, found {self.bits}")
        if self.normal not in _NORMAL:
            raise ValueError(f"normal values are 'int' or 'flint', found {self.normal!r}")
        if self.normal != "int" and self.bits != 4:
            raise ValueError(f"flint has 4 bits, found {self.bits}: use normal='int'")
        if self.keep not in ("first", "nearest"):
            raise ValueError(f"keep is 'first' or 'nearest', found {self.keep!r}")

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field("scale", floored=True),)

    @property
    def identifier(self) -> int:
        """The code of a victim."""
        return 2 ** (self.bits - 1)

    @property
    def max_normal(self) -> float:
        """The largest normal value, in units of the scale."""
        return _magnitudes(self.bits, self.normal)[0][-1]

    def levels(self) -> tuple[float, ...]:
        """Every value, rising, in units of the scale: ``2**(bits+1) - 3`` of them."""
        return _levels(self.bits, self.normal).values

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Affine:
        scale = torch.maximum(lo_G1.abs(), hi_G1.abs()) / self.max_normal
        return Affine(torch.where(scale > 0, scale, torch.full_like(scale, OF_NOTHING)))

    def encode(self, x_GK: Tensor, params: Affine) -> Tensor:
        rank, _, victim = self._paired(x_GK / params.scale)
        return self._codes(rank, victim)

    def decode(self, codes_GK: Tensor, params: Affine) -> Tensor:
        at = self._with_victim_bit(codes_GK)
        table = torch.tensor(_levels(self.bits, self.normal).decoded, dtype=params.scale.dtype, device=codes_GK.device)
        return _at(table, at) * params.scale

    def fake(self, x_GK: Tensor, params: Affine) -> Tensor:
        v = x_GK / params.scale
        rank, outlier, victim = self._paired(v.detach())
        levels = torch.tensor(self.levels(), dtype=v.dtype, device=v.device)
        nearest = _at(levels, rank).masked_fill_(victim, 0)
        if not v.requires_grad:
            return nearest * params.scale
        inside = torch.where(
            outlier, v.clamp(levels[0].item(), levels[-1].item()), v.clamp(-self.max_normal, self.max_normal)
        )
        inside = inside.masked_fill(victim, 0)  # a victim is not stored, so it gets no gradient
        return (nearest + (inside - inside.detach())) * params.scale  # the bracket is exactly zero, with a gradient

    def ranks(self, codes_GK: Tensor) -> Tensor:
        """The rank of each code's value among :meth:`levels`, uint8: a code that is readable alone. 3 to 7 bits."""
        assert self.bits < 8, "a byte cannot number 509 levels"
        table = torch.tensor(_levels(self.bits, self.normal).ranks, dtype=torch.uint8, device=codes_GK.device)
        return _at(table, self._with_victim_bit(codes_GK))

    def codes(self, rank_GK: Tensor) -> Tensor:
        """The inverse of :meth:`ranks`: a zero next to an outlier is its victim."""
        return self._codes(rank_GK, _partner(self._is_outlier(rank_GK)))

    def _paired(self, v_GK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For values in units of the scale: rank of the level, whether it is an outlier, whether it is a victim (bool)."""
        grid = _levels(self.bits, self.normal)
        # All midpoints between levels are multiples of a half, so a table of half steps gives the nearest level; a tie goes
        # to the lower. Searching the midpoints takes ten times as long. NaN goes to the top.
        end = len(grid.cells) // 2
        cell = (v_GK * 2).ceil_().clamp_(-end, end).nan_to_num_(nan=end).add_(end)
        rank = _at(torch.tensor(grid.cells, dtype=torch.int32, device=v_GK.device), cell.int())
        outlier = self._is_outlier(rank)
        even, odd = _pairs(outlier).unbind(-1)
        if self.keep == "first":
            kept = torch.stack([even, odd & ~even], -1).view(v_GK.shape)
            return rank, kept, _partner(kept)
        levels = torch.tensor(grid.values, dtype=v_GK.dtype, device=v_GK.device)
        normal = rank.clamp(grid.outliers, len(grid.values) - 1 - grid.outliers)
        lost = (v_GK - _at(levels, normal)).square_()
        saved = lost - (v_GK - _at(levels, rank)).square_()  # zero except for outliers
        of_even, of_odd = _pairs(saved + _partner(lost - v_GK.square())).unbind(-1)
        even &= (of_even > 0) & ~(odd & (of_odd > of_even))
        odd &= (of_odd > 0) & ~(even & (of_even >= of_odd))
        kept = torch.stack([even, odd], -1).view(v_GK.shape)
        return torch.where(kept, rank, normal), kept, _partner(kept)

    def _with_victim_bit(self, codes_GK: Tensor) -> Tensor:
        """Codes with one further bit, set where the partner is a victim; int32."""
        return codes_GK.int() + (_partner(codes_GK == self.identifier).int() << self.bits)

    def _is_outlier(self, rank: Tensor) -> Tensor:
        grid = _levels(self.bits, self.normal)
        return (rank < grid.outliers) | (rank >= len(grid.values) - grid.outliers)

    def _codes(self, rank: Tensor, victim: Tensor) -> Tensor:
        codes = torch.tensor(_levels(self.bits, self.normal).codes, dtype=torch.uint8, device=rank.device)
        return _at(codes, rank.int()).masked_fill_(victim, self.identifier)


class _Levels(NamedTuple):
    """The values of a grid and the tables that code them.

    Args:
        values: rising.
        codes: of each value.
        outliers: number of outliers at each end of the values.
        cells: rank of the nearest value for each half step ``(n / 2 - 1 / 2, n / 2]``, n = 0 in the middle.
        decoded: value of each code, first for codes whose partner is a normal value (and for victims), then for codes whose
            partner is a victim.
        ranks: rank of each of these among the values.
    """

    values: tuple[float, ...]
    codes: tuple[int, ...]
    outliers: int
    cells: tuple[int, ...]
    decoded: tuple[float, ...]
    ranks: tuple[int, ...]


def _magnitudes(bits: int, normal: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Magnitudes of the normal values, from zero, and of the outliers, both rising."""
    inside, mantissa = _NORMAL[normal] or tuple(float(k) for k in range(2 ** (bits - 1))), bits - 3
    above = 2.0 ** math.ceil(math.log2(inside[-1]))
    parts = (divmod(i, 2**mantissa) for i in range(1, 2 ** (bits - 1)))
    return inside, tuple(above * 2.0**exponent * (1 + m / 2**mantissa) for exponent, m in parts)


@lru_cache
def _levels(bits: int, normal: str) -> _Levels:
    inside, outside = _magnitudes(bits, normal)
    sign = 2 ** (bits - 1)
    of_code = {k % (2 * sign): (inside[k] if k >= 0 else -inside[-k]) for k in range(1 - sign, sign)}
    of_abfloat = {i + negative * sign: (-v if negative else v) for i, v in enumerate(outside, 1) for negative in (0, 1)}
    first = [of_code.get(code, 0.0) for code in range(2 * sign)]
    second = [of_abfloat.get(code, 0.0) for code in range(2 * sign)]
    coded = sorted((value, code) for each in (of_code, of_abfloat) for code, value in each.items())
    values = tuple(value for value, _ in coded)
    decoded, end = (*first, *second), int(2 * values[-1])
    midpoints = [(a + b) / 2 for a, b in pairwise(values)]
    cells = tuple(bisect_left(midpoints, n / 2) for n in range(-end, end + 1))
    codes = tuple(code for _, code in coded)
    return _Levels(values, codes, len(outside), cells, decoded, tuple(map(values.index, decoded)))


def _at(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``, index int32: several times faster than torch's own."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def _pairs(x_GK: Tensor) -> Tensor:
    """``[G, P, 2]``, a view.

    Raises:
        ValueError: a value without a partner.
    """
    if x_GK.shape[-1] % 2:
        raise ValueError(f"outlier-victim pairs need an even number of values, found {x_GK.shape[-1]}")
    return x_GK.unflatten(-1, (-1, 2))


def _partner(x_GK: Tensor) -> Tensor:
    """Each value replaced by its partner's."""
    return _pairs(x_GK).flip(-1).view(x_GK.shape)
