"""Outlier Suppression+: centre every channel, then shrink those beyond a threshold that is searched by the output's error."""

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

    bits, group_size: of weights, per channel where group_size is None. activation_bits: of each linear's input. symmetric: no
    zero points in either. per: one activation range a token or one a tensor; static: the tensor's is fixed beforehand.
    shift: centre channels where the norm has a bias to hold it; RMSNorms have none, and none is added. scale: search scales.
    grid, smallest: t falls from the largest magnitude to smallest in grid steps or more; the authors have smallest=1.0
    for OPT and BLOOM, and 0.1 for LLaMA. windows: how many calibration windows the search is judged on (None: all).
    by: "judge", the error of what the linears are part of (attention, MLP), or "linears", that of their own outputs.
    in_turn: search each edge behind the quantized linears before it, or (false) in the block as it was.

    Authors: symmetric=true, per="tensor", static=true at 8 bits on OPT; the defaults are those on LLaMA at 6 and 4 bits.
    Differs from their code: channels' ranges are of all calibration windows, and not of one, and shifts are measured on the
    block before anything in it is quantized; where a tenth of the largest magnitude is under smallest, t ends there; attention
    is judged behind its output projection, gate and up behind down; ReLU's fc1 -> fc2 is searched too. 1/s is folded into up
    before it is quantized: with a scale for each row or group that gives the codes they have, who divide its scales
    afterwards, up to the rounding of stored scales. Norms whose output is the residual stream are left alone.
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
