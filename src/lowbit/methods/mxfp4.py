"""MXFP4: the 4-bit floating format of OCP Microscaling, with one power of two as the scale of each block of 32."""

from typing import Literal

from lowbit.modules import ActSpec
from lowbit.numerics import ClipSearch, Float, MinMax, PerGroup, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import linears
from lowbit.solve import Nearest
from lowbit.steps import Solve

_ELEMENTS = {
    4: Float(2, 1, shared_exponent=True),
    6: Float(3, 2, shared_exponent=True),
    8: Float(4, 3, "fn", shared_exponent=True),
}


@method("mxfp4", family="weight-activation", paper="arXiv:2310.10537")
def mxfp4(*, activation_bits: Literal[4, 6, 8] | None = None, mse: bool = False) -> Recipe:
    """E2M1 numbers in blocks of 32 along the input, with one scale of 8 bits (E8M0) for each block; nothing is calibrated.

    * activation_bits: also quantize each linear's input in such blocks at run time: 4 (MXFP4), 6 (MXFP6, E3M2) or 8 (MXFP8,
      E4M3).
    * mse: shrink the range of a block if that lowers the error (norm 2.4), instead of the published scale
      2^(floor(log2 absmax) - 2).
    """
    act = (
        None
        if activation_bits is None
        else ActSpec(Spec(_ELEMENTS[activation_bits], PerGroup(32), None, "float8_e8m0fnu"))
    )
    return Recipe.blockwise(
        name="mxfp4",
        scheme=linears(Spec(_ELEMENTS[4], PerGroup(32), scale_dtype="float8_e8m0fnu"), act),
        steps=(Solve(Nearest(ClipSearch() if mse else MinMax())),),
    )
