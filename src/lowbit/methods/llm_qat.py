"""LLM-QAT: trains all weights through the rounding of weights and activations, towards the original's own distribution."""

from lowbit.numerics import HALVES, Int, Magnitude, MinMax, PerChannel, PerGroup, Spec
from lowbit.recipes import Blockwise, Recipe, Train, method
from lowbit.scheme import activation, linears
from lowbit.solve import Nearest
from lowbit.steps import Solve
from lowbit.training import AdamW, Cosine, LatentWeights, OriginalKL


@method("llm-qat", family="training", paper="arXiv:2305.17888")
def llm_qat(
    bits: int = 4,
    activation_bits: int | None = 8,
    group_size: int | None = None,
    *,
    kv_bits: int = 16,
    tokens: int = 2**18,
    seq_len: int | None = None,
    lr: float = 2e-5,
    batch: int = 1,
    accumulate: int = 8,
    mask: bool = True,
    amp: bool = False,
    recompute: bool = False,
    measures: int = 16,
) -> Recipe:
    """Symmetric weights and per-token activations, all weights trained by the KL divergence from the original.

    * bits: 3 and over: the extremes of each row are met; 2: four levels at 1/2 and 3/2 of the row's mean magnitude; 1: its sign.
    * group_size: None, as published: one scale for each output channel.
    * kv_bits: of keys and values; 16, as they are: training does not see a quantized cache yet.
    * tokens, seq_len: of training text (the authors: 100,000 texts of 2,048 tokens that the original wrote; --calibration self).
    * lr, batch, accumulate: of AdamW; the rate falls to zero along a cosine. batch windows at once, accumulate times.
    * mask: no gradient reaches values of 2 and over, as in the authors' code. Gains of norms are trained too, embeddings are not.
    * amp, recompute: multiply in bfloat16 while training; run blocks again in the backward pass instead of keeping activations.
    * measures: how often the divergence is measured on held-out text; the best state is kept. The authors keep the last.
    """
    if kv_bits < 16:
        raise ValueError(f"training does not see a quantized cache yet: leave kv_bits at 16, found {kv_bits}")
    few = {1: (Int(1, symmetric=True), Magnitude("mean", 1.0)), 2: (HALVES, Magnitude("mean", 1.5))}
    grid, fit = few.get(bits) or (Int(bits, symmetric=True), MinMax())
    spec = Spec(grid, PerChannel() if group_size is None else PerGroup(group_size))
    train = Train(
        LatentWeights(fit, through_ranges=False, gains=True, limit=2.0 if mask else None),
        OriginalKL(),
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
    return Recipe(
        "llm-qat", linears(spec, activation(activation_bits)), (Blockwise((Solve(Nearest(fit)),), "fp"), train)
    )
