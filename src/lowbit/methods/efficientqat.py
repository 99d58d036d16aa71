"""EfficientQAT: learns all weights and step sizes block by block, then the step sizes of the whole model."""

from typing import Literal

from lowbit.recipes import Blockwise, Recipe, Train, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import AllWeights, BlockMSE, Learn, Solve, StepSizes
from lowbit.training import AdamW, Cosine, NextToken, OriginalKL, StoredFloats


@method("efficientqat", family="training", paper="arXiv:2407.11062")
def efficientqat(
    bits: int = 2,
    group_size: int | None = 64,
    *,
    activation_bits: int | None = None,
    epochs: int = 2,
    weight_lr: float | None = None,
    step_lr: float = 2.5e-3,
    batch: int = 2,
    tokens: int = 2**18,
    seq_len: int | None = None,
    lr: float = 5e-4,
    accumulate: int = 8,
    objective: Literal["text", "original"] = "text",
    amp: bool | None = None,
    measures: int = 16,
) -> Recipe:
    """Each block learns the original block's output through its rounding; then codes stay, and all step sizes are trained.

    * activation_bits: also quantize each linear's input, per token, symmetric.
    * epochs, weight_lr: of learning blocks (None: 2e-5 at 2 bits, otherwise 1e-5, as published); step_lr: of step sizes there, in
      units of their start. The authors' 1e-4, absolute, is about this for LLaMA-2-7B.
    * batch: windows at once, in both phases.
    * tokens, seq_len: of text for the second phase (the authors: 4,096 windows of 4,096 tokens).
    * lr, accumulate: there, in units of the step sizes; batches for each step.
    * objective: "text", the next tokens, as published; "original", the original's distribution.
    * amp: products in bfloat16 while learning; None: as the recipe's compute says, and not in the second phase.
    * measures: how often the divergence is measured on held-out text; the best state is kept. The authors keep the last.

    Zero points stay: at the published rate none reaches another code."""
    makers = AllWeights(weight_lr or (2e-5 if bits == 2 else 1e-5)), StepSizes(step_lr)
    learn = Learn(makers, BlockMSE(), epochs, batch, amp)
    train = Train(
        StoredFloats(gains=False),
        NextToken() if objective == "text" else OriginalKL(),
        lr=lr,
        batch=batch,
        amp=bool(amp),
        optimizer=AdamW((0.9, 0.999)),
        schedule=Cosine(),
        tokens=tokens,
        seq_len=seq_len,
        accumulate=accumulate,
        clip_norm=0.3,
        measures=measures,
    )
    scheme = linears(weight(bits, group_size), activation(activation_bits))
    return Recipe("efficientqat", scheme, (Blockwise((learn, Solve(Nearest()))), train))
