"""Laws of floating grids: their numbers, roundings and scales are those of the published formats, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.layouts import pack_qtensor, unpack_qtensor
from lowbit.modules import ActSpec, fake_quantize_activation, quantize_activation
from lowbit.numerics import (
    FP4,
    Affine,
    Clipped,
    Float,
    Int,
    MinMax,
    PerChannel,
    PerGroup,
    PerInput,
    PerTensor,
    Spec,
    powers_of_two,
    quantize,
    stored_bits,
)

SPLITS = [split for bits in range(2, 9) for split in Float.of(bits).splits()]
SHARED = [Float(2, 1, shared_exponent=True), Float(3, 2, shared_exponent=True), Float(4, 3, "fn", shared_exponent=True)]
UNIT = Affine(torch.ones(1, 1))
TORCH = [(Float(4, 3, "fn"), torch.float8_e4m3fn), (Float(5, 2, "ieee"), torch.float8_e5m2)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(count: int, grid: Float, seed: int = 0) -> Tensor:
    """Numbers of every binade of ``grid`` and of those below it, with every level and every midpoint among them."""
    levels = torch.tensor(sorted(set(grid.table())))
    generator = torch.Generator().manual_seed(seed)
    top, bottom = math.log2(grid.max_level), math.log2(min(v for v in grid.table() if v > 0)) - 3
    size = (
        torch.exp2(bottom + (top - bottom) * torch.rand(count, generator=generator)) * normal(count, seed=seed).sign()
    )
    return torch.cat([size, levels, (levels[1:] + levels[:-1]) / 2])


def published(x: Tensor, grid: Float, bias: Tensor) -> Tensor:
    """Quantization as LLM-FP4 writes it (equations 5 to 7): clip, the exponent of each element, a step of its binade."""
    top = (2 - 2.0**-grid.mantissa) * torch.exp2(2**grid.exponent - 1 - bias)
    clipped = torch.minimum(torch.maximum(x, -top), top)
    p = (clipped.abs().log2() + bias).floor().clamp(min=1)
    step = torch.exp2(p - grid.mantissa - bias)
    return step * (clipped / step).round()


@pytest.mark.parametrize("grid", SPLITS, ids=lambda g: g.name)
def test_a_real_exponent_bias_is_a_scale(grid):
    x = normal(8, 500).double() * torch.rand(8, 500, generator=torch.Generator().manual_seed(1)).double() ** 4
    bias = torch.linspace(-2.3, 9.7, 8, dtype=torch.float64)[:, None]
    scale = torch.exp2(2 ** (grid.exponent - 1) - 1 - bias)
    ours = grid.decode(grid.encode(x, Affine(scale)), Affine(scale))
    torch.testing.assert_close(ours, published(x, grid, bias), rtol=1e-12, atol=0)


@pytest.mark.parametrize("grid", [*SPLITS, *SHARED], ids=str)
def test_every_element_takes_the_nearest_number_and_numbers_are_fixed_points(grid):
    x = normal(6, 300).double()
    params = MinMax()(x, grid)
    values = grid.decode(torch.arange(2**grid.bits).to(torch.uint8).expand(6, -1), params)
    found = grid.decode(grid.encode(x, params), params)
    torch.testing.assert_close((x - found).abs(), (x[:, :, None] - values[:, None]).abs().amin(-1), rtol=0, atol=1e-12)
    assert torch.equal(grid.decode(grid.encode(values, params), params), values)
    assert torch.equal(grid.fake(x, params), found)
    assert all(len(row.unique()) <= 2**grid.bits - 1 for row in found)


@pytest.mark.parametrize("grid", [*SPLITS, *SHARED, FP4], ids=str)
@pytest.mark.parametrize("per", ["row", "column"])
def test_without_gradients_one_pass_gives_the_same_numbers(grid, per):
    x = normal(7, 5000)
    x[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    scale = torch.rand(7, 1) + 0.1 if per == "row" else torch.rand(5000) + 0.1
    found = grid.fake(x, Affine(scale))
    through_torch = grid.fake(x.clone().requires_grad_(), Affine(scale)).detach()
    assert torch.equal(found.isnan(), x.isnan()) and torch.equal(found[~x.isnan()], through_torch[~x.isnan()])


@pytest.mark.parametrize(("grid", "dtype"), TORCH, ids=["e4m3fn", "e5m2"])
def test_rounding_is_that_of_torchs_casts_ties_included(grid, dtype):
    x = spread(20000, grid)
    theirs = x.to(dtype)
    ours = grid.encode(x[None], UNIT)[0]
    assert torch.equal(grid.decode(ours[None], UNIT)[0], theirs.float())
    nonzero = theirs.float() != 0  # a negative number that vanishes is a zero without a sign here
    assert torch.equal(ours[nonzero], theirs.view(torch.uint8)[nonzero])


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float6_e3m2fn", "float6_e2m3fn", "float8_e4m3fn", "float8_e5m2"])
def test_rounding_is_that_of_ml_dtypes_ties_included(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    e, m = int(name.split("_e")[1][0]), int(name.split("m")[1][0])
    grid = next((g for g, dtype in TORCH if name in str(dtype)), Float(e, m))
    x = spread(20000, grid)
    theirs = torch.from_numpy(x.numpy().astype(getattr(ml_dtypes, name)).astype("float32"))
    assert torch.equal(grid.decode(grid.encode(x[None], UNIT), UNIT)[0], theirs)


@pytest.mark.parametrize(("grid", "largest"), [(TORCH[0][0], 448), (TORCH[1][0], 57344), (Float(2, 1), 6)])
def test_what_is_too_large_becomes_the_largest_number(grid, largest):
    x = torch.tensor([[largest * 1.01, largest * 1000.0, -largest * 1.2, math.inf]])
    assert grid.decode(grid.encode(x, UNIT), UNIT).tolist() == [[largest, largest, -largest, largest]]


def test_ties_go_to_the_even_code():
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0]])
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert Float(2, 1).decode(Float(2, 1).encode(x, UNIT), UNIT).tolist() == [wanted + [-v for v in wanted]]


def test_one_exponent_bit_is_a_uniform_grid():
    x = normal(20, 64)
    for bits in range(3, 9):
        grid, uniform = Float(1, bits - 2), Int(bits, symmetric=True)
        found, wanted = (g.decode(g.encode(x, MinMax()(x, g)), MinMax()(x, g)) for g in (grid, uniform))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_twice_the_values_are_twice_the_result():
    x = normal(4, 100)
    for grid in SPLITS:
        p, q = MinMax()(x, grid), MinMax()(2 * x, grid)
        assert torch.equal(grid.decode(grid.encode(2 * x, q), q), 2 * grid.decode(grid.encode(x, p), p))


def test_splits_are_all_ways_to_cut_the_bits_and_each_is_named():
    assert [g.name for g in Float(2, 1).splits()] == ["E2M1", "E3M0", "E1M2"]
    assert [g.name for g in Float.of(8).splits()] == ["E4M3", "E5M2", "E3M4", "E2M5", "E1M6"]
    assert Float.of(4, "E3M0") == Float(3, 0) and Float.of(6) == Float(3, 2)
    for name in ("E4M3", "e2m1", "E2M1fn", "", "E0M3"):
        with pytest.raises(ValueError, match="found"):
            Float.of(4, name)


# Microscaling


@pytest.mark.parametrize(("grid", "top"), list(zip(SHARED, (2, 4, 8), strict=True)), ids=str)
def test_a_shared_exponent_is_the_one_of_the_standard(grid, top):
    x = normal(500, 32) * torch.exp2(
        torch.randint(-60, 60, (500, 1), generator=torch.Generator().manual_seed(2)).float()
    )
    scale = MinMax()(x, grid).scale
    assert scale.tolist() == [[2.0 ** (math.floor(math.log2(m)) - top)] for m in x.abs().amax(1).tolist()]


@pytest.mark.parametrize("grid", SHARED, ids=str)
def test_a_shared_exponent_holds_at_the_edges_of_binades_and_of_storage(grid):
    x = torch.tensor([[1.0], [math.nextafter(2.0, 0)], [2.0], [0.0], [2.0**-120], [1e-38], [-3.0]])
    scale = MinMax()(x, grid).scale
    assert torch.equal(scale.frexp().mantissa, torch.full_like(scale, 0.5)) and (scale > 0).all()
    q = quantize(x, Spec(grid, PerChannel(), scale_dtype="float8_e8m0fnu"), MinMax())
    assert torch.equal(q.params.scale, scale) and torch.isfinite(q.dequantize()).all()


def test_a_shared_exponent_passes_gradients_to_the_range():
    hi = torch.tensor([[5.0]], requires_grad=True)
    Float(2, 1, shared_exponent=True).from_range(-hi, hi).scale.sum().backward()
    assert hi.grad is not None and hi.grad.item() == pytest.approx(1 / 6)


def mxfp4(x: Tensor) -> Tensor:
    """The conversion of OCP Microscaling 1.0, section 6.3, element by element."""
    out = torch.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[row, start : start + 32]
            scale = 2.0 ** (math.floor(math.log2(block.abs().max().item())) - 2)
            for i, v in enumerate((block / scale).tolist()):
                size = min(abs(v), 6.0)
                step = 0.5 if size < 2 else 1.0 if size < 4 else 2.0
                out[row, start + i] = math.copysign(round(size / step) * step, v) * scale
    return out


def test_mxfp4_is_the_conversion_of_the_standard_in_four_and_a_quarter_bits():
    x = normal(8, 96) * torch.exp2(4 * normal(8, 1, seed=3))
    spec = Spec(Float(2, 1, shared_exponent=True), PerGroup(32), scale_dtype="float8_e8m0fnu")
    q = quantize(x, spec, MinMax())
    assert torch.equal(q.dequantize(), mxfp4(x))
    tensors = pack_qtensor(q)
    assert tensors["scale"].dtype == torch.float8_e8m0fnu and tensors["scale"].shape == (8, 3)
    assert 8 * sum(t.nbytes for t in tensors.values()) == stored_bits(spec, (8, 96)) == 4.25 * x.numel()
    assert torch.equal(unpack_qtensor(tensors, spec, (8, 96)).dequantize(), mxfp4(x))
    act = ActSpec(Spec(spec.grid, PerGroup(32)))
    assert torch.equal(fake_quantize_activation(x, act), mxfp4(x))


def nvfp4(x: Tensor) -> Tensor:
    """Blocks of 16: E2M1 by torch's own casts; scales in E4M3 of the tensor's float32 scale absmax / (448 * 6)."""
    of_tensor = x.abs().max() / (448 * 6)
    blocks = x.view(len(x), -1, 16)
    of_block = ((blocks.abs().amax(-1, keepdim=True) / 6) / of_tensor).to(torch.float8_e4m3fn).float() * of_tensor
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    v = (blocks / of_block.clamp(min=1e-38)).nan_to_num()
    nearest = levels[(v.abs()[..., None] - levels).abs().argmin(-1)]
    return (nearest * v.sign() * of_block).view_as(x)


def test_nvfp4_has_scales_of_eight_bits_and_one_for_the_tensor():
    x = normal(8, 96) * torch.exp2(2 * normal(8, 1, seed=3))
    spec = Spec(Float(2, 1), PerGroup(16), Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32"), "float32")
    q = quantize(x, spec, MinMax())
    torch.testing.assert_close(q.dequantize(), nvfp4(x), rtol=1e-6, atol=0)
    assert stored_bits(spec, (8, 96)) == 8 * 96 * 4 + 8 * 6 * 8 + 32
    torch.testing.assert_close(fake_quantize_activation(x, ActSpec(spec)), nvfp4(x), rtol=1e-6, atol=0)


def test_a_scale_that_eight_bits_round_to_nothing_leaves_zeros():
    x = torch.cat([1e-9 * normal(1, 16), normal(1, 16)])
    spec = Spec(Float(2, 1), PerGroup(16), Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32"), "float32")
    assert quantize(x, spec, MinMax()).dequantize()[0].abs().max() < 1e-30
    assert fake_quantize_activation(x, ActSpec(spec))[0].abs().max() < 1e-30


def test_nan_and_inf_in_one_block_leave_the_scales_of_the_others_alone():
    spec = Spec(Float(2, 1), PerGroup(16), Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32"), "float32")
    x = normal(2, 48)
    broken = x.clone()
    broken[0, 3], broken[1, 20] = math.nan, math.inf
    x[0, :16], x[1, 16:32] = 0, 0
    found, wanted = (fake_quantize_activation(each, ActSpec(spec)) for each in (broken, x))
    assert found[0, :16].isnan().all() and found[1, 16:32].isnan().all()
    assert torch.equal(found[0, 16:], wanted[0, 16:]) and torch.equal(found[1, 32:], wanted[1, 32:])
    assert fake_quantize_activation(torch.empty(0, 48), ActSpec(spec)).shape == (0, 48)


# Scales of input channels


def test_static_channels_are_quantized_each_on_its_own_scale():
    x = normal(5, 3, 8)
    spec = Spec(Float(2, 1), PerInput())
    scale = torch.exp2(torch.arange(8.0))[:, None] / 100
    codes, _ = quantize_activation(x, ActSpec(spec, static=True), Affine(scale))
    one_by_one = [spec.grid.encode(x[..., j].reshape(1, -1), Affine(scale[j : j + 1])).view(5, 3) for j in range(8)]
    assert torch.equal(codes, torch.stack(one_by_one, -1))


@pytest.mark.parametrize("grid", [Float(2, 1), Float(4, 3)], ids=str)  # whose midpoints half precision holds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_half_precision_take_the_codes_of_their_wider_copies(dtype, grid):
    x = spread(200, Float(2, 1)).to(dtype)[None]
    assert torch.equal(grid.encode(x, Affine(UNIT.scale.to(dtype))), grid.encode(x.float(), UNIT))


def test_a_table_of_powers_of_two_says_how_often_a_scale_is_halved():
    grid = powers_of_two(3)
    scales = 0.7 * torch.exp2(-torch.arange(8.0))[None]
    params = MinMax()(scales, grid)
    assert grid.encode(scales, params).tolist() == [list(range(8))]
    assert torch.equal(grid.decode(grid.encode(scales, params), params), scales)


def test_the_floating_table_of_bitsandbytes_is_not_e2m1():
    ours, theirs = sorted(set(FP4.table())), sorted({v / 6 for v in Float(2, 1).table()})
    differ = [i for i in range(15) if not math.isclose(ours[i], theirs[i])]
    assert differ == [6, 8] and ours[8] == pytest.approx(1 / 192)


def test_clipping_beyond_the_extremes_is_a_wider_range():
    x = normal(3, 50)
    wide = Clipped(torch.full((3, 1), 1.2), torch.full((3, 1), 1.2))(x, Float(2, 1))
    torch.testing.assert_close(wide.scale, 1.2 * MinMax()(x, Float(2, 1)).scale)
