"""Outlier Suppression: moves the gains out of the norms, where they amplify outliers, and clips ranges that few tokens need."""

from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, attention, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import (
    Learn,
    LearnedStepSizes,
    OwnGain,
    SearchActivationRange,
    Set,
    SetAttentionRange,
    Solve,
)


@method("outlier-suppression", family="weight-activation", paper="arXiv:2209.13325")
def outlier_suppression(
    bits: int = 8,
    activation_bits: int = 8,
    group_size: int | None = None,
    *,
    attention_bits: int | None = None,
    migrate: bool = True,
    span: float | None = None,
    windows: int | None = None,
    epochs: int = 3,
    lr: float = 5e-3,
) -> Recipe:
    """Gamma migration, then static activation ranges that clip whole tokens, found by search and refined by gradients.

    * bits, group_size: of weights, symmetric; group_size=None: per channel.
    * activation_bits: of each linear's input, which gets one static range with a zero point.
    * attention_bits: of queries, keys, values and probabilities, static too (the authors: the same as activation_bits).
    * migrate: move the gain of every norm into the weights after it.
    * span: largest share of the tokens to clip; None, as in the authors' code: 0.1 from 8 bits, 0.3 from 6 bits, else 0.9.
    * windows: calibration windows that judge the clipping; None: all.
    * epochs: of the gradient stage, which learns steps and zero points; 0: none.
    * lr: learning rate of that stage, relative to the step.

    The authors' code is for BERT; the walk here is block by block. One share of tokens is searched for each block, not for the
    model, on the block's output with rounded weights. Quantiles cover all calibration tokens, not averages of batches. Adam
    has a constant, relative rate, and the best epoch is kept. Norms whose output is the residual stream (OPT-350m, some
    BLOOMs) keep their gain; the report says so. Attention's operands range over their extremes, probabilities from 0 to 1.
    """
    share = span if span is not None else 0.1 if activation_bits >= 8 else 0.3 if activation_bits >= 6 else 0.9
    stored = weight(bits, group_size, symmetric=True)
    inputs = activation(activation_bits, symmetric=False, per="tensor", static=True)
    operands = attention(attention_bits, symmetric=False, static=True)
    return Recipe.blockwise(
        name="outlier-suppression",
        scheme=linears(stored, inputs, operands),
        steps=(
            *((Set(OwnGain(), ("norm_*",)),) if migrate else ()),
            *((SetAttentionRange(),) if operands else ()),
            SearchActivationRange(share, windows=windows),
            *((Learn((LearnedStepSizes(lr),), epochs=epochs),) if epochs else ()),
            Solve(Nearest()),
        ),
    )
