"""ParetoQ: trains all weights and step sizes, with levels that suit the width."""

from lowbit.numerics import HALVES, Int, Magnitude, MinMax, PerChannel, PerGroup, Spec
from lowbit.recipes import Blockwise, Recipe, Train, method
from lowbit.scheme import activation, linears
from lowbit.solve import Nearest
from lowbit.steps import Solve
from lowbit.training import AdamW, Cosine, LatentWeights, NextToken, OriginalKL


@method("paretoq", family="training", paper="arXiv:2502.02631")
def paretoq(
    bits: int = 2,
    group_size: int | None = None,
    *,
    activation_bits: int | None = None,
    tokens: int = 2**18,
    seq_len: int | None = None,
    lr: float = 2e-5,
    range_rate: float = 5.0,
    batch: int = 1,
    accumulate: int = 8,
    distil: bool = False,
    amp: bool = False,
    recompute: bool = False,
    measures: int = 16,
) -> Recipe:
    """Learned step sizes on levels for each width: signs, four half-integers, or integers; all weights are trained.

    * bits: 1: the sign; 2: levels at 1/2 and 3/2 steps on both sides of zero (stretched elastic quantization); 3 and over: integers.
    * group_size: None, as published: one scale for each output channel.
    * activation_bits: also quantize each linear's input, per token, symmetric.
    * tokens, seq_len: of training text (the authors: 30 billion tokens at 2 bits and below, 10 billion above).
    * lr, batch, accumulate: of AdamW; the rate falls to zero along a cosine. batch windows at once, accumulate times.
    * range_rate: learning rate of step sizes, in units of their start, as a multiple of lr (the authors': absolute, lr).
    * distil: towards the original's distribution; False, as published: the text's next tokens.
    * amp, recompute: multiply in bfloat16 while training; run blocks again in the backward pass instead of keeping activations.
    * measures: how often the divergence is measured on held-out text; the best state is kept. The authors keep the last.

    Steps start as in the authors' code: at the mean magnitude of a row (1 bit), or so that its largest is met.
    """
    few = {1: (Int(1, symmetric=True), Magnitude("mean", 1.0)), 2: (HALVES, Magnitude("largest", 0.75))}
    grid, fit = few.get(bits) or (Int(bits, symmetric=True), MinMax())
    spec = Spec(grid, PerChannel() if group_size is None else PerGroup(group_size))
    train = Train(
        LatentWeights(None, range_rate=range_rate, gains=True),
        OriginalKL() if distil else NextToken(),
        lr=lr,
        batch=batch,
        amp=amp,
        optimizer=AdamW((0.9, 0.999)),
        schedule=Cosine(),
        tokens=tokens,
        seq_len=seq_len,
        accumulate=accumulate,
        recompute=recompute,
        measures=measures,
    )
    blockwise = Blockwise((Solve(Nearest(fit)),), "fp")
    return Recipe("paretoq", linears(spec, activation(activation_bits)), (blockwise, train))
