"""Outlier Suppression+: centres every channel, then shrinks channels beyond a searched threshold."""

from typing import Literal

from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import Midpoint, Search, Set, SetActivationRange, Solve, Thresholds


@method("outlier-suppression-plus", family="weight-activation", paper="arXiv:2304.09145", alias="osplus")
def outlier_suppression_plus(
    bits: int = 6,
    activation_bits: int = 6,
    group_size: int | None = None,
    *,
    symmetric: bool = False,
    per: Literal["token", "tensor"] = "token",
    static: bool = False,
    shift: bool = True,
    scale: bool = True,
    grid: int = 100,
    smallest: float = 0.1,
    windows: int | None = 1,
    by: Literal["judge", "linears"] = "judge",
    in_turn: bool = True,
) -> Recipe:
    """Shifts z = (max + min) / 2 and scales s = max(1, max|x| / t) of channels, with t searched; "osplus" for short.

    * bits, group_size: of weights; group_size=None: per channel.
    * activation_bits: of each linear's input.
    * symmetric: no zero points, in weights and activations.
    * per: one activation range for each "token", or one for the "tensor".
    * static: the tensor's range is calibrated.
    * shift: centre channels if the norm has a bias to hold the shift; RMSNorms have none, and none is added.
    * scale: search scales.
    * grid, smallest: t falls from the largest magnitude to smallest in at least grid steps; the authors have smallest=1.0 for
      OPT and BLOOM, 0.1 for LLaMA.
    * windows: calibration windows that judge the search; None: all.
    * by: the error that is searched: "judge", of the module around the linears (attention, MLP), or "linears", of their outputs.
    * in_turn: search each edge with the linears before it quantized; false: in the block as it was.

    Authors: symmetric=true, per="tensor", static=true at 8 bits on OPT; the defaults are those on LLaMA at 6 and 4 bits.
    Differs from their code: ranges of channels cover all calibration windows, not one; shifts are measured before the block is
    quantized; t ends at a tenth of the largest magnitude if that is under smallest; attention is judged after its output
    projection, gate and up after down; ReLU's fc1 -> fc2 is searched too. 1/s is folded into up before quantization; per row or
    group this gives their codes, up to the rounding of scales. Norms whose output is the residual stream are left alone.
    """
    shifts = (Set(Midpoint(), ("norm_*",)),) if shift else ()
    scales = (Search(Thresholds(grid, smallest), ("norm_*", "*up_down*"), windows, by, in_turn),) if scale else ()
    ranges = (SetActivationRange(),) if static else ()
    return Recipe.blockwise(
        name="outlier-suppression-plus",
        scheme=linears(
            weight(bits, group_size, symmetric=symmetric),
            activation(activation_bits, symmetric=symmetric, per=per, static=static),
        ),
        steps=(*shifts, *scales, *ranges, Solve(Nearest())),
    )
