"""SmoothQuant: move the difficulty of activation outliers into the weights, then quantize both plainly."""

from typing import Literal

from lowbit.numerics import Int, PerChannel, PerGroup, PerTensor, Spec
from lowbit.recipe import Recipe, activation, linears, method
from lowbit.solve import Nearest
from lowbit.steps import Set, SetActivationRange, Smooth, Solve

NORM_EDGES = ("norm_*",)
ALL_EDGES = ("norm_*", "v_o", "*up_down*")


@method("smoothquant", family="weight-activation", paper="arXiv:2211.10438")
def smoothquant(
    bits: int = 8,
    activation_bits: int = 8,
    group_size: int | None = None,
    *,
    alpha: float = 0.5,
    level: Literal["O1", "O2", "O3", "O1-pc"] = "O1-pc",
    all_edges: bool = False,
) -> Recipe:
    """Per-channel smoothing s = max|x|^alpha / max|w|^(1-alpha), then symmetric weights and activations.

    bits, activation_bits: of weights and of each linear's input, both symmetric. level: the paper's O1 (per-tensor weights,
    per-token dynamic activations), O2 (per-tensor dynamic), O3 (per-tensor static), or "O1-pc" (per-channel weights, or
    groups of group_size, and per-token activations: what its repository evaluates).
    alpha: 0.5 for OPT and BLOOM, 0.8 to 0.9 for LLaMA-like models.
    all_edges: smooth v -> o and up -> down too, which the authors' code does not.
    """
    if level != "O1-pc" and group_size is not None:
        raise ValueError(f"level {level} has one scale for each weight tensor; group_size goes with level 'O1-pc'")
    grain = PerTensor() if level != "O1-pc" else PerChannel() if group_size is None else PerGroup(group_size)
    per, static = ("token" if level in ("O1-pc", "O1") else "tensor"), level == "O3"
    ranges = (SetActivationRange(),) if static else ()
    return Recipe(
        name="smoothquant",
        scheme=linears(Spec(Int(bits, symmetric=True), grain), activation(activation_bits, per=per, static=static)),
        steps=(Set(Smooth(alpha), ALL_EDGES if all_edges else NORM_EDGES), *ranges, Solve(Nearest())),
        feed="fp",
    )
