"""LLM.int8(): one scale for each row and each token; input channels with outliers are multiplied in floating point."""

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
    """Vector-wise integers; input channels that reach a threshold in a call are multiplied in floating point.

    * bits: of weights (per channel) and of each linear's input (per token), both symmetric.
    * threshold: channels in which any token of a call has this magnitude leave the integer product, and ranges ignore elements
      over it. 0: no channel, as in bitsandbytes; a tiny threshold takes out every channel.
    * outlier_weight: the factor of such channels. "dequantized": the decoded integers, as in bitsandbytes; needs no data.
      "original": the weight in float16, as in the paper. It is stored in addition for channels that reach the threshold on the
      calibration text (16 bits for each of their weights, counted), and these are floating in every call. Channels that reach
      it only later multiply the decoded integers. To store all columns would take 24 bits for each weight.

    Results depend on the tokens that share a call, because a channel is taken out for all of them or for none. Scales of rows
    are float16; bitsandbytes has float32.
    """
    threshold = 0.0 if threshold == inf else threshold
    kept = ReachingColumns(threshold) if outlier_weight == "original" and threshold else None
    return Recipe.blockwise(
        name="llm-int8",
        scheme=linears(weight(bits, None, symmetric=True), activation(bits, threshold=threshold)),
        steps=(Solve(Nearest(outliers=kept)),),
    )
