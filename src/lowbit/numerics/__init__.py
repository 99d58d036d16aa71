"""Number formats: grids, granularities, fits and quantized tensors. Imports torch only; knows no model and no method."""

from lowbit.numerics.fit import Clipped, ClipSearch, Fit, MinMax, Percentile, extremes
from lowbit.numerics.granularity import Block, Flat, Granularity, PerChannel, PerCluster, PerGroup, PerTensor, PerToken
from lowbit.numerics.grids import NF4, Affine, Bases, Field, Float, Grid, Int, Lut, Params, RangeGrid, Table
from lowbit.numerics.qtensor import QTensor, quantize, stored_bits
from lowbit.numerics.side import KeptColumns, SideTerm, Sparse
from lowbit.numerics.spec import Spec, fake_quantize, fit_params, fit_raw
from lowbit.numerics.statistics import AbsMax, AbsSum, Fisher, Gram, Range, Samples, Statistic, mean_abs
from lowbit.numerics.tagged import from_dict, nearest, tagged, to_dict

__all__ = [
    "NF4",
    "AbsMax",
    "AbsSum",
    "Affine",
    "Bases",
    "Block",
    "ClipSearch",
    "Clipped",
    "Field",
    "Fisher",
    "Fit",
    "Flat",
    "Float",
    "Gram",
    "Granularity",
    "Grid",
    "Int",
    "KeptColumns",
    "Lut",
    "MinMax",
    "Params",
    "PerChannel",
    "PerCluster",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
    "QTensor",
    "Range",
    "RangeGrid",
    "Samples",
    "SideTerm",
    "Sparse",
    "Spec",
    "Statistic",
    "Table",
    "extremes",
    "fake_quantize",
    "fit_params",
    "fit_raw",
    "from_dict",
    "mean_abs",
    "nearest",
    "quantize",
    "stored_bits",
    "tagged",
    "to_dict",
]
