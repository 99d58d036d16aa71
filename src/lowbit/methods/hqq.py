"""HQQ: finds zero points by half-quadratic splitting, in seconds and without data."""

from lowbit.numerics import HalfQuadratic, Int, PerChannel, PerGroup, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears
from lowbit.solve import Nearest
from lowbit.steps import Solve


@method("hqq", family="weight-only", paper="Badri and Shaji, Half-Quadratic Quantization, Mobius Labs 2023")
def hqq(
    bits: int = 4,
    group_size: int | None = 64,
    *,
    real_zero: bool = True,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    rounds: int = 20,
    activation_bits: int | None = None,
) -> Recipe:
    """Round to nearest, with the zero point that minimizes a heavy-tailed error.

    * real_zero: store the zero point as a 16-bit number, as published; otherwise round it to a code of the weight's width.
    * p: exponent of the error.
    * beta: weight of the penalty in the first round.
    * kappa: factor by which the penalty grows in each round.
    * rounds: most rounds.
    * activation_bits: also quantize each linear's input, per token, symmetric.
    """
    grid = Int(bits, zero="real" if real_zero else "int")
    spec = Spec(grid, PerChannel() if group_size is None else PerGroup(group_size))
    return Recipe.blockwise(
        name="hqq",
        scheme=linears(spec, activation(activation_bits)),
        steps=(Solve(Nearest(HalfQuadratic(p, beta, kappa, rounds))),),
    )
