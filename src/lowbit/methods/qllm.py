"""QLLM: split the channels that hold outliers, merge like ones to make room, and learn a low-rank correction."""

from typing import Literal

from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, attention, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import BlockMSE, Learn, LowRankCorrection, NormsAndBiases, SearchReassembly, Solve


@method("qllm", family="weight-activation", paper="arXiv:2310.08041")
def qllm(
    bits: int = 4,
    activation_bits: int | None = 4,
    group_size: int | None = None,
    *,
    attention_bits: int | None = None,
    channel_ratio: float = 0.2,
    assembly: Literal["merge", "prune", "none"] = "merge",
    threshold_steps: int = 20,
    windows: int | None = 4,
    attention_output: bool = False,
    rank: int = 4,
    fold: bool = False,
    norms: bool = True,
    epochs: int = 10,
    lr: float = 5e-4,
    batch: int = 1,
    amp: bool = False,
) -> Recipe:
    """Outlier channels split in front of their linears, others averaged to make room, and a learned low-rank correction.

    activation_bits: of each linear's input, per token, with a zero point. attention_bits: of queries, keys and values, per
    token of each head (the authors: as many as activations have). channel_ratio: share of the channels that may be
    added (0: none); how many are is searched for each input. assembly: room is made by averaging pairs of channels
    ("merge"), by dropping channels ("prune"), or the layers grow ("none").
    threshold_steps: how many thresholds are tried. windows: calibration windows to judge them by (None: all; authors: 1).
    attention_output: also for the input of the output projection, which the authors leave alone.
    rank: of the correction (0: none). fold: add it to the weights before they are rounded, as published, where else it
    is kept beside them in float16. norms: learn the gains of norms and biases as well. epochs, lr, batch, amp: of that
    learning, at rates that fall to zero.

    Differs from the authors' code: one block is learned at a time (theirs: four together, and the final norm at the end);
    like channels are those of the paper's distance, not the code's; a folded correction is learned through the rounding.
    """
    steps = (
        SearchReassembly(
            channel_ratio, assembly, threshold_steps, windows, () if attention_output else ("attention_out",)
        ),
    )
    makers = (LowRankCorrection(rank, lr, fold),) if rank else ()
    makers += (NormsAndBiases(lr),) if rank and norms else ()
    learn = (Learn(makers, BlockMSE(), epochs, batch, amp, decay=True),) if makers else ()
    operands = attention(attention_bits, symmetric=False, probabilities=None)
    scheme = linears(weight(bits, group_size), activation(activation_bits, symmetric=False), operands)
    return Recipe.blockwise(name="qllm", scheme=scheme, steps=(*steps, *learn, Solve(Nearest())))
