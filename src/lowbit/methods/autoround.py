"""AutoRound (SignRound): learns how every weight is rounded, block by block, from the sign of the gradient."""

from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import BlockMSE, Learn, Rounding, Solve, TokenMSE


@method("autoround", family="weight-only", paper="arXiv:2309.05516")
def autoround(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    symmetric: bool = False,
    activation_bits: int | None = None,
    steps: int = 200,
    batch: int = 8,
    lr: float | None = None,
    by_token: bool = False,
    amp: bool | None = None,
) -> Recipe:
    """Rounding offsets and ranges learned by signed gradient descent on the error of the block's output.

    * symmetric: no zero point.
    * activation_bits: also quantize each linear's input, per token, symmetric.
    * steps: gradient steps for each block, rounded up to whole passes over the calibration windows.
    * batch: windows in each step.
    * lr: learning rate of offsets and ranges, falling linearly to zero; None: 1 / steps, as published.
    * by_token: errors of each token are relative to its own size, so that tokens with massive activations count as others do;
      published is the plain mean.
    * amp: products in bfloat16 while learning; None: as the recipe's compute says.

    The parameters after the best pass are kept; the authors' code keeps those of the best single step.
    """
    objective = TokenMSE() if by_token else BlockMSE()
    learn = Learn((Rounding(lr or 1 / max(1, steps)),), objective, batch=batch, amp=amp, steps=steps, descent="sign")
    scheme = linears(weight(bits, group_size, symmetric=symmetric), activation(activation_bits))
    return Recipe.blockwise(name="autoround", scheme=scheme, steps=(learn, Solve(Nearest())))
