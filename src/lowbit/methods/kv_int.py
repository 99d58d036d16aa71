"""Caches of integers with a range for each token, without a window or data."""

from typing import Literal

from lowbit.modules import KVSpec
from lowbit.numerics import Int, PerGroup, PerToken, Spec
from lowbit.recipes import Recipe, method
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
) -> Recipe:
    """Every token of every head has a range of its own: SmoothQuant's INT8 cache, and LLM-QAT's below 8 bits; no data.

    * bits: 1 to 8.
    * group_size: channels of a range; None: all of a head.
    * recent, sink: the newest and the first tokens, which stay as they are.
    * symmetric: no zero points, as in both papers.
    * rope: keys after the rotary embedding (SmoothQuant), or before it (LLM-QAT, arXiv:2305.17888).
    """
    spec = Spec(
        Int(bits, symmetric, zero="int" if symmetric else "real"), PerGroup(group_size) if group_size else PerToken()
    )
    return Recipe("kv-int", Scheme(kv=KVSpec(spec, spec, recent=recent, sink=sink, before_rope=rope == "before")))
