"""Grids: the numbers of a format. :mod:`base` is their contract; each family has a file."""

from lowbit.numerics.grids.base import (
    Affine,
    Bases,
    Field,
    Grid,
    LearnableGrid,
    Lut,
    NoParams,
    Offset,
    Params,
    RangeGrid,
    Sides,
    arity,
    straight_through,
)
from lowbit.numerics.grids.binary import BinaryCoded
from lowbit.numerics.grids.blocks import Minimum, SignedScale, Unsigned
from lowbit.numerics.grids.codebook import Codebook
from lowbit.numerics.grids.int import Int
from lowbit.numerics.grids.levels import DYNAMIC_MAP, FLINT4, FP4, HALVES, NF4, Float, Normal, Table, powers_of_two
from lowbit.numerics.grids.outlier_victim import OutlierVictim
from lowbit.numerics.grids.sign import Sign
from lowbit.numerics.grids.two_sided import NF3, TwoSided

__all__ = [
    "DYNAMIC_MAP",
    "FLINT4",
    "FP4",
    "HALVES",
    "NF3",
    "NF4",
    "Affine",
    "Bases",
    "BinaryCoded",
    "Codebook",
    "Field",
    "Float",
    "Grid",
    "Int",
    "LearnableGrid",
    "Lut",
    "Minimum",
    "NoParams",
    "Normal",
    "Offset",
    "OutlierVictim",
    "Params",
    "RangeGrid",
    "Sides",
    "Sign",
    "SignedScale",
    "Table",
    "TwoSided",
    "Unsigned",
    "arity",
    "powers_of_two",
    "straight_through",
]
