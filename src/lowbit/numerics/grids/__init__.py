"""Grids: the numbers of a format. :mod:`base` is their contract; each family has a file."""

from lowbit.numerics.grids.base import (
    Affine,
    Bases,
    Field,
    Grid,
    Lut,
    Offset,
    Params,
    RangeGrid,
    arity,
    straight_through,
)
from lowbit.numerics.grids.binary import BinaryCoded
from lowbit.numerics.grids.blocks import Minimum, SignedScale, Unsigned
from lowbit.numerics.grids.codebook import Codebook
from lowbit.numerics.grids.int import Int
from lowbit.numerics.grids.levels import DYNAMIC_MAP, FLINT4, FP4, NF4, Float, Normal, Table, powers_of_two
from lowbit.numerics.grids.outlier_victim import OutlierVictim

__all__ = [
    "DYNAMIC_MAP",
    "FLINT4",
    "FP4",
    "NF4",
    "Affine",
    "Bases",
    "BinaryCoded",
    "Codebook",
    "Field",
    "Float",
    "Grid",
    "Int",
    "Lut",
    "Minimum",
    "Normal",
    "Offset",
    "OutlierVictim",
    "Params",
    "RangeGrid",
    "SignedScale",
    "Table",
    "Unsigned",
    "arity",
    "powers_of_two",
    "straight_through",
]
