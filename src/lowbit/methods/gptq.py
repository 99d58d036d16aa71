"""GPTQ: rounds column by column; the later columns absorb each error."""

from typing import Literal

from lowbit.numerics import ClipSearch, MinMax
from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Gptq
from lowbit.steps import Solve


@method("gptq", family="weight-only", paper="arXiv:2210.17323")
def gptq(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    symmetric: bool = False,
    activation_bits: int | None = None,
    act_order: bool = False,
    static_groups: bool = False,
    order: Literal["none", "act", "group"] | None = None,
    damp: float = 0.01,
    mse: bool = True,
    true_sequential: bool = False,
    greedy_passes: int = 0,
    refits: int | None = None,
    asymmetric: float = 0.0,
) -> Recipe:
    """Second-order rounding with the inverse Hessian of the layer's output error (Cholesky form).

    * symmetric: no zero point.
    * activation_bits: also quantize each linear's input, per token, symmetric.
    * order: of rounding the columns. "none": as stored. "act": by falling Hessian diagonal. "group", the default: the same
      inside groups and between them, which costs nothing at run time.
    * act_order: true means order="act".
    * static_groups: place all grids before the first column is rounded.
    * damp: share of the mean Hessian diagonal that is added to the diagonal.
    * mse: shrink each range to the least error, weighed by the Hessian diagonal.
    * true_sequential: calibrate each stage of a block with the earlier stages quantized.
    * greedy_passes: rounds of coordinate descent over the codes afterwards (QuIP's, in a form that never raises the error).
    * refits: rounds that fit scales to codes in closed form and codes to scales; None: 2 for llama.cpp's K types, else 0.
    * asymmetric: 0 to 1, how much each weight corrects the changes of its input by earlier quantized blocks (GPTAQ).

    The authors' defaults are order="none" and mse=false. The defaults here cost no bits and no time at run time, and halve
    SmolLM2's perplexity at 3 bits in groups of 64.
    """
    if act_order and order not in (None, "act"):
        raise ValueError(f"act_order=true is order='act'; found order={order!r} as well")
    solver = Gptq(
        fit=ClipSearch() if mse else MinMax(),
        order=order or ("act" if act_order else "group"),
        static_groups=static_groups,
        damp=damp,
        greedy_passes=greedy_passes,
        refits=refits,
        asymmetric=asymmetric,
    )
    scheme = linears(weight(bits, group_size, symmetric=symmetric), activation(activation_bits))
    return Recipe.blockwise("gptq", scheme, (Solve(solver, true_sequential),))
