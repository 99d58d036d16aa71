"""OmniQuant: learns the clipping of weights and the equivalent transform of activations, block by block."""

from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, attention, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import BlockMSE, ClipShares, Learn, Midpoint, Scales, Shifts, Smooth, Solve, TokenMSE

EDGES = ("norm_*", "v_o", "q_k")


@method("omniquant", family="weight-activation", paper="arXiv:2308.13137")
def omniquant(
    bits: int = 4,
    group_size: int | None = None,
    *,
    activation_bits: int | None = None,
    attention_bits: int | None = None,
    transform: bool | None = None,
    epochs: int = 20,
    alpha: float = 0.5,
    clip_lr: float = 1e-2,
    transform_lr: float = 5e-3,
    augment: bool = False,
    by_token: bool = False,
    batch: int = 1,
    amp: bool | None = None,
) -> Recipe:
    """Learned weight clipping and, with quantized activations, a learned equivalent transformation.

    * activation_bits: also quantize each linear's input, per token, with a zero point.
    * attention_bits: also quantize queries, keys and values, per token of each head (the authors: as activation_bits).
    * transform: learn scales and shifts at the edges; None: only for quantized activations, as in the authors' LLaMA scripts.
    * epochs: passes over the calibration windows (the authors: 20; 40 at 2 bits).
    * alpha: of the smoothing from which scales start.
    * clip_lr, transform_lr: learning rates.
    * augment: add the authors' second loss term.
    * by_token: errors of each token are relative to its own size; published is the plain mean.
    * batch: windows in each gradient step.
    * amp: products in bfloat16 while learning; None: as the recipe's compute says.
    """
    moves = transform if transform is not None else activation_bits is not None and activation_bits < 16
    objective = TokenMSE(augment) if by_token else BlockMSE(augment)
    transforms = (Shifts(("norm_*", "v_o"), Midpoint(), transform_lr), Scales(EDGES, Smooth(alpha), transform_lr))
    return Recipe.blockwise(
        name="omniquant",
        scheme=linears(
            weight(bits, group_size),
            activation(activation_bits, symmetric=False),
            attention(attention_bits, symmetric=False, probabilities=None),
        ),
        steps=(
            Learn((*(transforms if moves else ()), ClipShares(lr=clip_lr)), objective, epochs, batch, amp),
            Solve(Nearest()),
        ),
    )
