"""BitDistiller: clips each end of every range apart, then distils the original into all weights through their rounding."""

from typing import Literal

from lowbit.numerics import NF3, Int, PerChannel, PerGroup, Spec
from lowbit.recipes import Blockwise, Recipe, Train, method
from lowbit.scheme import activation, linears
from lowbit.solve import Nearest
from lowbit.steps import SearchClip, Solve
from lowbit.training import AdamW, ConfidenceKL, Cosine, LatentWeights


@method("bitdistiller", family="training", paper="arXiv:2402.10631")
def bitdistiller(
    bits: int = 2,
    group_size: int | None = 128,
    *,
    activation_bits: int | None = None,
    tokens: int = 2**18,
    seq_len: int | None = None,
    lr: float = 8e-6,
    batch: int = 1,
    accumulate: int = 8,
    coefficient: float | None = None,
    estimate: Literal["target", "largest"] = "target",
    amp: bool = False,
    recompute: bool = False,
    measures: int = 16,
) -> Recipe:
    """Each end of a range shrinks by up to half; then self-distillation by a mixture of forward and reverse KL divergence.

    * bits: 3: NormalFloat with a scale for each sign; otherwise integers with zero points.
    * activation_bits: also quantize each linear's input, per token, symmetric.
    * tokens, seq_len: of training text (the authors: four passes over 8,000 texts of up to 1,024 tokens that the original wrote).
    * lr, batch, accumulate: of AdamW at a constant rate. batch windows at once, accumulate times (the authors: 128 windows).
    * coefficient: share of the reverse divergence; None: the original's mean probability of the text's tokens.
    * estimate: "largest": its mean largest probability, as in the authors' code.
    * amp, recompute: multiply in bfloat16 while training; run blocks again in the backward pass instead of keeping activations.
    * measures: how often the divergence is measured on held-out text; the best state is kept, as in the authors' code.

    Differs from the authors' code: embedding and head keep their precision and are not trained; clipping is judged by all
    calibration tokens; ties are rounded to even.
    """
    spec = Spec(NF3 if bits == 3 else Int(bits), PerChannel() if group_size is None else PerGroup(group_size))
    train = Train(
        LatentWeights(),
        ConfidenceKL(coefficient, estimate),
        lr=lr,
        batch=batch,
        amp=amp,
        optimizer=AdamW((0.9, 0.999)),
        schedule=Cosine(floor=1.0),
        tokens=tokens,
        seq_len=seq_len,
        accumulate=accumulate,
        recompute=recompute,
        measures=measures,
    )
    blockwise = Blockwise((SearchClip(apart=True), Solve(Nearest())), "fp")
    return Recipe("bitdistiller", linears(spec, activation(activation_bits)), (blockwise, train))
