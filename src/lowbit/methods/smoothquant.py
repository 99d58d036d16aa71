"""SmoothQuant: move the difficulty of activation outliers into the weights, then quantize both plainly."""

from typing import Literal

from lowbit.numerics import Int, PerChannel, PerGroup, PerTensor, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, attention, linears
from lowbit.solve import Nearest
from lowbit.steps import Search, Set, SetActivationRange, SetAttentionRange, Smooth, SmoothPowers, Solve

NORM_EDGES = ("norm_*",)
ALL_EDGES = ("norm_*", "v_o", "*up_down*")


@method("smoothquant", family="weight-activation", paper="arXiv:2211.10438")
def smoothquant(
    bits: int = 8,
    activation_bits: int = 8,
    group_size: int | None = None,
    *,
    attention_bits: int | None = None,
    alpha: float | Literal["search"] = 0.5,
    level: Literal["O1", "O2", "O3", "O1-pc"] = "O1-pc",
    all_edges: bool = False,
    skip_first: int = 0,
    grid: int = 20,
    windows: int | None = None,
) -> Recipe:
    """Per-channel smoothing s = max|x|^alpha / max|w|^(1-alpha), then symmetric weights and activations.

    bits, activation_bits: of weights and of each linear's input, both symmetric. level: the paper's O1 (per-tensor weights,
    per-token dynamic activations), O2 (per-tensor dynamic), O3 (per-tensor static, measured after smoothing), or "O1-pc"
    (per-channel weights, or groups of group_size, and per-token activations: what its repository evaluates).
    attention_bits: of the operands of attention's two products, as the paper's kernels for OPT have (8): with level O3 one
    static range a tensor, as theirs, else one for each token of each head. None: floating.
    alpha: 0.5 for OPT and BLOOM, 0.8 to 0.9 for LLaMA-like models; "search": for each edge that of grid + 1 values from 0 to
    1, or no smoothing, under which its linears lose least, judged on so many calibration windows (None: all).
    all_edges: smooth v -> o and up -> down too, which the authors' code does not.
    skip_first: with level O3, so many tokens at the start of each calibration window are kept out of the static ranges,
    and clipped at run time: for models whose first tokens are massive, which the report names.
    """
    if level != "O1-pc" and group_size is not None:
        raise ValueError(f"level {level} has one scale for each weight tensor; group_size goes with level 'O1-pc'")
    if level != "O3" and skip_first:
        raise ValueError(f"skip_first is of static ranges, which level {level} has not; it goes with level 'O3'")
    grain = PerTensor() if level != "O1-pc" else PerChannel() if group_size is None else PerGroup(group_size)
    weight = Spec(Int(bits, symmetric=True), grain)
    per, static = ("token" if level in ("O1-pc", "O1") else "tensor"), level == "O3"
    edges = ALL_EDGES if all_edges else NORM_EDGES
    smooth = Search(SmoothPowers(grid), edges, windows) if alpha == "search" else Set(Smooth(alpha), edges)
    attending = (SetAttentionRange(skip_first=skip_first),) if attention_bits else ()
    ranges = (SetActivationRange(skip_first), *attending) if static else ()
    return Recipe.blockwise(
        name="smoothquant",
        scheme=linears(
            weight, activation(activation_bits, per=per, static=static), attention(attention_bits, static=static)
        ),
        steps=(smooth, *ranges, Solve(Nearest())),
        feed="fp",
    )
