"""NF4: the base on which QLoRA trains adapters, with sixteen levels at the quantiles of a normal distribution."""

from typing import Literal

from lowbit.numerics import DYNAMIC_MAP, FP4, NF4, Flat, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears
from lowbit.solve import Nearest
from lowbit.steps import Solve


@method("nf4", family="weight-only", paper="arXiv:2305.14314")
def nf4(
    block: int = 64,
    *,
    levels: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = False,
    activation_bits: int | None = None,
) -> Recipe:
    """Every block of the flattened weight takes the nearest of 16 levels, scaled by its largest magnitude; no data.

    * block: consecutive elements that share a scale, across row borders as in bitsandbytes, which defines the codes.
    * levels: "nf4", or "fp4", the floating table of bitsandbytes.
    * double_quant: store the scales in 8 bits (mean subtracted, bitsandbytes' dynamic map, blocks of 256).
    * activation_bits: also quantize each linear's input, per token, symmetric.
    """
    second = Spec(DYNAMIC_MAP, Flat(256), scale_dtype="float32") if double_quant else None
    return Recipe.blockwise(
        name="nf4",
        scheme=linears(
            Spec(NF4 if levels == "nf4" else FP4, Flat(block), second, "float32", double_quant),
            activation(activation_bits),
        ),
        steps=(Solve(Nearest(encode_before_storing=True)),),
    )
