"""Which products of matrices are faster on this processor than those of float32.

Not every processor that has instructions for a type gains by them. Without any, torch converts: 7.5 times as slow as float32
for bfloat16 and 24 to 29 times for int8, measured with AVX2 alone. On a Xeon whose tiles (AMX) are not there to be used,
bfloat16 through AVX512-BF16 takes 1.9 times as long as float32, and float16 through AVX512-FP16 as long. Other processors with
these two were not measured; float32 is exact there, whatever its speed.
"""

from __future__ import annotations

import functools

import torch

_NAMES = {  # of x86 and Arm, as torch names them
    torch.bfloat16: ("amx_bf16", "bf16"),
    torch.float16: ("amx_fp16", "fp16"),
    torch.int8: ("avx512_vnni", "avx_vnni", "amx_int8"),
}


@functools.cache
def faster_than_float32(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of ``dtype`` faster than those of float32; taken for granted of int8 where the
    processor is no x86."""
    has = torch.cpu.get_capabilities()
    if dtype == torch.int8 and has.get("architecture") != "x86_64":
        return True
    return any(has.get(name) for name in _NAMES.get(dtype, ()))
