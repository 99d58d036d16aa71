"""LLM.int8(): one scale a row and one a token, and the few input channels that hold outliers multiplied in floating point."""

from math import inf
from typing import Literal

from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Nearest, ReachingColumns
from lowbit.steps import Solve


@method("llm-int8", family="weight-activation", paper="arXiv:2208.07339")
def llm_int8(
    bits: int = 8, *, threshold: float = 6.0, outlier_weight: Literal["dequantized", "original"] = "dequantized"
) -> Recipe:
    """Vector-wise integers, without the input channels that reach a threshold in the call at hand: these stay floating.

    bits: of weights (per channel) and of each linear's input (per token), both symmetric. threshold: channels in which any
    token of a call has this magnitude are taken out of the integer product; elements over it are in no token's range.
    0 takes none out, as in bitsandbytes; a tiny one takes out every channel.
    outlier_weight: what such channels multiply. "dequantized": the integers, decoded, as bitsandbytes does; needs no data.
    "original": the weight in float16, the paper's formula. It is stored beside the integers for the channels that reach the
    threshold on the calibration text (16 bits a weight of theirs, counted), and these are floating in every call; one
    that only a later input lifts over the threshold multiplies the decoded integers. Storing all of them would take 24 bits.

    Results depend on which tokens share a call: a channel is taken out for all of them or for none. Scales of rows are
    float16, where bitsandbytes has float32.
    """
    threshold = 0.0 if threshold == inf else threshold
    kept = ReachingColumns(threshold) if outlier_weight == "original" and threshold else None
    return Recipe.blockwise(
        name="llm-int8",
        scheme=linears(weight(bits, None, symmetric=True), activation(bits, threshold=threshold)),
        steps=(Solve(Nearest(outliers=kept)),),
    )
