"""What a grid is, and the parameters that place it on a granule.

A grid is a finite set of numbers in a normal position; parameters move it onto the values of one granule. Codes are
unsigned integers below ``2 ** bits``, always, so that one packing serves all grids; what a code means is the grid's.

Laws, run for every grid by ``tests/laws/test_numerics.py``: codes are a fixed point, ``encode(decode(c)) == c``; the error
of a fitted grid does not grow with its bits; ``fake(x, p) == decode(encode(x, p), p)`` exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

OF_NOTHING = 2.0**-100
"""Scale of a granule of zeros, before it is stored. Any would restore them; one that is next to nothing does not move the
scales of its neighbours where scales are themselves quantized together, and is far from underflow in a product."""


class Affine(NamedTuple):
    """``value = scale * (level - zero)``. scale ``[G, 1]`` floating, zero ``[G, 1]`` floating or None for no zero point."""

    scale: Tensor
    zero: Tensor | None = None


class Lut(NamedTuple):
    """``value = values[code]``. values ``[G, 2**bits]`` floating, rising along each row."""

    values: Tensor


class Bases(NamedTuple):
    """``value = sum_k +-alpha_k + offset``. alpha ``[G, bits]`` floating, offset ``[G, 1]`` floating or None for none."""

    alpha: Tensor
    offset: Tensor | None = None


Params = Affine | Lut | Bases
"""Parameters of a grid; every tensor in it has the leading axis G."""


@dataclass(frozen=True)
class Field:
    """One tensor of a grid's parameters as it is stored: ``width`` numbers a granule.

    Args:
        name: of the tensor, in ``Params`` and on disk.
        width: numbers for each granule.
        bits: width of a code where the numbers are codes (an integer zero point), None where they are floating.
        floored: a number that vanished in storage is lifted to the smallest that is kept: scales, which divide.
    """

    name: str
    width: int = 1
    bits: int | None = None
    floored: bool = False


@runtime_checkable
class Grid(Protocol):
    """Codes and values of one set of numbers. Frozen, comparable, hashable. ``params`` are of its ``kind``."""

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    kind: ClassVar[Any]
    """The type of its parameters: Affine, Lut or Bases."""

    @property
    def fields(self) -> tuple[Field, ...]:
        """What of its parameters is stored, in their order; what is absent (None) has no field."""
        ...

    def encode(self, x_GK: Tensor, params: Any) -> Tensor:
        """Codes (uint8) of the nearest grid values."""
        ...

    def decode(self, codes_GK: Tensor, params: Any) -> Tensor:
        """Values of codes, in the dtype of the parameters."""
        ...


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """``value``, to the last bit, with the gradient of ``source`` of the same shape, which must be finite to have one."""
    if not source.requires_grad:
        return value
    return value.detach() + (source - source.detach())


def arity(grid: Grid) -> int:
    """How many neighbours of a granule are coded together; 1 where a grid has no attribute ``arity``."""
    return getattr(grid, "arity", 1)


@runtime_checkable
class RangeGrid(Grid, Protocol):
    """A grid that a range ``[lo, hi]`` places."""

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Affine:
        """Parameters under which the grid covers ``[lo, hi]`` and represents zero. Differentiable in both ends."""
        ...

    def fake(self, x_GK: Tensor, params: Affine) -> Tensor:
        """``decode(encode(x))`` with a gradient: straight through the rounding to x, true to the parameters."""
        ...
