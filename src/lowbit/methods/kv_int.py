"""Caches of integers with a range for each token, or one for all tokens, without a window."""

from typing import Literal

from lowbit.caches import Extremes
from lowbit.modules import KVSpec
from lowbit.numerics import Int, PerGroup, PerTensor, PerToken, Spec
from lowbit.recipes import FitCache, Recipe, method
from lowbit.scheme import Scheme


@method("kv-int", family="kv-cache", paper="arXiv:2211.10438")
def kv_int(
    bits: int = 8,
    group_size: int | None = None,
    recent: int = 0,
    *,
    symmetric: bool = True,
    sink: int = 0,
    rope: Literal["after", "before"] = "after",
    ranges: Literal["dynamic", "static"] = "dynamic",
    heads: Literal["own", "shared"] = "own",
) -> Recipe:
    """Every token of every head has a range of its own, as engines run INT8 caches; no data unless ranges are static.

    * bits: 1 to 8.
    * group_size: channels of a range; None: all of a head.
    * recent, sink: the newest and the first tokens, which stay as they are.
    * symmetric: no zero points, as in both papers.
    * rope: keys after the rotary embedding (SmoothQuant), or before it (LLM-QAT, arXiv:2305.17888).
    * ranges: dynamic: each token has its own; static: one for all tokens, from the extremes of calibration text.
    * heads: whether each head has ranges of its own, or all share them.

    SmoothQuant's INT8 cache has ranges=static and heads=shared: a range for each tensor. LLM-QAT's has rope=before and
    heads=shared: a range for each whole token.
    """
    if group_size is not None and (ranges == "static" or heads == "shared"):
        raise ValueError("group_size divides a token's head; leave it out with static ranges and with shared heads")
    grain = PerTensor() if ranges == "static" else PerToken() if group_size is None else PerGroup(group_size)
    spec = Spec(Int(bits, symmetric, zero="int" if symmetric else "real"), grain)
    form = KVSpec(spec, spec, recent=recent, sink=sink, before_rope=rope == "before", shared_heads=heads == "shared")
    return Recipe("kv-int", Scheme(kv=form), (FitCache(Extremes()),) if form.calibrated else ())
