"""LUT-GEMM's format (nuQmm): weights are sums of signed bases, which a look-up kernel multiplies without decoding."""

from lowbit.numerics import Alternating, BinaryCoded, PerChannel, PerGroup, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears
from lowbit.solve import Gptq, Nearest
from lowbit.steps import Solve


@method("lut-gemm", family="weight-only", paper="arXiv:2206.09557")
def lut_gemm(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    rounds: int = 15,
    offset: bool = False,
    second_order: bool = False,
    activation_bits: int | None = None,
) -> Recipe:
    """Binary-coded weights: each is a sum of signed bases of its group, fitted greedily and then by alternating rounds.

    * bits: bases in each group, 16 bits each.
    * group_size: weights that share bases; None: one set for each output channel.
    * rounds: of alternating fits of bases and signs; 0: greedy only.
    * offset: one more base in each group that is added to all its weights, so that the grid need not be symmetric.
    * second_order: choose codes column by column on calibration text, each error moved onto later columns, as in gptq; the
      fits then know which channels matter.
    * activation_bits: also quantize each linear's input, per token, symmetric.

    No data is needed without ``second_order``. Bases are exact least squares from several starts; the authors' code takes steps of conjugate gradients
    from the greedy start, and its weight error is larger. Where one channel holds most of the energy of an input, neither
    knows it, and chance decides which loses less there; ``second_order`` reads inputs and loses less than a tenth.
    """
    spec = Spec(BinaryCoded(bits, offset), PerChannel() if group_size is None else PerGroup(group_size))
    return Recipe.blockwise(
        name="lut-gemm",
        scheme=linears(spec, activation(activation_bits)),
        steps=(Solve(Gptq(Alternating(rounds)) if second_order else Nearest(Alternating(rounds))),),
    )
