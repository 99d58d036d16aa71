"""QuaRot: rotate the residual stream, the heads and the MLP's inside until no channel stands out, then quantize plainly."""

from dataclasses import replace
from typing import Literal

from lowbit.modules import ActSpec
from lowbit.numerics import ClipSearch
from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Gptq, Nearest
from lowbit.steps import RotateInputs, RotateResidual, Solve


@method("quarot", family="weight-activation", paper="arXiv:2404.00456")
def quarot(
    bits: int = 4,
    activation_bits: int = 4,
    group_size: int | None = None,
    *,
    solver: Literal["gptq", "nearest"] = "gptq",
    symmetric: bool = True,
    activation_symmetric: bool = True,
    activation_clip: float = 0.9,
    heads: Literal["folded", "all"] = "all",
    damp: float = 0.01,
) -> Recipe:
    """Random Hadamard rotations of every linear's input, most of them folded; then GPTQ, and activations per token.

    The residual stream is rotated once for the whole model, folded into every block, with the gains of norms in the weights
    behind them; it is turned where it enters the first block and back where it leaves the last, at run time, so that embeddings
    and head stay as they are, tied or not. Where norms do not commute with a rotation (LayerNorm, norms behind attention and
    MLP) the report says so, and those inputs are rotated at run time. So is what the MLP's last linear reads, everywhere.
    bits, group_size: of weights, per channel where group_size is None; symmetric: without zero points.
    activation_bits, activation_symmetric: of each linear's input, per token; activation_clip: share of a token's range that is
    kept, 0.9 as in the paper. solver: of the weights, both with ranges shrunk to the least error. damp: as in gptq.
    heads: what the output projection reads is rotated "all" together at run time, as published (theirs in two parts, heads
    and across them), or "folded", each head by itself, which costs nothing to run.

    Differs from the paper: keys, values and queries are not quantized, so queries and keys are not rotated behind the rotary
    embedding; channels whose number has no Hadamard matrix are rotated in two overlapping parts. Shares below one are not an
    integer product in the compiled kernels: the quantized input multiplies decoded weights.
    """
    act = activation(activation_bits, symmetric=activation_symmetric)
    by = Gptq(ClipSearch(), order="group", damp=damp) if solver == "gptq" else Nearest(ClipSearch())
    return Recipe.blockwise(
        name="quarot",
        scheme=linears(weight(bits, group_size, symmetric=symmetric), _clipped(act, activation_clip)),
        steps=(RotateResidual(), RotateInputs(heads), Solve(by)),
    )


def _clipped(act: ActSpec | None, reach: float) -> ActSpec | None:
    return act and replace(act, spec=replace(act.spec, grid=replace(act.spec.grid, reach=reach)))  # pyright: ignore[reportArgumentType]
