"""SmoothQuant: moves the difficulty of activation outliers into the weights, then quantizes both."""

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

    * bits, activation_bits: of weights and of each linear's input.
    * level: weights and activations: "O1", per tensor and per token, dynamic; "O2", per tensor, dynamic; "O3", per tensor, static
      after smoothing; "O1-pc", per channel (or groups of group_size) and per token, as the authors' repository evaluates.
    * attention_bits: of the operands of attention's two products (8 in the paper's kernels for OPT): with O3 one static range for
      each tensor, as theirs, else one for each token of each head; None: floating.
    * alpha: 0.5 for OPT and BLOOM, 0.8 to 0.9 for LLaMA-like models; "search": the best value, or no smoothing, for each edge.
    * grid: the search tries grid + 1 values from 0 to 1.
    * windows: calibration windows that judge the search; None: all.
    * all_edges: also smooth v -> o and up -> down, which the authors' code does not.
    * skip_first: with O3, tokens at the start of each window that ranges ignore and clip, for massive first tokens (see report).
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
