"""Products in bfloat16 where that is faster: one decision for streams of calibration text and for gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from lowbit.kernels.instructions import assume, faster_than_float32

Compute = Literal["auto", "float32", "bfloat16"]
"""The type of products; ``auto``: bfloat16 where the device is clearly faster with it."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has its own instructions for bfloat16 products."""
    if device.type == "cpu":
        return faster_than_float32(torch.bfloat16)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def product_type(device: torch.device, compute: Compute) -> str:
    """``float32`` or ``bfloat16``: what ``compute`` means on ``device``."""
    return ("bfloat16" if has_bfloat16(device) else "float32") if compute == "auto" else compute


def continue_with(product: str) -> None:
    """Lets ``auto`` mean ``product`` on the CPU for the rest of this process. A clock decides it otherwise, and near the limit
    it may decide in two ways."""
    assume(torch.bfloat16, product == "bfloat16")


def products(device: torch.device, compute: Compute) -> torch.autocast:
    """A context with products in the type that ``compute`` asks for. Sums that go on, such as a residual stream, keep theirs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=product_type(device, compute) == "bfloat16")


@contextmanager
def rounded_factors(rounded: bool) -> Iterator[None]:
    """While open, and if ``rounded``, every thread may round the factors of float32 products to bfloat16; sums stay float32.

    Factors that are numbers of bfloat16, such as the inputs of a product in it, lose nothing. torch leaves the choice of
    instructions to oneDNN: tiles (AMX) where there are any. Before torch 2.9 nothing changes.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not rounded or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def faster_products(device: torch.device, wanted: bool = True) -> torch.autocast:
    """A context with products in bfloat16 if ``wanted`` and ``device`` has instructions for it, else in float32."""
    return products(device, "auto" if wanted else "float32")
