"""What this processor multiplies by instructions of its own. torch computes the rest by conversions, several times slower
than float32 (7.5 times for bfloat16, 24 to 29 times for int8, measured with AVX2 alone)."""

from __future__ import annotations

import functools

import torch

_NAMES = {  # of x86 and Arm, as torch names them
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
    torch.int8: ("avx512_vnni", "avx_vnni", "amx_int8"),
}


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of ``dtype`` by such instructions; float32 always, and int8 is taken for granted
    where the processor is no x86."""
    has = torch.cpu.get_capabilities()
    if dtype == torch.float32 or (dtype == torch.int8 and has.get("architecture") != "x86_64"):
        return True
    return any(has.get(name) for name in _NAMES[dtype])
