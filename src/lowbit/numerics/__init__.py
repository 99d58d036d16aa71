"""Number formats: grids, granularities, fits and quantized tensors. Imports torch only; knows no model and no method."""

from lowbit.numerics.fit import Clipped, ClipSearch, Fit, MinMax, Percentile, extremes
from lowbit.numerics.granularity import Block, Granularity, PerChannel, PerCluster, PerGroup, PerTensor, PerToken
from lowbit.numerics.grids import NF4, Affine, Float, Grid, Int, Params, RangeGrid, Table
from lowbit.numerics.qtensor import QTensor, quantize, stored_bits
from lowbit.numerics.spec import Spec, fake_quantize, fit_params
from lowbit.numerics.statistics import AbsMax, AbsSum, Gram, Range, Samples, Statistic, mean_abs
from lowbit.numerics.tagged import from_dict, nearest, tagged, to_dict

__all__ = [
    "NF4",
    "AbsMax",
    "AbsSum",
    "Affine",
    "Block",
    "ClipSearch",
    "Clipped",
    "Fit",
    "Float",
    "Gram",
    "Granularity",
    "Grid",
    "Int",
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
    "Spec",
    "Statistic",
    "Table",
    "extremes",
    "fake_quantize",
    "fit_params",
    "from_dict",
    "mean_abs",
    "nearest",
    "quantize",
    "stored_bits",
    "tagged",
    "to_dict",
]
