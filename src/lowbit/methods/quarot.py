"""QuaRot: rotates the residual stream, the heads and the MLP's inside until no channel stands out, then quantizes."""

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

    * bits, group_size: of weights; group_size=None: per channel.
    * activation_bits, activation_symmetric: of each linear's input, per token.
    * solver: of the weights; both shrink ranges to the least error.
    * symmetric: weights without zero points.
    * activation_clip: share of a token's range that is kept; 0.9 as in the paper.
    * heads: rotation of the output projection's input. "all": over all heads at run time, as published (theirs in two parts).
      "folded": within each head, which costs nothing at run time.
    * damp: as in gptq.

    The residual stream is rotated once for the model: the rotation is folded into every block, with the gains of norms in the
    weights after them. It runs where the stream enters the first block and leaves the last, so embeddings and head stay as they
    are. Where norms do not commute with a rotation (LayerNorm, norms after attention and MLP), inputs are rotated at run time
    and the report says so. The input of the MLP's last linear is always rotated at run time.

    Differs from the paper: queries, keys and values are not quantized, so queries and keys are not rotated after the rotary
    embedding. Widths without a Hadamard matrix are rotated in two overlapping parts. With activation_clip below one, compiled
    kernels take no integer product: the quantized input multiplies decoded weights.
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
