"""SpinQuant: learns the rotations of the residual stream and of values by the loss of the quantized model, then quantizes."""

from typing import Literal

from lowbit.methods.kv_rotated import kv_rotated
from lowbit.numerics import ClipSearch
from lowbit.recipes import Blockwise, Recipe, Train, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Gptq, Nearest
from lowbit.steps import RotateInputs, RotateResidual, Solve
from lowbit.training import CayleySGD, Cosine, NextToken, OriginalKL, Rotations


@method("spinquant", family="training", paper="arXiv:2405.16406")
def spinquant(
    bits: int = 4,
    activation_bits: int | None = 4,
    group_size: int | None = None,
    *,
    kv_bits: int = 16,
    solver: Literal["gptq", "nearest"] = "gptq",
    tokens: int = 2**18,
    seq_len: int | None = None,
    lr: float = 1.5,
    batch: int = 1,
    accumulate: int = 8,
    distil: bool = False,
    amp: bool = False,
    recompute: bool = False,
    measures: int = 4,
) -> Recipe:
    """Rotations of the residual stream and of each block's values, trained by the loss under quantized inputs and cache; then GPTQ.

    * bits, group_size: of weights, symmetric; group_size=None: per channel.
    * activation_bits, kv_bits: a range with a zero point for each token, in the cache for each head. None or 16: none.
    * solver: "gptq" on rotations that were trained with exact weights, "nearest" on those trained with rounded ones, as published.
    * tokens, seq_len: of training text (the authors: 100 steps of 8 windows of 2,048 tokens).
    * lr, batch, accumulate: of Cayley SGD; the rate falls to zero along a cosine. batch windows at once, accumulate times.
    * distil: towards the original's distribution; False, as published: the text's next tokens.
    * amp, recompute: multiply in bfloat16 while training; run blocks again in the backward pass instead of keeping activations.
    * measures: how often the loss is measured on held-out text; the best state is kept. The authors keep the last.

    Inputs of the MLP's last linear and keys behind their rotary embedding are rotated by Hadamard matrices at run time. The model
    stores the residual rotation, which runs at both ends of the blocks: embeddings and head stay. Differs from the authors' code:
    the output projection's input has one range for each token, not one for each head.
    """
    train = Train(
        Rotations(solver == "nearest"), OriginalKL() if distil else NextToken(), lr=lr, batch=batch, amp=amp,
        optimizer=CayleySGD(), schedule=Cosine(), tokens=tokens, seq_len=seq_len, accumulate=accumulate, recompute=recompute,
        measures=measures, judge="objective", cache=True,
    )  # fmt: skip
    solve = Solve(Gptq(ClipSearch(), order="group") if solver == "gptq" else Nearest(ClipSearch()))
    scheme = linears(weight(bits, group_size, symmetric=True), activation(activation_bits, symmetric=False))
    steps = RotateResidual(learned=True), RotateInputs("learned"), solve
    recipe = Recipe("spinquant", scheme, (train, Blockwise(steps)))
    return recipe if kv_bits >= 16 else recipe.with_cache(kv_rotated(kv_bits, recent=0, centred=False))
