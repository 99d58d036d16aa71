"""AWQ: scales up the channels that meet large activations, then clips; a search finds both, without gradients."""

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
    """Activation-aware scales s = mean|x|^r, with r searched on the output error, and searched clipping.

    * symmetric: no zero point.
    * activation_bits: also quantize each linear's input, per token, symmetric.
    * grid: number of exponents r to try.
    * scale: run the search for scales.
    * clip: run the search for clipping.
    * windows: calibration windows that judge the scales; None: all, as in the authors' code.

    Differs from the authors' code: an exponent that a part of the windows shows to be worse is not tried on the others; clipping
    is judged on all tokens, by their Gram matrix, not on 512.
    """
    scales = (Search(MeanAbsPower(grid), ("norm_*", "v_o", "*up_down*"), windows),) if scale else ()
    clips = (SearchClip(),) if clip else ()
    return Recipe.blockwise(
        name="awq",
        scheme=linears(weight(bits, group_size, symmetric=symmetric), activation(activation_bits)),
        steps=(*scales, *clips, Solve(Nearest())),
        feed="fp",
    )
