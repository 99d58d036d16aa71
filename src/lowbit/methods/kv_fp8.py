"""Caches of 8-bit floats."""

from typing import Literal

from lowbit.modules import KVSpec
from lowbit.numerics import Float, PerToken, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import Scheme


@method("kv-fp8", family="kv-cache", paper="arXiv:2209.05433")
def kv_fp8(format: Literal["E4M3", "E5M2"] = "E4M3", *, recent: int = 0, sink: int = 0) -> Recipe:
    """Keys and values as 8-bit floats, with a scale for each token of each head; no data.

    * format: of the 8 bits.
    * recent, sink: the newest and the first tokens, which stay as they are.
    """
    spec = Spec(Float(4, 3, "fn") if format == "E4M3" else Float(5, 2, "ieee"), PerToken())
    return Recipe("kv-fp8", Scheme(kv=KVSpec(spec, spec, recent=recent, sink=sink)))
