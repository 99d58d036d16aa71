"""llama.cpp's products read inputs rounded to 8 bits: its own C functions on one row of every type."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from lowbit.layouts import pack_qtensor
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.numerics import MinMax, quantize

from engines import LLAMA_CPP, library

pytest.importorskip(LLAMA_CPP)
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

INPUTS = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), "q8_0"),
    **dict.fromkeys(("Q4_1", "Q5_1"), "q8_1"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), "q8_K"),
}
N = 1024


def product(name: str, kind: str, row: torch.Tensor, x: torch.Tensor) -> float:
    """The product of a row of blocks, uint8, and inputs, float32 ``[N]``, by the function that llama.cpp's matrix products call."""
    functions, held, result = library(), torch.zeros(2 * N, dtype=torch.uint8), ctypes.c_float()
    functions.ggml_cpu_init()  # tables of float16
    getattr(functions, f"quantize_row_{kind}")(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(held.data_ptr()), ctypes.c_int64(N)
    )
    short = name.lower() if name[-1] != "K" else f"{name[:-1].lower()}K"
    getattr(functions, f"ggml_vec_dot_{short}_{kind}")(
        ctypes.c_int(N), ctypes.byref(result), ctypes.c_size_t(0), ctypes.c_void_p(row.data_ptr()), ctypes.c_size_t(0),
        ctypes.c_void_p(held.data_ptr()), ctypes.c_size_t(0), ctypes.c_int(1),
    )  # fmt: skip
    return result.value


@pytest.mark.parametrize("name", INPUTS)
def test_a_product_of_llama_cpp_is_that_of_the_decoded_weight_and_of_inputs_rounded_to_8_bits(name):
    from llama_cpp_inputs import rounded

    kind, generator = BLOCK_TYPES[name], torch.Generator().manual_seed(0)
    q = quantize(torch.randn(8, N, generator=generator), kind.spec, MinMax())
    rows, w = kind.encode(pack_qtensor(q), (8, N)), q.dequantize().double()
    x = torch.randn(N, generator=generator)
    theirs = torch.tensor([product(name, INPUTS[name], row.contiguous(), x) for row in rows], dtype=torch.float64)
    exact, same = w @ x.double(), w @ rounded(x, kind.elements).double()
    # Q8_1 keeps the sum of a block in float16, for the products with minima.
    assert (theirs - same).norm() < (2e-4 if INPUTS[name] == "q8_1" else 1e-6) * exact.norm()
    assert (theirs - exact).norm() > 1e-3 * exact.norm()
