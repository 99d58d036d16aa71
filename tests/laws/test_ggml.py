"""GGUF's block types against the decoder of the package gguf: any bytes mean the same numbers, and come back as they were."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from lowbit.layouts import pack_qtensor, packed_layout, unpack_qtensor
from lowbit.layouts.ggml import BLOCK_TYPES, TERNARY, Parts
from lowbit.numerics import ClipSearch, MinMax, quantize

SHAPE = (6, 512)
ALL = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)


def random_bytes(kind, seed: int = 0) -> torch.Tensor:
    """Rows of blocks with every bit random but those of scales, which are finite numbers."""
    generator = torch.Generator().manual_seed(seed)
    blocks = SHAPE[0] * SHAPE[1] // kind.elements
    if kind.spec.grid == TERNARY:  # not every byte is five levels, or four
        codes = torch.randint(0, 3, (blocks, kind.elements), generator=generator, dtype=torch.uint8)
        scale = torch.randn(blocks, 1, generator=generator).half()
        return kind.join(Parts(codes, scale)).view(SHAPE[0], -1)
    data = torch.randint(0, 256, (blocks, kind.nbytes), generator=generator, dtype=torch.uint8)
    finite = torch.randn(blocks, 2, generator=generator).mul(0.1).half().view(torch.uint8).view(blocks, 4)
    finite[0] = 0
    places = {"Q2_K": (80, 4), "Q3_K": (108, 2), "Q6_K": (208, 2)}
    at, count = places.get(kind.name, (0, 1 if kind.name == "MXFP4" else 4 if kind.spec.grid.fields[1:] else 2))
    data[:, at : at + count] = 120 if kind.name == "MXFP4" else finite[:, :count]
    return data.view(SHAPE[0], -1)


def type_of(kind) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind.name]


@ALL
def test_bytes_of_a_block_are_those_of_the_format(kind):
    assert gguf.GGML_QUANT_SIZES[type_of(kind)] == (kind.elements, kind.nbytes)
    stored = sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in packed_layout(kind.spec, (8, 512)).values())
    levels = 12 if kind.name == "TQ1_0" else 0  # bytes that packing levels as digits saves
    assert stored == 8 * 512 // kind.elements * (kind.nbytes + levels)


@ALL
def test_any_bytes_come_back_as_they_were(kind):
    data = random_bytes(kind)
    tensors = kind.decode(data, SHAPE)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == packed_layout(kind.spec, SHAPE)
    assert torch.equal(kind.encode(tensors, SHAPE), data)


@ALL
def test_any_bytes_mean_the_numbers_that_gguf_reads_bit_for_bit(kind):
    data = random_bytes(kind)
    ours = unpack_qtensor(kind.decode(data, SHAPE), kind.spec, SHAPE).dequantize()
    theirs = torch.from_numpy(gguf.dequantize(data.numpy(), type_of(kind)))
    assert torch.equal(ours, theirs)


@ALL
@pytest.mark.parametrize("shape", [(1, 256), (5, 256), (1, 512)], ids=str)
def test_rows_of_one_block_are_encoded_too(kind, shape):
    q = quantize(torch.randn(*shape, generator=torch.Generator().manual_seed(3)), kind.spec, MinMax())
    data = kind.encode(pack_qtensor(q), shape)
    assert torch.equal(torch.from_numpy(gguf.dequantize(data.numpy(), type_of(kind))), q.dequantize())
    assert all(torch.equal(kind.decode(data, shape)[name], tensor) for name, tensor in pack_qtensor(q).items())


@ALL
@pytest.mark.parametrize("fit", [MinMax(), ClipSearch()], ids=str)
def test_a_weight_that_this_project_quantizes_is_read_by_gguf_as_it_is_meant(kind, fit):
    w = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(3))
    w[0, :256] = 0
    q = quantize(w, kind.spec, fit)
    data = kind.encode(pack_qtensor(q), SHAPE)
    assert torch.equal(torch.from_numpy(gguf.dequantize(data.numpy(), type_of(kind))), q.dequantize())
    assert q.dequantize()[0, :256].abs().max() <= (2.0**-24 if kind.name == "IQ4_NL" else 0)  # a table without zero


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rounding_to_nearest_loses_no_more_than_the_encoder_of_gguf(name):
    kind, w = BLOCK_TYPES[name], torch.randn(*SHAPE, generator=torch.Generator().manual_seed(4))
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), type_of(kind)), type_of(kind)))
    ours = quantize(w, kind.spec, MinMax()).dequantize()
    assert (ours - w).square().mean() <= 1.01 * (theirs - w).square().mean()
