"""The contract of a grid, and the parameters that place it on a granule.

A grid is a finite set of numbers in a normal position; parameters move it onto the values of one granule. Codes are
always unsigned integers below ``2 ** bits``, so that one packing serves all grids; the grid gives them their meaning.

Laws, checked for every grid by ``tests/laws/test_numerics.py``: codes are a fixed point, ``encode(decode(c)) == c``; the
error of a fitted grid does not grow with its bits; ``fake(x, p) == decode(encode(x, p), p)`` exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

OF_NOTHING = 2.0**-100
"""Scale of a granule of zeros, before it is stored. Any scale restores them. This one is too small to change its
neighbours where scales are quantized together, and large enough not to underflow in a product."""


class Affine(NamedTuple):
    """``value = scale * (level - zero)``. scale ``[G, 1]`` floating, zero ``[G, 1]`` floating or None for no zero point."""

    scale: Tensor
    zero: Tensor | None = None


class Lut(NamedTuple):
    """``value = values[code]``. values ``[G, 2**bits]`` floating, rising along each row."""

    values: Tensor


class Bases(NamedTuple):
    """``value = sum_k +-alpha_k + offset``. alpha ``[G, bits]`` floating, offset ``[G, 1]`` floating or None for no offset."""

    alpha: Tensor
    offset: Tensor | None = None


class Sides(NamedTuple):
    """``value = level * negative`` for negative levels, ``level * positive`` for the others. Both ``[G, 1]`` floating."""

    negative: Tensor
    positive: Tensor


class NoParams(NamedTuple):
    """The values follow from the codes alone."""


class Offset(NamedTuple):
    """``value = scale * code - minimum``. scale ``[G, 1]`` floating, minimum ``[G, 1]`` floating."""

    scale: Tensor
    minimum: Tensor


Params = Affine | Lut | Bases | Offset | Sides | NoParams
"""Parameters of a grid; every tensor in it has the leading axis G."""


@dataclass(frozen=True)
class Field:
    """One stored tensor of a grid's parameters.

    Args:
        name: of the tensor, in ``Params`` and on disk.
        width: numbers for each granule.
        bits: width of a code if the numbers are codes (an integer zero point); None if they are floating.
        floored: raise numbers that vanish in storage to the smallest that it holds; for scales, which divide.
        signed: whether numbers that are floored may be negative.
        in_levels: they count levels of the grid, as zero points do; else they have the unit of the values.
    """

    name: str
    width: int = 1
    bits: int | None = None
    floored: bool = False
    signed: bool = False
    in_levels: bool = False


@runtime_checkable
class Grid(Protocol):
    """Codes and values of one set of numbers. Frozen, comparable, hashable. Its ``params`` have the type ``kind``."""

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    kind: ClassVar[Any]
    """The type of its parameters: Affine, Lut, Bases, Offset, Sides or NoParams."""

    @property
    def fields(self) -> tuple[Field, ...]:
        """The stored parameters, in order; a parameter that is None has no field."""
        ...

    def encode(self, x_GK: Tensor, params: Any) -> Tensor:
        """Codes (uint8) of the nearest grid values."""
        ...

    def decode(self, codes_GK: Tensor, params: Any) -> Tensor:
        """Values of codes, in the dtype of the parameters."""
        ...


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """``value``, bit for bit, with the gradient of ``source`` (same shape, finite)."""
    if not source.requires_grad:
        return value
    return value.detach() + (source - source.detach())


_FEW = 16
"""Most midpoints that are compared one by one, which is several times faster on a CPU than a search for each value."""


def rank_in_rows(x_GK: Tensor, midpoints_GM: Tensor) -> Tensor:
    """The number of each row's rising midpoints below each of its values (finite), int64 ``[G, K]``."""
    if midpoints_GM.shape[1] > _FEW or x_GK.device.type != "cpu":
        return torch.searchsorted(midpoints_GM.contiguous(), x_GK.contiguous())
    count = torch.zeros(x_GK.shape, dtype=torch.uint8)
    for midpoint_G1 in midpoints_GM.split(1, 1):
        count += x_GK > midpoint_G1
    return count.long()


def arity(grid: Grid) -> int:
    """Neighbours of a granule that ``grid`` codes together; 1 for a grid without an attribute ``arity``."""
    return getattr(grid, "arity", 1)


@runtime_checkable
class LearnableGrid(Grid, Protocol):
    """A grid that says which gradient its rounding has."""

    def fake(self, x_GK: Tensor, params: Any) -> Tensor:
        """``decode(encode(x))`` with a gradient: to x through the rounding, exact in the parameters."""
        ...


@runtime_checkable
class RangeGrid(LearnableGrid, Protocol):
    """A grid that a range ``[lo, hi]`` places. The gradient of its rounding is that of the identity."""

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Any:
        """Parameters with which the grid covers ``[lo, hi]`` and represents zero. Differentiable in both ends."""
        ...
