"""Laws of the layouts: packing loses no bit, takes no byte more than it says, and changes no value."""

from __future__ import annotations

import pytest
import torch

from lowbit.layouts import pack, pack_qtensor, packed_layout, packed_width, unpack, unpack_qtensor
from lowbit.numerics import (
    NF4,
    Affine,
    Block,
    Flat,
    Float,
    Int,
    MinMax,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    QTensor,
    Spec,
    Table,
    quantize,
    stored_bits,
)

from helpers import assert_same

WIDTHS = range(1, 9)
GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(16), PerGroup(7), Block(8, 16), PerCluster((10, 30, 5))]
SHAPE = (12, 45)  # no multiple of anything: ragged groups, half words at the end of rows


def codes(*shape: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def weight(shape: tuple[int, int] = SHAPE, size: float = 0.05) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * size


@pytest.mark.parametrize("bits", WIDTHS)
def test_element_i_sits_at_bit_i_times_bits_least_significant_first(bits):
    for n in (1, 2, 3, 7, 8, 9, 31, 64, 129):
        x = codes(3, n, bits=bits)
        packed = pack(x, bits)
        assert packed.shape == (3, packed_width(n, bits))
        for row, bytes_ in zip(x.tolist(), packed.tolist(), strict=True):
            stream = sum(code << i * bits for i, code in enumerate(row))
            assert bytes(bytes_) == stream.to_bytes(-(-n * bits // 8), "little")


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_restores_every_code(bits):
    for shape in ((1,), (5, 1), (4, 33), (2, 3, 64), (3, 1001)):
        x = codes(*shape, bits=bits)
        assert torch.equal(unpack(pack(x, bits), bits, shape[-1]), x)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_and_unpacking_accept_views_that_are_not_contiguous(bits):
    x = codes(40, 6, bits=bits).T
    assert torch.equal(unpack(pack(x, bits), bits, 40), x)
    wide = pack(codes(9, 80, bits=bits), bits)
    assert torch.equal(unpack(wide[::2], bits, 80), unpack(wide, bits, 80)[::2])


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_single_row_or_column_may_have_any_strides(bits):
    """As zero points of one group a row have, turned: contiguous to torch, which keeps the strides of dimensions of one."""
    for x in (codes(64, 1, bits=bits).T, codes(1, 64, bits=bits).T):
        packed = pack(x, bits)
        assert torch.equal(packed, pack(x.clone(memory_format=torch.contiguous_format), bits))
        assert torch.equal(unpack(packed.T.contiguous().T, bits, x.shape[1]), x)


def test_codes_that_do_not_fit_and_rows_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match=r"codes of 3 bits are below 8, found 8"):
        pack(torch.tensor([1, 8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"uint8, found torch.int64"):
        pack(torch.tensor([1, 2]), 3)
    with pytest.raises(ValueError, match=r"1 to 8 bits, found 9"):
        pack(torch.zeros(2, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"10 codes of 3 bits take 4 bytes, found 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 10)


SPECS = [
    *(Spec(Int(bits, symmetric), PerGroup(16)) for bits in WIDTHS for symmetric in (False, True)),
    *(Spec(Int(3), granularity) for granularity in GRANULARITIES),
    *(Spec(Int(4, zero="real"), granularity) for granularity in GRANULARITIES),
    *(Spec(NF4, granularity, scale_dtype="float32") for granularity in GRANULARITIES),
    Spec(Float(2, 1), PerGroup(16), scale_dtype="bfloat16"),
    Spec(Float(4, 3, "fn"), PerChannel()),
    Spec(Float(2, 1, shared_exponent=True), PerGroup(16), scale_dtype="float8_e8m0fnu"),
    Spec(Float(2, 1), PerGroup(16), Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32"), "float32"),
    Spec(Int(3), PerGroup(16), stats=Spec(Int(3), PerGroup(16))),
    Spec(Int(3), PerGroup(7), stats=Spec(Int(8), PerGroup(5), scale_dtype="float32")),
    Spec(Int(4, zero="real"), PerGroup(16), stats=Spec(Int(8), PerGroup(4))),
    Spec(NF4, PerGroup(16), stats=Spec(Int(8), PerGroup(256), scale_dtype="float32")),
    Spec(Int(2, True), PerGroup(16), stats=Spec(Int(8, True), PerChannel())),
    Spec(Int(2), Block(8, 16), stats=Spec(Int(6), PerTensor())),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_stored_tensor_dequantizes_to_the_same_bits_and_is_as_large_as_it_says(spec):
    q = quantize(weight(), spec, MinMax())
    tensors = pack_qtensor(q)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == packed_layout(spec, SHAPE)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) * 8 == stored_bits(spec, SHAPE) == q.stored_bits
    restored = unpack_qtensor(tensors, spec, SHAPE)
    assert torch.equal(restored.codes, q.codes)
    assert torch.equal(restored.dequantize(), q.dequantize())


def test_a_second_level_is_stored_under_the_name_of_what_it_holds():
    spec = Spec(Int(4, zero="real"), PerGroup(16), stats=Spec(Int(8), PerGroup(4)))
    names = pack_qtensor(quantize(weight(), spec, MinMax())).keys()
    assert set(names) == {"codes", "scale_codes", "scale_scale", "scale_zero", "zero_codes", "zero_scale", "zero_zero"}


SECOND_LEVELS = [
    Spec(Int(3), PerGroup(16)),
    Spec(Int(8), PerGroup(16)),
    Spec(Int(8), PerGroup(256), scale_dtype="float32"),
    Spec(Int(8), PerGroup(16), scale_dtype="bfloat16"),
    Spec(Int(8, True), PerChannel()),
    Spec(Int(6), PerTensor()),
    Spec(Float(4, 3), PerGroup(16)),
]


@pytest.mark.parametrize("stats", SECOND_LEVELS, ids=str)
@pytest.mark.parametrize("size", [1.0, 0.05, 0.005, 0.0005])
def test_the_codes_of_statistics_are_found_again_from_their_values(stats, size):
    generator = torch.Generator().manual_seed(2)
    for zero in ("int", "real"):
        for sided in (0, 4):  # one-sided rows have real zero points of both signs
            w = size * (torch.randn(64, 96, generator=generator) + sided * torch.randn(64, 1, generator=generator))
            q = quantize(w, Spec(Int(3, zero=zero), PerGroup(16), stats=stats), MinMax())
            assert torch.equal(unpack_qtensor(pack_qtensor(q), q.spec, q.shape).dequantize(), q.dequantize())


def test_scales_that_a_second_level_decodes_to_zero_survive():
    w = weight((8, 64), size=1.0)
    w[1] *= 1e-9  # beside large neighbours its scale has the code 0, which is lifted to the smallest number kept
    spec = Spec(Int(4, True), PerGroup(16), stats=Spec(Int(8), PerGroup(8)))
    q = quantize(w, spec, MinMax())
    assert ((q.params.scale > 0) & (q.params.scale < 1e-4)).sum() == 4
    assert torch.equal(unpack_qtensor(pack_qtensor(q), spec, q.shape).dequantize(), q.dequantize())


def test_parameters_that_the_format_does_not_hold_are_refused():
    q = quantize(weight(), Spec(Int(4), PerChannel()), MinMax())
    unrounded = QTensor(q.codes, Affine(q.params.scale * 1.0001, q.params.zero), q.spec)
    with pytest.raises(ValueError, match=r"scale is not as the format stores it.*as_stored"):
        pack_qtensor(unrounded)


def test_tensors_of_another_layer_are_refused():
    spec = Spec(Int(4), PerGroup(16))
    tensors = pack_qtensor(quantize(weight(), spec, MinMax()))
    with pytest.raises(ValueError, match=r"codes should be torch.uint8 \[12, 24\], found torch.uint8 \[12, 23\]"):
        unpack_qtensor(tensors, spec, (12, 48))
    del tensors["zero"]
    with pytest.raises(ValueError, match="no tensor 'zero'"):
        unpack_qtensor(tensors, spec, SHAPE)


def test_second_level_statistics_with_real_zero_points_keep_their_own_codes():
    torch.manual_seed(0)
    second = Spec(Int(3, zero="real"), PerGroup(16))
    spec = Spec(Int(3, zero="real"), PerGroup(16), stats=second)
    q = quantize(torch.randn(33, 64) + 0.3, spec, MinMax())
    tensors = pack_qtensor(q)
    assert {"scale_codes", "scale_scale", "scale_zero", "zero_codes"} <= set(tensors)
    restored = unpack_qtensor(tensors, spec, (33, 64))
    assert_same(restored.dequantize(), q.dequantize())
    assert all(torch.equal(a, tensors[name]) for name, a in pack_qtensor(restored).items())


def test_double_quantization_stores_the_mean_of_the_scales_once():
    torch.manual_seed(0)
    levels = Table(tuple(i / 127 for i in range(-127, 128)), absmax=True)
    spec = Spec(NF4, Flat(64), stats=Spec(levels, Flat(256), scale_dtype="float32"), stats_centred=True)
    q = quantize(torch.randn(40, 100), spec, MinMax())
    tensors = pack_qtensor(q)
    assert tensors["scale_mean"].shape == () and tensors["scale_mean"].dtype == torch.float32
    assert sum(8 * t.nbytes for t in tensors.values()) == stored_bits(spec, (40, 100))
    assert_same(unpack_qtensor(tensors, spec, (40, 100)).dequantize(), q.dequantize())
