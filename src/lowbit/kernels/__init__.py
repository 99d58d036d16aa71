"""Kernels that multiply by packed weights. They see tensors and specs, never modules; importing them touches no device."""

from lowbit.kernels import int8_torch as _int8_torch  # noqa: F401  (registers itself)
from lowbit.kernels import triton as _triton  # noqa: F401  (registers itself)

# isort: split
# product registers last, because the last registered kernel is asked first
from lowbit.kernels import cache, native, product, side_terms, step
from lowbit.kernels.activation import (
    fake_quantize_activation,
    outlier_channels,
    quantize_activation,
    without_outliers,
)
from lowbit.kernels.decode import decode_packed
from lowbit.kernels.int8_torch import integer_product
from lowbit.kernels.ops import (
    Kernel,
    PackedLinear,
    Reason,
    add_side,
    choose,
    explain,
    forced,
    names,
    reference,
    reference_weight,
    register,
    run,
    with_side_terms,
)

__all__ = [
    "Kernel",
    "PackedLinear",
    "Reason",
    "add_side",
    "cache",
    "choose",
    "decode_packed",
    "explain",
    "fake_quantize_activation",
    "forced",
    "integer_product",
    "names",
    "native",
    "outlier_channels",
    "product",
    "quantize_activation",
    "reference",
    "reference_weight",
    "register",
    "run",
    "side_terms",
    "step",
    "with_side_terms",
    "without_outliers",
]
