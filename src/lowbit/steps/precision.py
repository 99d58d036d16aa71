"""Products in bfloat16, where that is faster: one decision for everything that learns or differentiates."""

from __future__ import annotations

import torch

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # of x86 and Arm, as torch names them


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 by instructions of its own. A processor without them takes several times as long
    as in float32 (7.5 times measured with AVX2 alone)."""
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in _INSTRUCTIONS)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def faster_products(device: torch.device, wanted: bool = True) -> torch.autocast:
    """The context in which products are in bfloat16, if ``wanted`` and ``device`` has the instructions; else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bfloat16(device))
