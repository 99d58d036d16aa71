"""What a grid is, and the parameters that place it on a granule.

A grid is a finite set of numbers in a normal position; parameters move it onto the values of one granule. Codes are
unsigned integers below ``2 ** bits``, always, so that one packing serves all grids; what a code means is the grid's.

Laws, run for every grid by ``tests/laws/test_numerics.py``: codes are a fixed point, ``encode(decode(c)) == c``; the error
of a fitted grid does not grow with its bits; ``fake(x, p) == decode(encode(x, p), p)`` exactly.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Affine(NamedTuple):
    """``value = scale * (level - zero)``. scale ``[G, 1]`` floating, zero ``[G, 1]`` floating or None for no zero point."""

    scale: Tensor
    zero: Tensor | None = None


Params = Affine
"""Parameters of a grid; every tensor in it has the leading axis G. Further kinds (tables, bases) join here."""


@runtime_checkable
class Grid(Protocol):
    """Codes and values of one set of numbers. Frozen, comparable, hashable."""

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    @property
    def zero_bits(self) -> int | None:
        """Width of a stored zero point: 0 where there is none, None where it is stored as a floating number."""
        ...

    def encode(self, x_GK: Tensor, params: Params) -> Tensor:
        """Codes (uint8) of the nearest grid values."""
        ...

    def decode(self, codes_GK: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of ``params.scale``."""
        ...


@runtime_checkable
class RangeGrid(Grid, Protocol):
    """A grid that a range ``[lo, hi]`` places."""

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Params:
        """Parameters under which the grid covers ``[lo, hi]`` and represents zero. Differentiable in both ends."""
        ...

    def fake(self, x_GK: Tensor, params: Params) -> Tensor:
        """``decode(encode(x))`` with a gradient: straight through the rounding to x, true to the parameters."""
        ...
