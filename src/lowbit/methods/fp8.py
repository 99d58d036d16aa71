"""FP8: weights and activations in the two 8-bit floating formats that processors support."""

from typing import Literal

from lowbit.modules import ActSpec
from lowbit.numerics import Float, MinMax, PerChannel, PerGroup, PerTensor, PerToken, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import linears
from lowbit.solve import Nearest
from lowbit.steps import SetActivationRange, Solve

_FORMATS = {"E4M3": Float(4, 3, "fn"), "E5M2": Float(5, 2, "ieee")}


@method("fp8", family="weight-activation", paper="arXiv:2209.05433")
def fp8(
    group_size: int | None = None,
    *,
    weight_format: Literal["E4M3", "E5M2"] = "E4M3",
    activations: Literal["none", "token", "tensor", "static"] = "token",
    activation_format: Literal["E4M3", "E5M2"] = "E4M3",
) -> Recipe:
    """OCP's E4M3 (largest 448) or E5M2 (largest 57344), scaled so that the largest magnitude meets the largest number.

    * group_size: of weights; None: one scale for each output channel.
    * weight_format: E4M3 or E5M2.
    * activations: scales of each linear's input. "none": not quantized. "token" and "tensor": found at run time, for each
      token or for a whole call. "static": one calibrated scale.
    * activation_format: E4M3 or E5M2.
    """
    act = None
    if activations != "none":
        grain = PerToken() if activations == "token" else PerTensor()
        act = ActSpec(Spec(_FORMATS[activation_format], grain, scale_dtype="float32"), static=activations == "static")
    grain = PerChannel() if group_size is None else PerGroup(group_size)
    return Recipe.blockwise(
        name="fp8",
        scheme=linears(Spec(_FORMATS[weight_format], grain, scale_dtype="float32"), act),
        steps=(*((SetActivationRange(),) if activations == "static" else ()), Solve(Nearest(MinMax()))),
        feed="fp" if activations == "static" else "quant",
    )
