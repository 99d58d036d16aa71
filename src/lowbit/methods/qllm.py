"""QLLM: splits the channels with outliers, merges similar ones to make room, and learns a low-rank correction."""

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
    amp: bool | None = None,
) -> Recipe:
    """Outlier channels split before their linears, similar channels merged, and a learned low-rank correction.

    * activation_bits: of each linear's input, per token, with a zero point.
    * attention_bits: of queries, keys and values, per token of each head (the authors: the same as activation_bits).
    * channel_ratio: largest share of channels to add, searched for each input; 0: none.
    * assembly: "merge" averages pairs of channels to make room, "prune" drops channels, "none" lets the layers grow.
    * threshold_steps: number of thresholds to try.
    * windows: calibration windows that judge them; None: all (the authors: 1).
    * attention_output: also for the input of the output projection, which the authors leave alone.
    * rank: of the correction; 0: none.
    * fold: add it to the weights before rounding, as published; otherwise it is stored separately in float16.
    * norms: also learn the gains of norms, and biases.
    * epochs, lr, batch: of the learning, with rates that fall to zero.
    * amp: products in bfloat16 while learning; None: as the recipe's compute says.

    Differs from the authors' code: one block is learned at a time (theirs: four together, and the final norm at the end);
    similar channels are those of the paper's distance, not the code's; a folded correction is learned through the rounding.
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
