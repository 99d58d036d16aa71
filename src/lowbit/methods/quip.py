"""QuIP: rotates each weight on both sides until nothing stands out, then rounds column by column on one grid."""

from typing import Literal

from lowbit.numerics import Int, PerGroup, PerTensor, RmsRange, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears
from lowbit.solve import Gptq
from lowbit.steps import Balance, Incoherence, Set, Solve

_EDGES = ("norm_*", "v_o", "*up_down*")


@method("quip", family="weight-only", paper="arXiv:2307.13304")
def quip(
    bits: int = 2,
    group_size: int | None = None,
    *,
    transform: Literal["kronecker", "hadamard", "none"] = "hadamard",
    balance: bool = False,
    rho: float | None = None,
    order: Literal["none", "act", "group"] = "act",
    greedy_passes: int = 0,
    damp: float = 0.02,
    activation_bits: int | None = None,
) -> Recipe:
    """Random rotations of inputs and outputs, run with the layer and stored as seeds; LDLQ, which is GPTQ's recursion.

    * group_size: None, as published: one range for each matrix.
    * transform: the rotations: "kronecker", as published, or "hadamard", flatter and cheaper to run.
    * balance: first rescale input channels by (H_jj / (W^T W)_jj)^(1/4), folded into the layers before if possible, else at run
      time.
    * rho: outermost level divided by the root mean square of the weights; None: the least error on a normal distribution.
    * order: of rounding the columns.
    * greedy_passes: rounds of coordinate descent over the codes afterwards, which never raise the error.
    * damp: share of the mean Hessian diagonal that is added to the diagonal.
    * activation_bits: also quantize each rotated input, per token.

    The authors' defaults are transform="kronecker" (with a new factor for each slice), balance=true, rho=2.4 at every width,
    order="none". On real layers the published range almost doubles the error at 2 bits, and the rescale adds a few per cent
    (more to SmolLM2's perplexity at 3 bits). Their two dampings of 0.01 are one here.
    """
    spec = Spec(Int(bits, zero="real"), PerTensor() if group_size is None else PerGroup(group_size))
    rescale = (Set(Balance(), _EDGES, run_time=True),) if balance else ()
    rotation = (Incoherence(transform),) if transform != "none" else ()
    solver = Gptq(
        fit=RmsRange(rho), order=order, damp=damp, greedy_passes=greedy_passes, static_groups=group_size is not None
    )
    return Recipe.blockwise(
        name="quip",
        scheme=linears(spec, activation(activation_bits)),
        steps=(*rescale, *rotation, Solve(solver)),
    )
