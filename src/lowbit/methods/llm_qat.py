"""LLM-QAT: trains all weights through the rounding of weights and activations, towards the original's own distribution."""

from lowbit.methods.kv_int import kv_int
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
    * activation_bits, kv_bits: a range for each token, in the cache for all heads, keys before their rotary embedding. 16: none.
    * tokens, seq_len: of training text (the authors: 100,000 texts of 2,048 tokens that the original wrote; --calibration self).
    * lr, batch, accumulate: of AdamW; the rate falls to zero along a cosine. batch windows at once, accumulate times.
    * mask: no gradient reaches weights, inputs, keys and values of 2 and over, as in the authors' code. Gains are trained too.
    * amp, recompute: multiply in bfloat16 while training; run blocks again in the backward pass instead of keeping activations.
    * measures: how often the divergence is measured on held-out text; the best state is kept. The authors keep the last.
    """
    few = {1: (Int(1, symmetric=True), Magnitude("mean", 1.0)), 2: (HALVES, Magnitude("mean", 1.5))}
    grid, fit = few.get(bits) or (Int(bits, symmetric=True), MinMax())
    spec = Spec(grid, PerGroup(group_size) if group_size else PerChannel())
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
        cache=True,
    )
    scheme = linears(spec, activation(activation_bits))
    recipe = Recipe("llm-qat", scheme, (Blockwise((Solve(Nearest(fit)),), "fp"), train))
    return recipe if kv_bits >= 16 else recipe.with_cache(kv_int(kv_bits, rope="before", heads="shared"))
