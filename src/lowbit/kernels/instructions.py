"""Measures which matrix products are faster on this processor than float32.

Instructions for a type do not always make it faster, and one name means different speeds. bfloat16 with AVX512-BF16 takes
1.9 times as long as float32 on a Xeon without usable tiles (AMX), and 0.22 times as long on an EPYC of family 26. Without
instructions torch converts; with AVX2 alone that takes 7.5 times as long for bfloat16 and 24 to 29 times for int8. So each
process measures each dtype once and does not trust names.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

_SHAPE = (128, 768, 768)  # tokens, output and input channels: milliseconds, and large enough for blocked products
_ROUNDS = 5
_GAIN = (
    1.5  # least useful gain; most measured gains are below 1.1 or above 3, those of bfloat16 on an EPYC from 1.7 to 2.2
)
_assumed: dict[torch.dtype, bool] = {}


@torch.compiler.assume_constant_result  # constant on one processor, so a trace records the answer and not the timing
def faster_than_float32(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of ``dtype`` (bfloat16, float16 or int8) clearly faster than float32 ones here."""
    return _assumed[dtype] if dtype in _assumed else speedup(dtype) > _GAIN


def assume(dtype: torch.dtype, faster: bool) -> None:
    """Answers :func:`faster_than_float32` for the rest of this process: a continued run computes as it began."""
    _assumed[dtype] = faster


@functools.cache
@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def speedup(dtype: torch.dtype) -> float:
    """Speed of torch's matrix product of ``dtype`` on this processor relative to float32, in any autocast context."""
    tokens, outputs, inputs = _SHAPE
    x_TI, w_OI = (torch.ones(size, inputs, dtype=torch.float32, device="cpu") for size in (tokens, outputs))
    narrow = x_TI.to(dtype), w_OI.to(dtype).T
    multiply = torch.mm if dtype.is_floating_point else torch._int_mm
    calls: tuple[Callable[[], Tensor], ...] = (lambda: x_TI @ w_OI.T, lambda: multiply(*narrow))
    best = [float("inf")] * len(calls)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # several wait for each other where other work runs: of 18 such clocks 7 then found nothing faster
    try:
        for i in range(1 + _ROUNDS):  # alternating; the first round only warms up
            for which, call in enumerate(calls):
                start = time.perf_counter()
                call()
                if i:
                    best[which] = min(best[which], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[0] / best[1]
