"""Caches of 8-bit floats."""

from typing import Literal

from lowbit.caches import Extremes
from lowbit.modules import KVSpec
from lowbit.numerics import Float, PerTensor, PerToken, Spec
from lowbit.recipes import FitCache, Recipe, method
from lowbit.scheme import Scheme


@method("kv-fp8", family="kv-cache", paper="arXiv:2209.05433")
def kv_fp8(
    format: Literal["E4M3", "E5M2"] = "E4M3",
    *,
    recent: int = 0,
    sink: int = 0,
    ranges: Literal["dynamic", "static"] = "dynamic",
    heads: Literal["own", "shared"] = "own",
) -> Recipe:
    """Keys and values as 8-bit floats; no data unless ranges are static.

    * format: of the 8 bits.
    * recent, sink: the newest and the first tokens, which stay as they are.
    * ranges: dynamic: a scale for each token; static: one for all tokens, from the extremes of calibration text.
    * heads: whether each head has scales of its own, or all share them.

    vLLM's FP8 cache has E4M3, ranges=static and heads=shared, which --format compressed-tensors writes.
    """
    static = ranges == "static"
    grid = Float(4, 3, "fn") if format == "E4M3" else Float(5, 2, "ieee")
    spec = Spec(grid, PerTensor(), scale_dtype="float32") if static else Spec(grid, PerToken())
    form = KVSpec(spec, spec, recent=recent, sink=sink, shared_heads=heads == "shared")
    return Recipe("kv-fp8", Scheme(kv=form), (FitCache(Extremes()),) if static else ())
