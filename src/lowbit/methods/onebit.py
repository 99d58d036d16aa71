"""OneBit: signs between scales of inputs and outputs, with normalized outputs, distilled from the original."""

from lowbit.numerics import PerTensor, Sign, Spec
from lowbit.recipes import Blockwise, Recipe, Train, method
from lowbit.scheme import activation, linears
from lowbit.solve import SignValue
from lowbit.steps import Solve
from lowbit.training import AdamW, Cosine, HiddenStates, LatentSigns


@method("onebit", family="training", paper="arXiv:2402.11295")
def onebit(
    *,
    normalize: bool = True,
    activation_bits: int | None = None,
    tokens: int = 2**20,
    seq_len: int | None = None,
    lr: float = 4e-4,
    batch: int = 1,
    accumulate: int = 8,
    kl: float = 20.0,
    hidden: float = 1.0,
    scale_rate: float = 1.0,
    amp: bool = False,
    recompute: bool = False,
    measures: int = 16,
) -> Recipe:
    """A weight is a sign times a scale of its row and one of its column; the start keeps the signs of the original's weights.

    * normalize: each linear normalizes its output over its channels, as published. Training is stable then, and the start is
      worthless: with ``tokens=0`` the result is broken. Without, the start is the best approximation of each weight.
    * activation_bits: also quantize each linear's scaled input, per token, symmetric.
    * tokens, seq_len: of training text (the authors: 50 passes over 132,000 texts of up to 2,048 tokens that LLaMA-7B wrote);
      0: the start alone.
    * lr, batch, accumulate: of AdamW on a cosine; the authors use 1e-4 to 4e-4. batch windows at once, accumulate times (128).
    * kl, hidden: weights of the divergence from the original for each token, in nats, and of the distances of normalized hidden
      states. The authors sum the divergence over a window of 2,048 tokens and take 0.01 of that, which is 20 here.
    * scale_rate: learning rate of the scales, in units of their start, as a multiple of lr.
    * amp, recompute: multiply in bfloat16 while training; run blocks again in the backward pass instead of keeping activations.
    * measures: how often the divergence is measured on held-out text; the best state is kept. The authors keep the last.

    One bit for each weight and 16 for each row and column. Norms are trained too; embedding and head are not.
    """
    train = Train(
        LatentSigns(scale_rate=scale_rate),
        HiddenStates(kl, hidden),
        lr=lr,
        batch=batch,
        amp=amp,
        optimizer=AdamW((0.9, 0.98), 0.01),
        schedule=Cosine(0.01),
        tokens=tokens,
        seq_len=seq_len,
        accumulate=accumulate,
        recompute=recompute,
        measures=measures,
    )
    scheme = linears(Spec(Sign(), PerTensor()), activation(activation_bits))
    return Recipe("onebit", scheme, (Blockwise((Solve(SignValue(normalize)),)), *([train] if tokens else [])))
