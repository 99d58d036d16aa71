"""OliVe: laws of outlier-victim pairs, their search, their choice of number type and their static activations."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import kernels
from lowbit.kernels import native, product
from lowbit.layouts import pack, pack_qtensor, unpack_qtensor
from lowbit.linear_api import LoneLinear, lone_block
from lowbit.modules import LinearFormat, QuantLinear
from lowbit.numerics import (
    FLINT4,
    Affine,
    Block,
    Flat,
    Int,
    MinMax,
    OutlierVictim,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    RangeSearch,
    Samples,
    Spec,
    arity,
    quantize,
    stored_bits,
)
from lowbit.plan import plan
from lowbit.recipes import Recipe
from lowbit.scheme import linears
from lowbit.solve import Gptq, Nearest
from lowbit.steps import BlockIO, BlockState, ChooseGrid, FitActivation, SetActivationRange, Solve

from helpers import random_ids, sqnr_db, tiny_llama
from pairwise import cases

GRIDS = [OutlierVictim(bits) for bits in range(3, 9)] + [OutlierVictim(4, "flint")]
GRIDS += [OutlierVictim(4, normal, "nearest") for normal in ("int", "flint")]
ONE = Affine(torch.ones(1, 1))


def heavy(rows: int = 24, columns: int = 96, seed: int = 0, df: float = 2.5) -> Tensor:
    """Student's t: many values far outside three sigmas."""
    torch.manual_seed(seed)
    return torch.distributions.StudentT(df).sample((rows, columns)) / 20


def placed(grid, x_GK: Tensor) -> Affine:
    """The grid's range ends at one sigma: 30 % of normal values, and more of heavy-tailed ones, are outliers."""
    end = x_GK.std(1, keepdim=True)
    return grid.from_range(-end, end)


def pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2))


def lone(rows: int = 32, columns: int = 64) -> tuple[nn.Linear, Tensor]:
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.copy_(heavy(rows, columns, df=4))
    x = torch.randn(3, 50, columns, generator=torch.Generator().manual_seed(1))
    x[..., 5] *= 30
    return linear, x


# The format


@pytest.mark.parametrize(
    ("grid", "values", "byte"),
    [
        (OutlierVictim(), (-7.0, 7.0), 0x79),
        (OutlierVictim(), (0.0, -1.0), 0xF0),
        (OutlierVictim(), (12.0, 3.0), 0x81),  # the odd one is the victim; 12 is the first abfloat
        (OutlierVictim(), (3.0, -96.0), 0xF8),
        (OutlierVictim(), (23.0, 96.0), 0x83),  # both are outliers: the even one stays
        (OutlierVictim(keep="nearest"), (23.0, 96.0), 0x78),  # the larger one
        (OutlierVictim(keep="nearest"), (9.6, 7.0), 0x77),  # clipping loses less than giving up 7
        (OutlierVictim(4, "flint"), (16.0, -8.0), 0xA7),
        (OutlierVictim(4, "flint"), (-192.0, 1.0), 0x8F),
    ],
)
def test_a_pair_is_a_byte_with_the_even_value_in_the_low_nibble(grid, values, byte):
    codes = grid.encode(torch.tensor([values]), ONE)
    assert pack(codes, 4).tolist() == [[byte]]


def test_outliers_are_the_published_abfloats():
    scaled = {
        normal: [unit * v for v in OutlierVictim(4, normal).levels()] for normal, unit in (("int", 4), ("flint", 2))
    }
    outside = [48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0]  # with the border between the two at 32
    for normal, inside in (
        ("int", [4.0 * k for k in range(8)]),
        ("flint", [0.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0]),
    ):
        positive = [v for v in scaled[normal] if v >= 0]
        assert (
            positive == inside + outside and [-v for v in reversed(positive[1:])] == scaled[normal][: len(positive) - 1]
        )
    eight = [v / 4 for v in OutlierVictim(8).levels()]
    assert (min(v for v in eight if v > 127 / 4), max(eight)) == (33.0, 504.0)


def test_pairs_multiply_by_shifts_and_adds_of_integers():
    """An abfloat is ``(2 + mantissa) << (exponent + 2)``, so a dot product of nibbles is one of integers."""
    spec = Spec(OutlierVictim(), PerChannel(), scale_dtype="float32")
    q = quantize(heavy(), spec, RangeSearch())
    found = []
    for row in pack(q.codes, 4).tolist():
        values = []
        for byte in row:
            low, high = byte & 15, byte >> 4
            if 8 not in (low, high):
                values += [low - 16 * (low > 7), high - 16 * (high > 7)]
                continue
            nibble = high if low == 8 else low
            big = (2 + (nibble & 1)) << ((nibble >> 1 & 3) + 2)
            values += [(0, -big if nibble & 8 else big)[:: 1 if low == 8 else -1][i] for i in (0, 1)]
        found.append(values)
    levels = torch.tensor(found)
    assert (levels.abs() > 7).any() and torch.equal(levels.float() * q.params[0], q.dequantize())
    x = torch.randint(-7, 8, (96,), generator=torch.Generator().manual_seed(0))
    floating = q.spec.grid.decode(q.codes, Affine(torch.ones(24, 1, dtype=torch.float64))) @ x.double()
    assert torch.equal((levels * x).sum(1).double(), floating)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_pair_has_at_most_one_outlier_and_its_partner_is_zero(grid):
    x = heavy(64, 128)
    codes, params = grid.encode(x, placed(grid, x)), placed(grid, x)
    values = grid.decode(codes, params) / params.scale
    outlier = pairs(values.abs() > grid.max_normal + 0.5)
    assert outlier.any() and (outlier.sum(-1) <= 1).all()
    assert (pairs(values)[outlier.flip(-1)] == 0).all()
    assert (codes == grid.identifier).sum() == outlier.sum()  # a victim for each outlier, and no other
    both = pairs(x.abs() / params.scale > 2 * grid.max_normal).all(-1)
    assert both.any() and (grid.keep == "nearest" or outlier[..., 0][both].all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_quantizing_pairs_again_changes_nothing(grid):
    x = heavy()
    params = placed(grid, x)
    codes = grid.encode(x, params)
    values = grid.decode(codes, params)
    assert torch.equal(grid.encode(values, params), codes) and torch.equal(grid.fake(x, params), values)
    q = quantize(x, Spec(grid, PerChannel()), RangeSearch())
    back = unpack_qtensor(pack_qtensor(q), q.spec, q.shape)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_value_of_a_pair_takes_the_nearest_level_unless_it_is_a_victim(grid):
    x = heavy(40, 64, seed=3)
    params = placed(grid, x)
    codes, levels = grid.encode(x, params), torch.tensor(grid.levels())
    v = x / params.scale
    nearest = levels[(v[..., None] - levels).abs().argmin(-1)]
    found = grid.decode(codes, params) / params.scale
    off = (found - nearest).abs() > 1e-3
    if grid.keep == "first":
        assert (codes[off] == grid.identifier).all()
    lost, first = ((pairs(found) - pairs(v)).square().sum(-1) for found in (found, _first(grid, v)))
    assert (lost <= 1.0001 * first + 1e-3).all()


def _first(grid: OutlierVictim, v: Tensor) -> Tensor:
    grid = OutlierVictim(grid.bits, grid.normal)
    return grid.decode(grid.encode(v, ONE), ONE)


def test_clipping_a_pair_where_that_loses_less_lowers_the_error():
    x = heavy(df=2)
    lost = {}
    for keep in ("first", "nearest"):
        grid = OutlierVictim(4, "int", keep)
        params = placed(grid, x)
        lost[keep] = (grid.decode(grid.encode(x, params), params) - x).square().sum()
    assert lost["nearest"] < 0.9 * lost["first"]


def test_without_outliers_pairs_are_plain_integers_at_the_same_scale():
    x = torch.rand(24, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for bits in (4, 8):
        grid, plain = OutlierVictim(bits), Int(bits, symmetric=True)
        params = MinMax()(x, grid)
        assert torch.equal(params.scale, MinMax()(x, plain).scale)
        assert torch.equal(grid.decode(grid.encode(x, params), params), plain.decode(plain.encode(x, params), params))
    params = MinMax()(x, FLINT4)
    assert torch.equal(FLINT4.fake(x, params), OutlierVictim(4, "flint").fake(x, params))


def test_pairs_take_four_bits_a_value_and_a_scale_for_each_row():
    q = quantize(heavy(24, 96), Spec(OutlierVictim(), PerChannel()), RangeSearch())
    tensors = pack_qtensor(q)
    assert tensors["codes"].numel() == q.codes.numel() // 2
    assert 8 * sum(t.nbytes for t in tensors.values()) == q.stored_bits == stored_bits(q.spec, q.shape)
    assert q.bits_per_weight == 4 + 16 / 96


def test_a_search_over_sigmas_loses_less_than_clipping_at_three():
    x = heavy(64, 256, df=4)
    for grid in GRIDS:
        if grid.bits < 4:
            continue
        params, end = RangeSearch()(x, grid), 3 * x.std(1, keepdim=True)
        plain = Int(grid.bits, symmetric=True)
        clipped = plain.from_range(-end, end)
        lost = (grid.decode(grid.encode(x, params), params) - x).square().sum()
        assert lost < 0.8 * (plain.decode(plain.encode(x, clipped), clipped) - x).square().sum()


def test_errors_fall_as_bits_rise():
    x = heavy(64, 256, df=4)
    lost = []
    for bits in range(3, 9):
        q = quantize(x, Spec(OutlierVictim(bits), PerChannel()), RangeSearch())
        lost.append((q.dequantize() - x).square().sum().item())
    assert all(b < 0.5 * a for a, b in pairwise(lost))


def test_gradients_reach_what_is_stored_and_the_scale():
    x = torch.tensor([[2.3, -5.8, 42.0, 6.0, 9.0, -500.0, 11.0, 30.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    y = OutlierVictim().fake(x, Affine(scale))
    assert y.tolist() == [[2, -6, 48, 0, 0, -96, 12, 0]]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1, 1, 1, 0, 0, 0, 1, 0]]
    stored = [
        (2, 2.3),
        (-6, -5.8),
        (48, 42.0),
        (-96, 0),
        (12, 11.0),
    ]  # beyond the last level all of it moves with the scale
    assert scale.grad is not None and scale.grad.item() == pytest.approx(sum(level - v for level, v in stored))


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_constant_row_is_finite_and_a_row_of_zeros_stays_zero(grid, value):
    q = quantize(torch.full((3, 8), value), Spec(grid, PerChannel()), RangeSearch())
    restored = q.dequantize()
    assert torch.isfinite(restored).all() and (restored - value).abs().max() <= 0.11 * abs(value)


def test_nan_in_an_activation_stays_nan_and_takes_only_its_neighbour():
    spec = Spec(OutlierVictim(), PerTensor(), scale_dtype="float32")
    x = torch.ones(2, 8)
    x[1, 3] = torch.nan
    y = kernels.fake_quantize_activation(x, spec, ONE)
    assert y.isnan().sum() == 1 and y[1, 3].isnan() and y[1, 2] == 0 and (y[0] == 1).all()


@pytest.mark.parametrize("options", [(2,), (9,), (4, "float"), (8, "flint"), (4, "int", "last")])
def test_impossible_pairs_are_refused(options):
    with pytest.raises(ValueError, match="found"):
        OutlierVictim(*options)


def test_impossible_searches_are_refused():
    for options in ({"unit": "range"}, {"first": 0.0}, {"first": 3.0}, {"step": 0.0}):
        with pytest.raises(ValueError, match="found"):
            RangeSearch(**options)


# Refusals


@pytest.mark.parametrize(
    "grain", [PerTensor(), PerChannel(), PerGroup(8), PerGroup(100), Block(3, 4), Flat(6)], ids=str
)
def test_pairs_stay_whole_in_every_granularity_of_even_runs(grain):
    spec, x = Spec(OutlierVictim(), grain), heavy(10, 46)
    spec.check_shape((10, 46))
    q = quantize(x, spec, RangeSearch(first=0.2, last=0.3))
    values, victims = q.dequantize(), pairs(q.codes == OutlierVictim().identifier)
    assert victims.any() and (victims.sum(-1) <= 1).all() and (pairs(values)[victims] == 0).all()


@pytest.mark.parametrize(
    ("grain", "columns", "said"),
    [
        (PerChannel(), 45, "rows of 45 leave one over"),
        (PerTensor(), 45, "rows of 45 leave one over"),
        (PerGroup(7), 46, "PerGroup.* cuts apart"),
        (Flat(5), 46, "cuts apart"),
        (PerCluster((6, 40)), 46, "cuts apart"),
    ],
    ids=str,
)
def test_what_would_cut_pairs_apart_is_refused(grain, columns, said):
    with pytest.raises(ValueError, match=said):
        quantize(heavy(10, columns), Spec(OutlierVictim(), grain), RangeSearch())
    Spec(Int(4), grain).check_shape((10, columns))


def test_a_solver_of_columns_refuses_pairs():
    assert arity(OutlierVictim()) == 2 and arity(Int(4)) == 1
    with pytest.raises(ValueError, match=r"codes 2 neighbours of a row together.*use the solver Nearest"):
        Recipe.blockwise(name="mine", scheme=linears(Spec(OutlierVictim(), PerChannel())), steps=(Solve(Gptq()),))


def test_a_model_with_odd_widths_is_refused_before_any_work(tmp_path):
    model, begun = tiny_llama(tmp_path / "model", intermediate_size=95), []
    for name, options in (("olive", {"activation_bits": None}), ("olive+gptq", {"group_size": 16})):
        with pytest.raises(ValueError, match=r"mlp\.down_proj \(64 x 95\) cannot have its format.*leave one over"):
            lowbit.quantize(
                model,
                lowbit.recipe(name, **options),
                random_ids(2, 16),
                out=tmp_path / "q",
                progress=lambda *_: begun.append(1),
            )
    assert not begun and not (tmp_path / "q.partial").exists()
    with pytest.raises(ValueError, match="leave one over"):
        plan(model, "olive")


# The steps


def state_of(linear: nn.Linear, x: Tensor, recipe: Recipe) -> BlockState:
    form = recipe.scheme.format("linear", "linear")
    assert form is not None
    io = BlockIO(x, None, lambda run, window: run(window))
    return BlockState.of(
        "", LoneLinear(copy.deepcopy(linear).requires_grad_(False)), lone_block(linear), {"linear": form}, io
    )


def test_each_weight_gets_the_type_that_loses_less_of_it_and_stores_which():
    linear, _ = lone(16, 1024)
    even = copy.deepcopy(linear)
    with torch.no_grad():
        even.weight.normal_(generator=torch.Generator().manual_seed(0))
    types = {}
    for name, each in (("heavy", linear), ("normal", even)):
        lost = {}
        for normal in ("int", "flint", "best"):
            q = lowbit.quantize_linear(each, None, lowbit.recipe("olive", activation_bits=None, normal=normal))
            lost[normal] = (q.dequantize() - each.weight).square().sum().item()
            types[name, normal] = q.spec.grid
        assert lost["best"] == min(lost["int"], lost["flint"]) < max(lost["int"], lost["flint"])
    assert types["normal", "best"] == OutlierVictim() and types["heavy", "best"] == OutlierVictim(4, "flint")


def test_a_grid_that_was_not_asked_about_or_was_ranged_before_stays():
    linear, x = lone()
    choose = ChooseGrid((OutlierVictim(), OutlierVictim(4, "flint")))
    other = state_of(linear, x, lowbit.recipe("rtn", group_size=None))
    choose.run(other)
    assert other.formats["linear"].weight.grid == Int(4)
    ranged = state_of(linear, x, lowbit.recipe("olive"))
    ranged.draft("linear").range_shares = MinMax()  # pyright: ignore[reportArgumentType]
    choose.run(ranged)
    assert ranged.formats["linear"].weight.grid == OutlierVictim()


def test_grids_of_different_size_cannot_be_chosen_from():
    with pytest.raises(ValueError, match="take the same storage"):
        ChooseGrid((OutlierVictim(4), OutlierVictim(8)))
    with pytest.raises(ValueError, match="take the same storage"):
        FitActivation(grids=(Int(4, symmetric=True), Int(4)))
    with pytest.raises(ValueError, match="no grid"):
        ChooseGrid(())
    with pytest.raises(ValueError, match="at least one"):
        FitActivation(tokens=0)


def test_a_static_scale_is_that_of_the_first_tokens_only():
    linear, x = lone()
    recipe = lowbit.recipe("olive", tokens=100)
    q = lowbit.quantize_linear(linear, x, recipe)
    later = x.clone()
    later[2] *= 50
    first = x.clone()
    first[0] *= 50
    same, other = (lowbit.quantize_linear(linear, each, recipe) for each in (later, first))
    assert torch.equal(q.get_buffer("act_scale"), same.get_buffer("act_scale"))
    assert not torch.equal(q.get_buffer("act_scale"), other.get_buffer("act_scale"))
    seen = x.reshape(-1, x.shape[-1])[:100]
    assert q.act is not None
    fitted = RangeSearch()(seen.reshape(1, -1), q.act.spec.grid)
    assert q.get_buffer("act_scale").item() == pytest.approx(fitted.scale.item(), rel=1e-6)


def test_the_layer_multiplies_what_encode_and_decode_make_of_its_input():
    linear, x = lone()
    q = lowbit.quantize_linear(linear, x, lowbit.recipe("olive"))
    assert q.act is not None and q.act.static and isinstance(q.act.spec.grid, OutlierVictim)
    grid, params = q.act.spec.grid, q.act_params
    assert params is not None and params.scale.shape == (1, 1)
    x_TI = x[0]
    codes = grid.encode(x_TI.reshape(1, -1), params)
    assert codes.max() < 16 and (codes == grid.identifier).any()
    with torch.no_grad():
        wanted = grid.decode(codes, params).view_as(x_TI) @ q.dequantize().T + linear.bias
        assert torch.allclose(q(x_TI), wanted, rtol=1e-5, atol=1e-5)
        assert sqnr_db(linear(x_TI), q(x_TI)) > 12


def test_a_linear_that_saw_no_token_gets_a_range_and_a_note():
    linear, x = lone()
    state = state_of(linear, x, lowbit.recipe("olive"))
    state.collect = lambda needs, inputs=None: {"linear": {}}  # pyright: ignore[reportAttributeAccessIssue]
    FitActivation(grids=(OutlierVictim(), OutlierVictim(4, "flint"))).run(state)
    assert state.draft("linear").act_params.scale.item() == pytest.approx(1 / 7) and "saw no token" in state.notes[0]


def test_ranges_that_a_later_transform_would_outdate_are_refused():
    for name in ("olive+awq", "olive+quip"):
        with pytest.raises(ValueError, match="transforms channels whose static activation ranges are fixed by then"):
            lowbit.recipe(name)
    with pytest.raises(ValueError, match="transforms channels whose static"):
        Recipe.blockwise(
            name="mine",
            scheme=lowbit.recipe("smoothquant", level="O3").scheme,
            steps=(SetActivationRange(), *lowbit.recipe("smoothquant").steps),
        )
    linear, x = lone()
    for name in ("awq+olive", "smoothquant+olive", "quip+olive", "olive+gptq"):
        q = lowbit.quantize_linear(linear, x, lowbit.recipe(name))
        with torch.no_grad():
            assert sqnr_db(linear(x), q(x)) > 12, name
        assert isinstance(q.spec.grid, OutlierVictim) == name.endswith("olive")


def test_without_outliers_the_method_is_the_plain_number_types():
    linear, x = lone()
    q = lowbit.quantize_linear(linear, x, lowbit.recipe("olive", outliers=False))
    assert q.spec.grid in (FLINT4, Int(4, symmetric=True)) and q.act is not None
    assert q.act.spec.grid in (FLINT4, Int(4, symmetric=True))
    with pytest.raises(ValueError, match="flint has 4 bits"):
        lowbit.recipe("olive", bits=8, normal="flint", outliers=False)


# Compiled kernels


@pytest.mark.parametrize(
    ("grid", "grain", "isa"),
    cases([g for g in GRIDS if g.bits < 8], [PerChannel(), PerGroup(32), PerTensor()], native.instruction_sets()),
    ids=str,
)
def test_tiles_hold_each_value_in_one_bit_more_and_decode_to_the_same_bits(grid, grain, isa):
    spec = Spec(grid, grain)
    for shape in ((1, 2), (16, 32), (40, 130)):
        q = quantize(heavy(*shape), spec, RangeSearch(first=0.4, last=0.5))
        layer = kernels.PackedLinear(spec, shape, pack_qtensor(q))
        assert native.why_unpackable(layer) is None
        tiles = native.pack(layer)
        assert torch.equal(native.unpack(tiles, spec, shape), layer.tensors["codes"])
        found = torch.empty(shape)
        native.decode(isa, tiles, native.table_of(spec), shape[0], 0, found)
        assert torch.equal(found, q.dequantize())
        x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(2))
        packed = kernels.PackedLinear(spec, shape, layer.tensors, tiles=tiles)
        assert sqnr_db(x.double() @ q.dequantize().double().T, product.run(isa, x, packed)) > 100


@pytest.mark.skipif(not native.instruction_sets(), reason="no compiled kernels")
def test_tiles_of_pairs_take_five_bits_where_those_of_integers_take_four():
    plain = quantize(heavy(64, 512), Spec(Int(4, symmetric=True), PerChannel()), MinMax())
    pair = quantize(heavy(64, 512), Spec(OutlierVictim(), PerChannel()), MinMax())
    sizes = [native.pack(kernels.PackedLinear(q.spec, q.shape, pack_qtensor(q))).numel() for q in (plain, pair)]  # pyright: ignore[reportArgumentType]
    assert 1.2 < sizes[1] / sizes[0] < 1.3


def test_pairs_of_eight_bits_say_why_no_compiled_kernel_runs_them():
    linear, x = lone()
    q = lowbit.quantize_linear(linear, x, lowbit.recipe("olive", bits=8, activation_bits=8))
    with torch.no_grad():
        assert "509 values" in str(q.prepare()) and q.tiles is None and sqnr_db(linear(x), q(x)) > 25
    assert q.explain()[-1].kernel == "reference" and q.explain()[-1].why_not is None


# Whole runs


@pytest.mark.parametrize(("bits", "decibels"), [(4, 3), (8, 14)])
def test_a_model_is_quantized_saved_and_read_back_with_the_type_of_every_tensor(tmp_path, bits, decibels):
    # Every 16th channel of this model is an outlier, and takes a neighbour with it: twice what the paper counts on.
    model, ids = tiny_llama(tmp_path / "model"), random_ids(4, 32)
    recipe = lowbit.recipe("olive", bits=bits, activation_bits=bits, tokens=64)
    report = lowbit.quantize(model, recipe, ids, out=tmp_path / "q", max_kl=50)
    assert report.coverage == 1.0 and report.problems == ()
    assert report.bits_per_weight == pytest.approx(plan(model, recipe).bits_per_weight, abs=1e-9)
    read = lowbit.load(tmp_path / "q", torch.float32)
    layers = [m for m in read.modules() if isinstance(m, QuantLinear)]
    found = {m.spec.grid for m in layers} | {m.act.spec.grid for m in layers if m.act is not None}
    assert found <= ({OutlierVictim(8)} if bits == 8 else {OutlierVictim(), OutlierVictim(4, "flint")})
    assert all((m.tiles is None) == (bits == 8 or not native.instruction_sets()) for m in layers)
    one = read.model.layers[0].self_attn
    assert torch.equal(one.q_proj.get_buffer("act_scale"), one.k_proj.get_buffer("act_scale"))
    with torch.no_grad():
        assert sqnr_db(lowbit.load(model)(ids).logits, read(ids).logits) > decibels
    assert read.generate(ids[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_samples_are_asked_for_where_activations_are_static():
    assert Samples(1024) in lowbit.recipe("olive").steps[1].needs
    assert not lowbit.recipe("olive", activation_bits=None).needs_calibration
    assert LinearFormat(Spec(OutlierVictim(), PerChannel())).check_shape((4, 6)) is None
    assert Nearest(RangeSearch()) == lowbit.recipe("olive").steps[-1].solver
