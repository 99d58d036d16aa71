"""Laws of the number formats: every grid, granularity, fit, statistic and serializable value is run through its contract."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowbit.numerics import (
    FP4,
    HALVES,
    NF3,
    NF4,
    AbsMax,
    AbsSum,
    Affine,
    Block,
    Clipped,
    ClipSearch,
    Float,
    Gram,
    Int,
    Magnitude,
    Minimum,
    MinMax,
    Normal,
    Percentile,
    PerChannel,
    PerCluster,
    PerGroup,
    PerInput,
    PerTensor,
    PerToken,
    Range,
    RowBands,
    Samples,
    SignedScale,
    Spec,
    Table,
    TokenRange,
    TwoSided,
    Unsigned,
    extremes,
    fake_quantize,
    fit_params,
    from_dict,
    mean_abs,
    quantize,
    to_dict,
)

G, K = 12, 40
E2M1, E4M3, E5M2 = Float(2, 1), Float(4, 3, "fn"), Float(5, 2, "ieee")
INTS = [
    Int(b, symmetric, zero) for b in range(1, 9) for symmetric, zero in ((False, "int"), (False, "real"), (True, "int"))
]
SKEWED = TwoSided((-1.0, -0.4, 0.0, 1.0))
TABLES = [NF3, SKEWED, HALVES, NF4, FP4, Table((-1.0, 1.0)), Table((-1.0, 0.0, 0.1, 1.0)), Table((0.0, 1.0, 2.0, 4.0))]
TABLES += [Table((-3.0, -1.0, 0.0, 2.0), signed=True)]
NORMALS = [Normal(bits) for bits in (1, 2, 3, 4, 8)]
FULL = [Int(b, symmetric=True, full=True) for b in (2, 4, 8)]
# One side of a SignedScale is clipped by up to a step, and Unsigned has no negative numbers.
BLOCKS = [SignedScale(3), SignedScale(4), SignedScale(8), Minimum(2), Minimum(4), Minimum(5), Unsigned(6)]
GRIDS = [*INTS, *FULL, *BLOCKS, E2M1, Float(3, 2), E4M3, E5M2, Float(1, 2), *NORMALS, *TABLES]
GRANULARITIES = [
    PerTensor(),
    PerToken(),
    PerChannel(),
    PerGroup(1),
    PerGroup(16),
    PerGroup(7),
    PerGroup(100),
    Block(4, 16),
    Block(5, 7),
    Block(100, 3),
    PerCluster((10, 1, 29)),
    PerInput(),
    RowBands(1),
    RowBands(4),
    RowBands(100),
]


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _placed(grid, x_GK: Tensor) -> Affine:
    return MinMax()(x_GK, grid)


def _levels(grid) -> Tensor:
    """Every code once, as one granule after another: [G, 2**bits]."""
    return torch.arange(2**grid.bits).to(torch.uint8).expand(G, -1)


def _sqnr_db(x: Tensor, y: Tensor) -> float:
    return 10 * math.log10(((x**2).sum() / ((x - y) ** 2).sum()).item())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_value_of_a_grid_is_a_fixed_point(grid):
    for dtype in (torch.float32, torch.float64):
        params = _placed(grid, _normal(G, K, dtype=dtype))
        values = grid.decode(_levels(grid), params)
        codes = grid.encode(values, params)
        assert torch.equal(grid.decode(codes, params), values)
        assert torch.equal(grid.encode(grid.decode(codes, params), params), codes)


@pytest.mark.parametrize("grid", INTS, ids=str)
def test_every_code_of_an_integer_grid_is_a_fixed_point(grid):
    params = _placed(grid, _normal(G, K))
    assert torch.equal(grid.encode(grid.decode(_levels(grid), params), params), _levels(grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_encode_takes_the_nearest_value(grid):
    x = _normal(G, K)
    params = _placed(grid, x)
    values = grid.decode(_levels(grid), params)
    found = grid.decode(grid.encode(x, params), params)
    best = (x[:, :, None] - values[:, None, :]).abs().amin(-1)
    # The integer dialect rounds w/s and adds a whole zero: nearest too, so the law has no exception.
    torch.testing.assert_close((x - found).abs(), best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_fit_the_width_the_grid_says(grid):
    codes = grid.encode(_normal(G, K) * 100, _placed(grid, _normal(G, K, seed=1)))
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**grid.bits


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fake_quantization_is_exactly_decode_of_encode(grid):
    for dtype in (torch.float32, torch.float64):
        x = _normal(G, 400, dtype=dtype) * 3
        params = _placed(grid, _normal(G, K, seed=1, dtype=dtype))
        assert torch.equal(grid.fake(x, params), grid.decode(grid.encode(x, params), params))


@pytest.mark.parametrize("grid", [g for g in GRIDS if g not in (Table((0.0, 1.0, 2.0, 4.0)), *BLOCKS, *FULL)], ids=str)
def test_a_fitted_grid_reaches_the_extremes(grid):
    x = _normal(G, K)
    params = _placed(grid, x)
    values = grid.decode(_levels(grid), params)
    lo, hi = extremes(x)
    step = (values.sort(1).values.diff(dim=1)).amax(1, keepdim=True)
    assert (values.amax(1, keepdim=True) >= hi - step / 2 - 1e-12).all()
    assert (values.amin(1, keepdim=True) <= lo + step / 2 + 1e-12).all()


@pytest.mark.parametrize("grid", [g for g in INTS if (g.bits > 1 if g.symmetric else g.zero == "int")], ids=str)
def test_integer_grids_represent_zero(grid):
    x = _normal(G, K) + 5  # all positive: the range is widened to contain zero
    params = _placed(grid, x)
    zeros = torch.zeros(G, 1, dtype=x.dtype)
    assert torch.equal(grid.decode(grid.encode(zeros, params), params), zeros)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_constant_granule_is_kept_or_at_least_finite(grid):
    for value in (0.0, 0.3, -0.3):
        x = torch.full((2, 5), value, dtype=torch.float64)
        back = grid.decode(grid.encode(x, _placed(grid, x)), _placed(grid, x))
        assert torch.isfinite(back).all()
        has_value = value == 0 or grid.bits > 1 or not getattr(grid, "symmetric", True)
        if grid in FULL and value > 0:  # the one value that it clips
            torch.testing.assert_close(back, x * (1 - 2.0 ** (1 - grid.bits)), rtol=0, atol=1e-12)
        elif has_value and grid not in (*TABLES, Unsigned(6)) and grid != Int(1, symmetric=True):
            torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [{"symmetric": True}, {}, {"zero": "real"}], ids=str)
def test_the_error_of_integer_grids_falls_with_bits(kind):
    x = _normal(G, 1000)
    errors = []
    for bits in range(2, 9):
        grid = Int(bits, **kind)
        errors.append(((grid.decode(grid.encode(x, _placed(grid, x)), _placed(grid, x)) - x) ** 2).mean().item())
    assert all(b < a / 2 for a, b in pairwise(errors))


def test_eight_bits_give_forty_decibels_and_four_bits_twenty():
    x = _normal(64, 128)
    for grid, floor in ((Int(8), 40), (Int(4), 18), (NF4, 19), (E4M3, 30), (E2M1, 16)):
        params = _placed(grid, x)
        assert _sqnr_db(x, grid.decode(grid.encode(x, params), params)) > floor


def test_symmetric_integers_keep_both_extremes():
    x = torch.tensor([[-7.0, 3.0, 7.0]])
    grid = Int(4, symmetric=True)
    assert torch.equal(grid.decode(grid.encode(x, _placed(grid, x)), _placed(grid, x)), x)


def test_one_symmetric_bit_is_plus_and_minus_the_largest_magnitude():
    x = torch.tensor([[-0.5, 0.1, 2.0]])
    grid = Int(1, symmetric=True)
    assert grid.decode(grid.encode(x, _placed(grid, x)), _placed(grid, x)).tolist() == [[-2.0, 2.0, 2.0]]


def test_nf4_gives_the_values_that_bitsandbytes_gives():
    x = torch.tensor([[0.12, -0.5, 0.03, 0.9, -1.3, 0, 0.61, -0.05]], dtype=torch.float64)
    params = _placed(NF4, x)
    codes = NF4.encode(x, params)
    assert codes.tolist() == [[8, 3, 7, 14, 0, 7, 12, 7]]
    expected = torch.tensor([[0.103454, -0.513393, 0, 0.939844, -1.3, 0, 0.572923, 0]], dtype=torch.float64)
    torch.testing.assert_close(NF4.decode(codes, params), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["e4m3fn", "e5m2"]
)
def test_eight_bit_floats_are_torchs_bit_for_bit(grid, dtype):
    patterns = torch.arange(256, dtype=torch.uint8)
    theirs = patterns.view(dtype).float()
    finite = torch.isfinite(theirs)
    ours = grid.decode(patterns, Affine(torch.ones(1)))
    assert torch.equal(ours[finite], theirs[finite])


def test_nf3_has_the_published_levels_and_thresholds():
    """BitDistiller: the recipe of NF4 with three negative and four positive levels."""
    offset = (1 - 1 / 16 + 1 - 1 / 14) / 2

    def quantiles(count: int) -> Tensor:
        share = torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1]
        return math.sqrt(2) * torch.erfinv(2 * share - 1)

    positive, negative = quantiles(4), quantiles(3)
    levels = torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)]) / positive[0]
    torch.testing.assert_close(torch.tensor(NF3.values, dtype=torch.float64), levels, rtol=0, atol=1e-7)
    middles = [(a + b) / 2 for a, b in pairwise(NF3.values)]
    wanted = [-0.767511, -0.390977, -0.123466, 0.091669, 0.282666, 0.502490, 0.811493]
    assert middles == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("grid", [NF3, SKEWED], ids=str)
def test_a_two_sided_table_meets_both_ends_of_a_skewed_range_and_keeps_zero(grid):
    x = torch.cat([torch.rand(G, K, dtype=torch.float64) ** 3, -0.01 * torch.rand(G, 4, dtype=torch.float64)], 1)
    x[:, 7] = 0.0
    params = _placed(grid, x)
    back = grid.decode(grid.encode(x, params), params)
    lo, hi = extremes(x)
    torch.testing.assert_close(back.amin(1, keepdim=True), lo)
    torch.testing.assert_close(back.amax(1, keepdim=True), hi)
    assert torch.equal(back[:, 7], x[:, 7])
    one = Table(grid.values)
    other = one.decode(one.encode(x, _placed(one, x)), _placed(one, x))
    assert (back - x).square().sum() < (other - x).square().sum()


def test_a_granule_on_one_side_of_zero_has_finite_scales():
    for x in (torch.rand(3, 9) + 0.1, -torch.rand(3, 9) - 0.1, torch.zeros(3, 9)):
        q = quantize(x, Spec(NF3, PerGroup(9)), MinMax())
        assert torch.isfinite(q.dequantize()).all() and all((p > 0).all() for p in q.params)


@pytest.mark.parametrize("of", ["mean", "largest"])
def test_a_magnitude_ignores_what_fills_up_a_short_granule(of):
    x, spec = _normal(4, 23, dtype=torch.float32), Spec(HALVES, PerGroup(16), scale_dtype="float32")
    fit = Magnitude(of, 1.5)
    scales = fit_params(x, spec, fit).scale.view(4, 2)  # pyright: ignore[reportAttributeAccessIssue]
    tail = x[:, 16:].abs()
    wanted = tail.mean(1) if of == "mean" else tail.amax(1)
    torch.testing.assert_close(scales[:, 1], wanted)
    assert torch.equal(fake_quantize(x, spec, fit), quantize(x, spec, fit).dequantize())


def test_constant_ranges_pass_gradients_to_the_values_alone():
    x = _normal(3, 8).requires_grad_()
    y = fake_quantize(x, Spec(Int(4), PerChannel(), scale_dtype="float32"), through_fit=False)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_e2m1_has_the_published_magnitudes():
    assert E2M1.table()[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.mark.parametrize("grid", [Int(4), Int(3, zero="real"), Int(4, symmetric=True), NF4, E2M1], ids=str)
def test_fake_gradient_is_straight_through_inside_the_range_and_none_outside(grid):
    x = _normal(G, K).requires_grad_()
    lo, hi = torch.full((G, 1), -0.7, dtype=torch.float64), torch.full((G, 1), 0.7, dtype=torch.float64)
    params = grid.from_range(lo, hi)
    grid.fake(x, params).sum().backward()
    values = grid.decode(_levels(grid), params)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    step = 0.7 / (2 ** (grid.bits - 1) - 1)
    well_inside, well_outside = (x > low) & (x < high), (x < low - step) | (x > high + step)
    assert well_inside.any() and well_outside.any()
    assert torch.allclose(x.grad[well_inside], torch.ones_like(x.grad[well_inside]))
    assert (x.grad[well_outside] == 0).all()


@pytest.mark.parametrize("grid", [Int(4, zero="real"), Int(4, symmetric=True), NF4], ids=str)
def test_fake_gradient_to_the_range_is_that_of_a_clipped_value(grid):
    # An element beyond the range is stored as the range's end, so d(value) / d(end) = 1.
    x = torch.tensor([[5.0]], dtype=torch.float64)
    hi = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    grid.fake(x, grid.from_range(torch.full((1, 1), -0.5, dtype=torch.float64), hi)).sum().backward()
    torch.testing.assert_close(hi.grad, torch.ones_like(hi))


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("grid", [NF4, E2M1, Table((0.0, 0.5, 1.0, 1.0))], ids=str)
def test_gradients_of_levels_in_compiled_code_are_those_of_torch(grid, by_row):
    """Compiled code does float32 alone."""
    x, g = (_normal(G, K, seed=s).float() for s in (1, 2))
    scale = _normal(G, 1, seed=3).abs().float() + 0.3 if by_row else _normal(1, K, seed=3).abs().float()[0] + 0.3
    found, wanted = ([t.to(dtype).requires_grad_() for t in (x, scale)] for dtype in (torch.float32, torch.float64))
    ((y, of_found), (z, of_wanted)) = (
        (out, torch.autograd.grad(out, leaves, g.to(out.dtype)))
        for leaves, out in ((leaves, grid.fake(leaves[0], Affine(leaves[1]))) for leaves in (found, wanted))
    )
    torch.testing.assert_close(y.double(), z, rtol=1e-6, atol=0)
    for a, b in zip(of_found, of_wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert (of_found[0] == 0).any() and (of_found[0] != 0).any()


@pytest.mark.parametrize("make", [lambda: Int(0), lambda: Int(9), lambda: Int(4, zero="x"), lambda: Float(0, 3)])
def test_impossible_grids_are_refused(make):
    with pytest.raises(ValueError, match="found"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Float(5, 3),
        lambda: Float(2, 1, "nan"),
        lambda: Table((1.0,)),
        lambda: Table((0.0, 0.0)),
        lambda: TwoSided((0.0, 1.0, 2.0)),
        lambda: TwoSided((-1.0, 0.5, 1.0)),
        lambda: TwoSided((-1.0, 0.0, 0.0, 1.0)),
    ],
)
def test_impossible_levels_are_refused(make):
    with pytest.raises(ValueError, match="found"):
        make()


# ---------------------------------------------------------------------------------------------------- granularities


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_join_undoes_split(granularity):
    for shape in ((9, 40), (3, 3, 40), (1, 40), (2, 2, 2, 40)):
        x = _normal(*shape)
        assert torch.equal(granularity.join(granularity.split(x), shape), x)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_the_number_of_granules_is_what_the_parameter_shape_says(granularity):
    assert len(granularity.split(_normal(9, 40))) == math.prod(granularity.param_shape((9, 40)))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_filling_changes_no_extremes_and_adds_no_importance(granularity):
    x = _normal(9, 40)
    number = torch.arange(math.prod(granularity.param_shape((9, 40))))[:, None].expand_as(granularity.split(x))
    owner = granularity.join(number, (9, 40))
    lo, hi = extremes(granularity.split(x))
    weight = granularity.split(torch.ones_like(x), fill_zero=True).sum(1)
    for g in owner.unique().tolist():
        own = x[owner == g]
        assert (lo[g].item(), hi[g].item(), weight[g].item()) == (own.min(), own.max(), own.numel())


def test_granules_are_laid_out_row_major():
    x = torch.arange(24.0).reshape(4, 6)
    assert PerGroup(4).split(x)[:3].tolist() == [[0, 1, 2, 3], [4, 5, 5, 5], [6, 7, 8, 9]]
    assert Block(2, 3).split(x)[:2].tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert PerCluster((1, 5)).split(x)[0].unique().tolist() == [0, 6, 12, 18]


@pytest.mark.parametrize(
    "make",
    [lambda: PerGroup(0), lambda: Block(0, 3), lambda: PerCluster(()), lambda: PerCluster((3, 0)), lambda: RowBands(0)],
)
def test_impossible_granularities_are_refused(make):
    with pytest.raises(ValueError, match="found"):
        make()


def test_clusters_that_do_not_cover_the_channels_are_refused():
    with pytest.raises(ValueError, match="cover 5 channels, the tensor has 6"):
        PerCluster((2, 3)).split(_normal(2, 6))


# ------------------------------------------------------------------------------------------------------------- fits


@pytest.mark.parametrize("grid", [Int(3), Int(2, symmetric=True), NF4, E2M1], ids=str)
def test_a_clip_search_never_loses_more_than_the_extremes(grid):
    x = _normal(G, K) ** 3
    weight = _normal(G, K, seed=1).abs()

    def loss(params, importance):
        return ((grid.decode(grid.encode(x, params), params) - x).abs() ** 2.4 * importance).sum(1)

    for importance in (None, weight):
        seen = torch.ones_like(x) if importance is None else importance
        searched, plain = loss(ClipSearch()(x, grid, importance), seen), loss(MinMax()(x, grid), seen)
        assert (searched <= plain).all()
        assert searched.sum() < plain.sum()


def test_a_clip_search_finds_the_best_shrink_of_its_list():
    x, grid, search = _normal(1, K) ** 3, Int(3), ClipSearch(steps=20, max_shrink=0.5, norm=2)
    lo, hi = extremes(x)
    losses = []
    for i in range(10):
        p = grid.from_range(lo * (1 - i / 20), hi * (1 - i / 20))
        losses.append(((grid.decode(grid.encode(x, p), p) - x) ** 2).sum().item())
    p = search(x, grid)
    assert ((grid.decode(grid.encode(x, p), p) - x) ** 2).sum().item() == pytest.approx(min(losses), rel=1e-12)


def test_the_whole_percentile_is_the_extremes():
    x = _normal(G, K)
    assert all(torch.equal(a, b) for a, b in zip(Percentile(1.0)(x, Int(4)), MinMax()(x, Int(4))))


@pytest.mark.parametrize("p", [0.9, 0.975, 0.999])
def test_percentiles_are_torchs_quantiles(p):
    x = _normal(G, K)
    grid = Int(8, zero="real")
    lo, hi = (torch.quantile(x, q, dim=1, keepdim=True) for q in (1 - p, p))
    for found, expected in zip(Percentile(p)(x, grid), grid.from_range(lo, hi)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_shares_of_a_chosen_range_scale_the_extremes():
    x = _normal(G, K)
    lo, hi = extremes(x)
    shares = torch.rand(2, G, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.5 + 0.5
    clip = Clipped(shares[0], shares[1])
    expected = Int(4).from_range(lo * shares[0], hi * shares[1])
    assert all(torch.equal(a, b) for a, b in zip(clip(x, Int(4)), expected))
    some = clip.rows(slice(1, None, 3))(x[1::3], Int(4))
    assert all(torch.equal(a, b[1::3]) for a, b in zip(some, expected))


@pytest.mark.parametrize("granularity", [PerGroup(16), Block(5, 7), PerCluster((10, 1, 29))], ids=str)
def test_what_fills_up_a_short_granule_does_not_sway_a_search(granularity):
    spec, x = Spec(Int(3), granularity, scale_dtype="float32"), _normal(9, 40) ** 3
    params = fit_params(x, spec, ClipSearch(steps=20))
    x_GK, number = granularity.split(x), torch.arange(len(params.scale))[:, None]
    owner = granularity.join(number.expand_as(x_GK), (9, 40))
    for g in range(len(number)):
        alone = ClipSearch(steps=20)(x[owner == g][None], spec.grid)
        torch.testing.assert_close(params.scale[[g]], alone.scale.float().double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "make", [lambda: Percentile(0.5), lambda: Percentile(99.9), lambda: ClipSearch(steps=0), lambda: Magnitude("all")]
)
def test_impossible_fits_are_refused(make):
    with pytest.raises(ValueError, match="found"):
        make()


# -------------------------------------------------------------------------------------------------- specs, tensors

DOUBLE = Spec(Int(8, symmetric=True), PerGroup(4))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_a_quantized_tensor_restores_what_its_codes_say(granularity):
    x = _normal(9, 40, dtype=torch.float32)
    for grid in (Int(4), Int(3, zero="real"), Int(4, symmetric=True), NF4, E4M3):
        q = quantize(x, Spec(grid, granularity), MinMax())
        assert q.shape == (9, 40) and q.codes.dtype == torch.uint8
        assert len(q.params.scale) == math.prod(granularity.param_shape((9, 40)))
        x_GK = granularity.split(x)
        expected = granularity.join(grid.decode(grid.encode(x_GK, q.params), q.params), (9, 40))
        assert torch.equal(q.dequantize(), expected)
        assert q.codes.is_contiguous()
        assert _sqnr_db(x, q.dequantize()) > 8


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_quantizing_twice_changes_nothing(granularity):
    for grid in (*GRIDS[3:9], NF4, E2M1):
        spec = Spec(grid, granularity, scale_dtype="float32")
        once = quantize(_normal(9, 40, dtype=torch.float32), spec, MinMax())
        back = once.dequantize()
        again = grid.encode(granularity.split(back), once.params)
        assert torch.equal(granularity.join(again, once.shape), once.codes)


def test_fake_quantization_of_a_tensor_is_the_stored_one_where_scales_are_exact():
    x = _normal(9, 40, dtype=torch.float32)
    for granularity in GRANULARITIES:
        spec = Spec(Int(4), granularity, scale_dtype="float32")
        assert torch.equal(fake_quantize(x, spec, MinMax()), quantize(x, spec, MinMax()).dequantize())


@pytest.mark.parametrize("stats", [None, DOUBLE], ids=["plain", "double"])
@pytest.mark.parametrize("grid", [Int(4), Int(3, zero="real"), NF4], ids=str)
def test_storing_parameters_twice_changes_nothing(grid, stats):
    spec = Spec(grid, PerGroup(8), stats)
    params = fit_params(_normal(9, 40, dtype=torch.float32), spec, MinMax())
    for once, again in zip(params, spec.as_stored(params, columns=5)):
        assert (once is None and again is None) or torch.equal(once, again)


def test_the_second_level_can_be_stored_one_column_of_groups_at_a_time():
    spec = Spec(Int(3, zero="real"), PerGroup(8), Spec(Int(6), PerGroup(4)))
    x = _normal(9, 40, dtype=torch.float32)
    whole = fit_params(x, spec, MinMax())
    for column in range(5):
        part = fit_params(x[:, 8 * column : 8 * column + 8], spec, MinMax())
        assert all(torch.equal(a[column::5], b) for a, b in zip(whole, part))


def test_a_scale_that_the_storage_dtype_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="does not fit float16"):
        quantize(torch.tensor([[1e7, -1e7]]), Spec(Int(4), PerChannel()), MinMax())
    quantize(torch.tensor([[1e7, -1e7]]), Spec(Int(4), PerChannel(), scale_dtype="bfloat16"), MinMax())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="1 values that are NaN or Inf"):
        quantize(torch.tensor([[1.0, bad]]), Spec(Int(4), PerChannel()), MinMax())


@pytest.mark.parametrize("magnitude", [1e-4, 1e-5])
def test_tiny_weights_keep_their_signal(magnitude):
    # fp16 scales below 6.1e-5 are subnormal, with fewer digits but far from useless.
    x = _normal(8, 64, dtype=torch.float32) * magnitude
    plain = quantize(x / magnitude, Spec(Int(4), PerChannel()), MinMax()).dequantize() * magnitude
    tiny = quantize(x, Spec(Int(4), PerChannel()), MinMax()).dequantize()
    assert _sqnr_db(x, tiny) > _sqnr_db(x, plain) - 3


@pytest.mark.parametrize(
    ("spec", "shape", "bits_per_weight"),
    [
        (Spec(Int(4), PerGroup(128)), (256, 4096), 4 + 20 / 128),
        (Spec(Int(3), PerGroup(128)), (256, 4096), 3 + 19 / 128),
        (Spec(Int(4), PerChannel()), (256, 4096), 4 + 20 / 4096),
        (Spec(Int(4, symmetric=True), PerGroup(64)), (64, 128), 4 + 16 / 64),
        (Spec(Int(4, zero="real"), PerGroup(64)), (64, 128), 4 + 32 / 64),
        (Spec(NF4, PerGroup(64), scale_dtype="float32"), (256, 4096), 4.5),
        (Spec(NF4, PerGroup(64), Spec(Int(8, symmetric=True), PerGroup(256), scale_dtype="float32")), (256, 4096), 4 + 8 / 64 + 32 / (64 * 256)),
        (Spec(Int(8, symmetric=True), PerTensor()), (10, 10), 8 + 16 / 100),
        (Spec(Int(4, symmetric=True), PerGroup(64)), (2, 65), (2 * 33 * 8 + 4 * 16) / 130),
    ],
)  # fmt: skip
def test_bits_per_weight_count_codes_scales_and_zero_points(spec, shape, bits_per_weight):
    q = quantize(_normal(*shape, dtype=torch.float32), spec, MinMax())
    assert q.bits_per_weight == pytest.approx(bits_per_weight, rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Spec(Int(4), "group"),
        lambda: Spec(4, PerTensor()),
        lambda: Spec(Int(4), PerTensor(), scale_dtype="half"),
    ],
)
def test_impossible_specs_are_refused(make):
    with pytest.raises(ValueError, match="found"):
        make()


# ------------------------------------------------------------------------------------------------------- statistics

STATISTICS = [Gram(), AbsMax(), Range(), TokenRange(), AbsSum(), Samples(count=50), Samples(count=500)]


@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
def test_a_statistic_does_not_depend_on_how_tokens_were_batched(statistic):
    x_TI = _normal(120, 6, dtype=torch.float32)
    whole = statistic.update(None, x_TI)
    parts = None
    for batch in x_TI.split([1, 50, 7, 62]):
        parts = statistic.update(parts, batch)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
def test_gathering_a_statistic_leaves_the_tokens_alone(statistic):
    x_TI = _normal(20, 6, dtype=torch.float32)
    before = x_TI.clone()
    state = statistic.update(statistic.update(None, x_TI), x_TI)
    state.zero_()
    assert torch.equal(x_TI, before)


def test_statistics_are_what_they_say():
    x = _normal(30, 4, dtype=torch.float32)
    torch.testing.assert_close(Gram().update(None, x), x.T @ x)
    assert torch.equal(AbsMax().update(None, x), x.abs().amax(0))
    assert torch.equal(Range().update(None, x), torch.stack([x.amin(0), x.amax(0)]))
    assert torch.equal(TokenRange().update(None, x), torch.stack([x.amin(1), x.amax(1)]))
    torch.testing.assert_close(mean_abs(AbsSum().update(None, x)), x.abs().mean(0))
    assert torch.equal(Samples(3, stride=2).update(None, x), x[:6:2])


def test_requests_for_the_same_statistic_are_equal():
    assert len({Gram(), Gram(), Samples(3), Samples(3), Samples(4)}) == 3


# ----------------------------------------------------------------------------------------------------------- serializable


@pytest.mark.parametrize(
    "value",
    [
        *GRIDS,
        *GRANULARITIES,
        Spec(Int(4), PerGroup(64)),
        Spec(NF4, PerGroup(64), DOUBLE, "bfloat16"),
        ClipSearch(10),
        Percentile(0.9),
        Magnitude("largest", 0.75),
        MinMax(),
        *STATISTICS,
        None,
        3,
        "x",
        (1, Int(4), None),
        {"a": (Int(2), 1.5)},
    ],
    ids=str,
)
def test_plain_data_round_trips(value):
    import json

    assert from_dict(json.loads(json.dumps(to_dict(value)))) == value


def test_fields_at_their_default_are_left_out():
    assert to_dict(Spec(Int(4), PerGroup(64))) == {
        "type": "Spec",
        "grid": {"type": "Int", "bits": 4},
        "granularity": {"type": "PerGroup", "size": 64},
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "PerGrup", "size": 4}, "did you mean 'PerGroup'"),
        ({"type": "PerGroup", "sise": 4}, "did you mean 'size'"),
        ({"type": "PerGroup"}, "PerGroup.size: Field required"),
        ({"type": "PerGroup", "size": 0}, "at least 1"),
    ],
)
def test_wrong_plain_data_is_refused_with_the_nearest_name(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict(data)


def test_a_spec_of_classes_instead_of_values_is_refused():
    with pytest.raises(ValueError, match="grid must be a grid such as"):
        Spec(Int, PerChannel())
    with pytest.raises(ValueError, match="granularity must be such as"):
        Spec(Int(4), PerChannel)


@pytest.mark.parametrize(("bits", "decibels"), [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22), (5, 26.01)])
def test_normal_levels_have_the_published_signal_to_noise_ratio_on_a_normal_distribution(bits, decibels):
    # Max (1960), table I, in decibels. Integrated on a fine grid.
    x = torch.linspace(-8, 8, 2**20, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    grid, one = Normal(bits), Affine(torch.ones(1, 1, dtype=torch.float64))
    lost = (grid.decode(grid.encode(x[None], one), one)[0] - x).square() * density
    assert -10 * math.log10(torch.trapezoid(lost, x).item()) == pytest.approx(decibels, abs=0.005)
    assert grid.table() == tuple(-level for level in reversed(grid.table()))


# Blocks


def test_the_extreme_of_a_signed_scale_takes_the_lowest_code_whatever_its_sign():
    x = torch.tensor([[-4.0, 1.0, 3.0], [4.0, -1.0, -3.0], [0.0, 0.0, 0.0]])
    params = SignedScale(3).from_range(*extremes(x))
    assert params.scale.flatten().tolist() == [1.0, -1.0, 0.0]
    codes = SignedScale(3).encode(x, params)
    assert codes.tolist() == [[0, 5, 7], [0, 5, 7], [4, 4, 4]]
    assert torch.equal(SignedScale(3).decode(codes, params), x)


def test_a_minimum_represents_zero_and_constant_granules():
    x = torch.tensor([[-1.0, 0.0, 2.0], [1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    params = Minimum(2).from_range(*extremes(x))
    assert params.minimum.flatten().tolist() == [1.0, 0.0, 2.0]
    assert torch.equal(Minimum(2).decode(Minimum(2).encode(x, params), params), x)
