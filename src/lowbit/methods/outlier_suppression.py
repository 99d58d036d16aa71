"""Outlier Suppression: take the gain out of the norms, which amplifies outliers, and clip what few tokens stretch."""

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
    """Gamma migration, then one static range for each activation that clips whole tokens, searched and refined by gradients.

    bits, group_size: of weights, symmetric, per channel where group_size is None. activation_bits: of each linear's input,
    one static range with a zero point. attention_bits: of queries, keys, values and probabilities (the authors: as many as
    activations have), static too. migrate: move the gain of every norm into the weights behind it.
    span: share of the tokens up to which may be clipped; None: 0.1 from 8 bits on, 0.3 from 6, else 0.9, as the authors have it.
    windows: how many calibration windows the clipping is searched on (None: all).
    epochs, lr: of the gradient stage, which learns steps and zero points; lr is relative to the step. epochs=0: none.

    Differs from the authors' code, which is for BERT, where its walk is block by block: one share of the tokens for each block
    instead of the model, against the block's output instead of the model's, with weights rounded. Quantiles are over all
    calibration tokens, not averaged over batches; Adam has a constant, relative rate, and the best epoch is kept. Norms whose
    output is also the residual stream (OPT-350m, some BLOOMs) keep their gain, which the report says. Ranges of attention's
    operands are their extremes, which are neither clipped nor learned; probabilities reach from 0 to 1.
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
