"""AWQ: scale up the channels that meet large activations, then clip; both found by search, nothing by gradients."""

from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import MeanAbsPower, Search, SearchClip, Solve


@method("awq", family="weight-only", paper="arXiv:2306.00978")
def awq(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    symmetric: bool = False,
    activation_bits: int | None = None,
    grid: int = 20,
    scale: bool = True,
    clip: bool = True,
    windows: int | None = None,
) -> Recipe:
    """Activation-aware scales s = mean|x|^r with r searched on the output error, and searched clipping.

    symmetric: no zero point. activation_bits: also quantize each linear's input, per token, symmetric.
    grid: how many exponents r are tried. scale, clip: which of the two searches to run.
    windows: how many calibration windows the scale search judges by (None: all, as the authors' code).
    """
    scales = (Search(MeanAbsPower(grid), ("norm_*", "v_o", "*up_down*"), windows),) if scale else ()
    clips = (SearchClip(),) if clip else ()
    return Recipe.blockwise(
        name="awq",
        scheme=linears(weight(bits, group_size, symmetric=symmetric), activation(activation_bits)),
        steps=(*scales, *clips, Solve(Nearest())),
        feed="fp",
    )
