"""ZeroQuant: groups of weights, one range for each token, and layer-by-layer distillation from the original model."""

from lowbit.numerics import Int, PerChannel, PerGroup, RowBands, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import FormatRule, Scheme, activation
from lowbit.solve import Nearest
from lowbit.steps import AllWeights, BlockMSE, Learn, Solve


@method("zeroquant", family="weight-activation", paper="arXiv:2206.01861")
def zeroquant(
    bits: int = 8,
    activation_bits: int | None = 8,
    group_size: int | None = None,
    *,
    groups: int | None = None,
    ffn_bits: int | None = None,
    symmetric: bool = True,
    distil: bool = True,
    lr: float = 5e-6,
    batch: int = 32,
    steps: int = 100,
) -> Recipe:
    """Group-wise weights and token-wise dynamic activations; each block learns the output of the original block.

    * groups: bands of whole rows in each matrix, as counted in the authors' code (48 for BERT, 64 for GPT).
    * group_size: runs along the input instead, as in other methods. Without both: one scale for each output channel, finer than
      the authors' bands.
    * activation_bits: of each linear's input, one range for each token.
    * ffn_bits: of the MLP's weights, if different: bits=8, ffn_bits=4 is the paper's W4/8.
    * symmetric: no zero points, in weights and activations.
    * distil: fit all weights, biases and norms of a block to the original block's output on original inputs, through the
      rounding.
    * lr, batch, steps: of AdamW; a batch counts windows, which pass one by one.

    Symmetric weights have the authors' step of 2 absmax / 2^bits (every code is used and the positive extreme clipped);
    activations have the step absmax / (2^(bits-1) - 1), which the integer kernels here compute. The authors' released
    configuration distils with only attention's activations quantized; here all are.
    """
    if groups is not None and group_size is not None:
        raise ValueError(
            f"groups counts bands of rows, group_size runs along the input: give one, found {groups} and {group_size}"
        )
    grain = RowBands(groups) if groups is not None else PerChannel() if group_size is None else PerGroup(group_size)
    act = activation(activation_bits, symmetric=symmetric)
    widths = {"*": bits} | ({} if ffn_bits is None else {"mlp": ffn_bits})
    rules = tuple(
        FormatRule(match=match, weight=Spec(Int(width, symmetric, full=symmetric and width > 1), grain), activation=act)
        for match, width in widths.items()
    )
    distillation = Learn((AllWeights(lr),), BlockMSE(), steps=steps, accumulate=batch, verify=True)
    return Recipe.blockwise(
        name="zeroquant",
        scheme=Scheme(rules=rules),
        steps=(*((distillation,) if distil else ()), Solve(Nearest())),
        feed="fp",
    )
