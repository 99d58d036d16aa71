"""NVFP4: NVIDIA's 4-bit floating format, blocks of 16 with a scale of 8 bits, and one further scale for the tensor."""

from typing import Literal

from lowbit.modules import ActSpec
from lowbit.numerics import ClipSearch, Float, MinMax, PerGroup, PerTensor, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import linears
from lowbit.solve import Nearest
from lowbit.steps import Solve


@method("nvfp4", family="weight-activation", paper="NVIDIA, Introducing NVFP4, 2025")
def nvfp4(*, activation_bits: Literal[4] | None = None, mse: bool = False) -> Recipe:
    """E2M1 numbers in blocks of 16 along the input, with block scales in E4M3 times a float32 for the tensor; no calibration.

    * activation_bits: 4: also quantize each linear's input in this way at run time. Its tensor is the input of one call, so a
      result depends on the rest of the batch.
    * mse: shrink each block's range to the least error (norm 2.4), instead of using its extremes.
    """
    second = Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32")
    spec = Spec(Float(2, 1), PerGroup(16), second, "float32")
    return Recipe.blockwise(
        name="nvfp4",
        scheme=linears(spec, ActSpec(spec) if activation_bits else None),
        steps=(Solve(Nearest(ClipSearch() if mse else MinMax())),),
    )
