"""Products in bfloat16 where that is faster: one decision for all code that computes gradients."""

from __future__ import annotations

import torch

from lowbit.kernels.instructions import faster_than_float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has its own instructions for bfloat16 products."""
    if device.type == "cpu":
        return faster_than_float32(torch.bfloat16)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def faster_products(device: torch.device, wanted: bool = True) -> torch.autocast:
    """A context with products in bfloat16 if ``wanted`` and ``device`` has instructions for it, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bfloat16(device))
