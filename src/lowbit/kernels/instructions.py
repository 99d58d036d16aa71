"""Which products of matrices are faster on this processor than those of float32.

Not every processor that has instructions for a type gains by them, and the same name promises different things: bfloat16
through AVX512-BF16 takes 1.9 times as long as float32 on a Xeon whose tiles (AMX) are not there to be used, and 0.22 times on
an EPYC of family 26. Without instructions torch converts: 7.5 times as long for bfloat16 and 24 to 29 times for int8, measured
with AVX2 alone. So it is not read from names but tried, once a process and dtype.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

_SHAPE = (128, 768, 768)  # tokens, output and input channels: milliseconds, and large enough for blocked products
_ROUNDS = 5
_GAIN = 1.5  # that is worth the digits, and that the clock's noise does not decide: those seen are below 1.1 or above 3


@torch.compiler.assume_constant_result  # of this processor: what is traced takes the answer, not the clock
def faster_than_float32(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of ``dtype`` (bfloat16, float16 or int8) well faster than those of float32, here."""
    return speedup(dtype) > _GAIN


@functools.cache
@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def speedup(dtype: torch.dtype) -> float:
    """How many times as fast as float32 torch multiplies matrices of ``dtype`` on this processor, whatever context it is asked
    in."""
    tokens, outputs, inputs = _SHAPE
    x_TI, w_OI = (torch.ones(size, inputs, dtype=torch.float32, device="cpu") for size in (tokens, outputs))
    narrow = x_TI.to(dtype), w_OI.to(dtype).T
    multiply = torch.mm if dtype.is_floating_point else torch._int_mm
    calls: tuple[Callable[[], Tensor], ...] = (lambda: x_TI @ w_OI.T, lambda: multiply(*narrow))
    best = [float("inf")] * len(calls)
    for i in range(1 + _ROUNDS):  # in turns; the first is for what is made only once
        for which, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if i:
                best[which] = min(best[which], time.perf_counter() - start)
    return best[0] / best[1]
