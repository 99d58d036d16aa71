"""HQQ: zero points found by half-quadratic splitting, without any data, in seconds."""

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
    """Round to nearest with the zero point under which a heavy-tailed error is least.

    real_zero: keep the zero point as a 16-bit number, as published; otherwise it is rounded to a code, and costs bits bits.
    p: exponent of the error. beta, kappa, rounds: weight of the penalty, its growth, and how many rounds.
    activation_bits: also quantize each linear's input, per token, symmetric.
    """
    grid = Int(bits, zero="real" if real_zero else "int")
    spec = Spec(grid, PerChannel() if group_size is None else PerGroup(group_size))
    return Recipe.blockwise(
        name="hqq",
        scheme=linears(spec, activation(activation_bits)),
        steps=(Solve(Nearest(HalfQuadratic(p, beta, kappa, rounds))),),
    )
