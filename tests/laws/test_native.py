"""The law of the compiled kernels: every instruction set of this CPU computes the product with the decoded weight."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable

import pytest
import torch

from lowbit import compiled, kernels
from lowbit.kernels import PackedLinear, native, product, reference
from lowbit.layouts import pack_qtensor
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.modules import ActSpec, QuantLinear, prepare
from lowbit.numerics import (
    NF4,
    Affine,
    Alternating,
    BinaryCoded,
    Block,
    Codebook,
    Flat,
    Float,
    Int,
    KMeans,
    Minimum,
    MinMax,
    Normal,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QTensor,
    RowBands,
    Sign,
    SignedScale,
    Spec,
    Unfitted,
    fit_params,
    quantize,
)

from pairwise import cases

SETS = native.instruction_sets()
SHAPES = [(40, 129), (17, 33), (64, 256), (3, 5)]
GROUPS = [PerChannel(), PerGroup(16), PerGroup(48), PerGroup(64), PerTensor()]
UNIFORM = [Spec(Int(b, s), g) for b in range(1, 9) for s in (True, False) for g in GROUPS]
OTHERS = [
    Spec(Int(3, zero="real"), PerGroup(32)),
    Spec(Int(4, symmetric=True, full=True), RowBands(6)),
    Spec(Int(8), RowBands(100)),
    Spec(Int(3, zero="real"), PerGroup(16), stats=Spec(Int(3), PerGroup(16))),
    Spec(Int(4), PerGroup(32), scale_dtype="float32"),
    Spec(Int(4), PerGroup(32), scale_dtype="bfloat16"),
    Spec(SignedScale(4), PerGroup(32)),
    Spec(Minimum(5), PerGroup(32)),
    *(BLOCK_TYPES[name].spec for name in ("Q2_K", "Q3_K", "Q4_K", "Q6_K")),
    Spec(NF4, PerGroup(64)),
    Spec(NF4, PerGroup(16), stats=Spec(Int(8), PerGroup(256), scale_dtype="float32")),
    Spec(Float(2, 1), PerGroup(32)),
    Spec(Float(4, 3), PerChannel()),
    Spec(Float(3, 2), PerGroup(16)),
    Spec(Float(2, 1, shared_exponent=True), PerGroup(32), scale_dtype="float8_e8m0fnu"),
    Spec(Float(2, 1), PerGroup(16), Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32"), "float32"),
    Spec(Normal(2), PerGroup(64)),
    Spec(Normal(3), PerChannel()),
    *(Spec(Codebook(b), PerChannel()) for b in (1, 2, 3, 4, 5)),
    *(Spec(BinaryCoded(b), g) for b in (1, 2, 3, 4) for g in (PerGroup(64), PerChannel(), PerGroup(16), PerGroup(20))),
    Spec(Sign(), PerTensor()),
]
# What the recipe rounds the input to; the last three are for the kernels a float input.
INPUTS = [
    Spec(Int(8, True), PerToken()),
    Spec(Int(8), PerToken()),
    Spec(Int(4), PerTensor()),
    Spec(Int(6, True), PerTensor()),
    Spec(Int(8), PerGroup(10)),
    Spec(Float(4, 3), PerToken()),
    Spec(Float(2, 1), PerGroup(16), Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32")),
    Spec(Int(4, symmetric=True, reach=0.9), PerToken()),
    Spec(Int(8, reach=0.7), PerTensor()),
    Spec(Int(8, symmetric=True, full=True), PerToken()),  # not the dialect that the kernels compute themselves
]


def traits(spec: Spec) -> tuple[Hashable, ...]:
    """What a format consists of: its kind of numbers, bits, signs, groups, and how its scales are stored."""
    grid = spec.grid
    kind = (type(grid), getattr(grid, "zero", None), getattr(grid, "full", None), spec.stats, spec.scale_dtype)
    return kind, grid.bits, getattr(grid, "symmetric", None), spec.granularity


def by_set(spec: Spec, isa: str) -> tuple[Hashable, ...]:
    return *traits(spec), isa


FORMATS_BY_SET = cases([*UNIFORM, *OTHERS], SETS, traits=by_set)


@functools.cache
def weight(spec: Spec, shape: tuple[int, int]) -> QTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.02
    fit = {Codebook: KMeans(), BinaryCoded: Alternating(), Sign: Unfitted()}.get(type(spec.grid), MinMax())
    return quantize(w, spec, fit)


def layer(spec: Spec, shape=(40, 129), act: Spec | None = None, act_params=None) -> PackedLinear:
    packed = PackedLinear(spec, shape, pack_qtensor(weight(spec, shape)), act, act_params)
    assert native.why_unpackable(packed) is None
    return PackedLinear(spec, shape, packed.tensors, act, act_params, tiles=native.pack(packed))


def inputs(rows: int, channels: int, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)) + 0.3).to(dtype)


def sqnr_db(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return float(10 * torch.log10(x.pow(2).sum() / (x - y).pow(2).sum()))


def test_this_cpu_has_compiled_kernels_and_the_portable_one_is_the_last():
    assert SETS[-1] == "portable"
    assert kernels.names() == [*SETS, "triton", "int8_torch", "reference"]


@pytest.mark.parametrize("spec", [*UNIFORM, *OTHERS], ids=str)
def test_tiles_are_a_bijection_of_the_codes(spec):
    for shape in SHAPES:
        packed = layer(spec, shape)
        assert packed.tiles is not None
        assert torch.equal(native.unpack(packed.tiles, spec, shape), packed.tensors["codes"])


def test_compiled_code_refuses_sizes_that_are_not_those_of_its_tiles():
    spec = Spec(NF4, PerGroup(16))
    packed = layer(spec, (40, 64))
    tiles, table, x = packed.tiles, native.table_of(spec), torch.randn(2, 64)
    assert tiles is not None and table is not None
    native.linear("portable", x, tiles, 40, table, tabled=True)
    for wrong in (
        lambda: native.linear("portable", x[:, :16].contiguous(), tiles, 40, table, tabled=True),
        lambda: native.linear("portable", x, tiles, 39, table, tabled=True),
        lambda: native.linear("portable", x, tiles, 40, table[:8], tabled=True),
        lambda: native.linear("portable", x, tiles, 40, None, tabled=True),
        lambda: native.linear("portable", x, tiles, 40, table, 8, act_params=Affine(torch.ones(3, 1))),
        lambda: native.decode("portable", tiles, table, 40, 0, torch.empty(40, 48)),
        lambda: native.unpack(tiles, spec, (48, 64)),
        lambda: native.linear("portable", x, layer(Spec(Int(4), PerGroup(16)), (40, 64)).tiles, 40, tabled=True),
        lambda: native.linear("portable", x, tiles[:-64], 40, table, tabled=True),
    ):
        with pytest.raises(ValueError):
            wrong()
    for word in range(14):  # of the header: each says a size, a kind or a place
        other = tiles.clone()
        other.view(torch.int64)[word] += 1
        with pytest.raises(ValueError, match=r"no packed tiles|of another shape"):
            native.linear("portable", x, other, 40, table, tabled=True)


@pytest.mark.parametrize(("spec", "isa"), FORMATS_BY_SET, ids=str)
def test_tiles_decode_to_the_bits_of_dequantize(spec, isa):
    for shape in SHAPES:
        tiles, exact = layer(spec, shape).tiles, weight(spec, shape).dequantize()
        assert tiles is not None
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = torch.empty(shape, dtype=dtype)
            native.decode(isa, tiles, native.table_of(spec), shape[0], 0, found)
            # Bases are summed in another order than torch's matrix product sums them, and a minimum is kept as a quotient.
            summed = isinstance(spec.grid, BinaryCoded | Minimum)
            assert (
                torch.allclose(found, exact.to(dtype), rtol=0.01, atol=1e-6)
                if summed
                else torch.equal(found, exact.to(dtype))
            )


@pytest.mark.parametrize(("spec", "isa"), FORMATS_BY_SET, ids=str)
def test_a_floating_input_is_multiplied_as_in_float32(spec, isa):
    for shape in SHAPES:
        packed, w = layer(spec, shape), weight(spec, shape).dequantize().double()
        for rows in (1, 2, 5, 8, 33):
            x = inputs(rows, shape[1])
            assert sqnr_db(x.double() @ w.T, product.run(isa, x, packed)) > 100


@pytest.mark.parametrize("isa", SETS)
def test_every_number_of_tokens_up_to_33_is_right(isa):
    for spec in (Spec(Int(4), PerGroup(64)), Spec(NF4, PerGroup(64)), Spec(Codebook(3), PerChannel())):
        packed, w = layer(spec), weight(spec, (40, 129)).dequantize().double()
        for rows in range(34):
            x = inputs(rows, 129)
            y = product.run(isa, x, packed)
            assert y.shape == (rows, 40)
            assert rows == 0 or sqnr_db(x.double() @ w.T, y) > 100


@pytest.mark.parametrize(
    ("spec", "act", "isa"),
    cases([*UNIFORM[::3], *OTHERS], INPUTS, SETS, traits=lambda spec, act, isa: (*traits(spec), act, isa)),
    ids=str,
)
def test_a_quantized_input_gives_what_the_reference_gives(spec, act, isa):
    packed = layer(spec, act=act)
    for rows in (1, 4, 11):
        x = inputs(rows, 129)
        assert sqnr_db(reference(x, packed), product.run(isa, x, packed)) > 90


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_clip_as_the_reference_does(symmetric, isa):
    act = Spec(Int(8, symmetric), PerTensor(), scale_dtype="float32")
    params = fit_params(inputs(64, 129), act, MinMax())
    packed = layer(Spec(Int(8), PerChannel()), act=act, act_params=params)
    x = 2 * inputs(9, 129)
    assert sqnr_db(reference(x, packed), product.run(isa, x, packed)) > 90


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_rounding_the_input_by_segments_costs_what_8_bits_cost(bits, isa):
    spec, shape = Spec(Int(bits), PerGroup(64)), (64, 256)
    packed, w = layer(spec, shape), weight(spec, shape).dequantize()
    assert packed.tiles is not None
    for rows in (5, 21):
        x = inputs(rows, 256)
        steps = x.view(rows, 4, 64).abs().amax(2, keepdim=True) / 127
        rounded = ((x.view(rows, 4, 64) / steps).round() * steps).view(rows, 256)
        found = native.linear(isa, x, packed.tiles, 64, by_segment=True)
        assert sqnr_db(rounded.double() @ w.double().T, found) > 90


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_input_give_their_own_type(dtype, isa):
    spec = Spec(Int(4), PerGroup(64))
    packed, w = layer(spec), weight(spec, (40, 129)).dequantize().double()
    for rows in (1, 8, 50):
        x = inputs(rows, 129, dtype)
        y = product.run(isa, x, packed)
        assert y.dtype == dtype
        floor = {torch.bfloat16: 45, torch.float16: 60, torch.float64: 100}[dtype]
        assert sqnr_db(x.double() @ w.T, y) > floor


@pytest.mark.parametrize("isa", SETS)
def test_an_outlier_channel_does_not_drown_the_others(isa):
    """Massive activations are thousands of times the rest; fixed point has a scale for each 128 channels."""
    spec, shape = Spec(Int(4), PerChannel()), (64, 512)
    packed, w, x = layer(spec, shape), weight(spec, shape).dequantize().double(), inputs(3, 512)
    x[:, 7] = 4000
    exact = x.double() @ w.T - x[:, 7:8].double() * w.T[7]
    found = product.run(isa, x, packed).double() - x[:, 7:8].double() * w.T[7]
    assert sqnr_db(exact, found) > 60


@pytest.mark.parametrize(
    ("bad", "act", "isa"), cases([torch.nan, torch.inf], [None, Spec(Int(8, True), PerToken())], SETS), ids=str
)
def test_nan_and_inf_reach_the_output_of_their_token_only(bad, act, isa):
    for spec in (Spec(Int(4), PerGroup(64)), Spec(NF4, PerGroup(64)), Spec(BinaryCoded(2), PerGroup(64))):
        x = inputs(3, 129)
        x[1, 7] = bad
        y = product.run(isa, x, layer(spec, act=act))
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("isa", SETS)
def test_zeros_tiny_and_non_contiguous_inputs_are_right(isa):
    spec = Spec(Int(3), PerGroup(32))
    packed, w = layer(spec), weight(spec, (40, 129)).dequantize().double()
    assert not product.run(isa, torch.zeros(2, 129), packed).any()
    tiny = inputs(2, 129) * 1e-25  # below 1e-30 next to nothing becomes nothing
    assert sqnr_db(tiny.double() @ w.T, product.run(isa, tiny, packed)) > 90
    x = inputs(129, 6).T
    assert sqnr_db(x.double() @ w.T, product.run(isa, x, packed)) > 100
    x = inputs(6, 129).view(2, 3, 129)
    assert product.run(isa, x, packed).shape == (2, 3, 40)


@pytest.mark.parametrize("isa", SETS)
def test_the_number_of_threads_changes_nothing(isa):
    spec, shape = Spec(Int(4), PerGroup(64)), (1024, 512)
    packed = layer(spec, shape)
    before = torch.get_num_threads()
    for x in (inputs(8, 512), inputs(40, 512), inputs(40, 512, torch.bfloat16)):
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(product.run(isa, x, packed))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# Matrix tiles: from 16 tokens on


TILED = [isa for isa in SETS if isa in native.MATRIX_TILES]


@pytest.mark.parametrize(("spec", "isa"), cases([*UNIFORM, *OTHERS], TILED, traits=by_set), ids=str)
def test_matrix_tiles_multiply_integers_as_lanes_do(spec, isa):
    for act in (INPUTS[1], INPUTS[3]):
        for shape, rows in (((40, 129), 16), ((17, 33), 33), ((100, 200), 50)):
            packed, x = layer(spec, shape, act), inputs(rows, shape[1])
            found = product.run(isa, x, packed)
            assert sqnr_db(product.run(native.MATRIX_TILES[isa], x, packed), found) > 110
            assert sqnr_db(reference(x, packed), found) > 90


@pytest.mark.parametrize(("spec", "isa"), cases([*UNIFORM, *OTHERS], TILED, traits=by_set), ids=str)
def test_matrix_tiles_multiply_bfloat16_by_the_rounded_weight(spec, isa):
    for shape, rows in (((40, 129), 25), ((17, 33), 33), ((3, 5), 31), ((100, 200), 48)):  # fewer may be fixed point
        packed, x = layer(spec, shape), inputs(rows, shape[1], torch.bfloat16)
        assert packed.tiles is not None
        exact = x.double() @ weight(spec, shape).dequantize().bfloat16().double().T
        y = product.run(isa, x, packed)
        assert y.dtype == torch.bfloat16 and sqnr_db(exact, y) > 50


@pytest.mark.parametrize("isa", TILED)
def test_matrix_tiles_take_every_number_of_tokens_and_those_apart_in_memory(isa):
    for act, dtype in ((None, torch.float32), (None, torch.bfloat16), (INPUTS[1], torch.float32)):
        packed, w = (
            layer(Spec(Int(4), PerGroup(64)), act=act),
            weight(Spec(Int(4), PerGroup(64)), (40, 129)).dequantize(),
        )
        whole = inputs(129, 70, dtype).T
        expected = product.run(isa, whole, packed)
        assert sqnr_db(whole.double() @ w.double().T, expected) > (
            100 if dtype == torch.float32 and act is None else 35
        )
        first = 25 if dtype == torch.bfloat16 else 16  # fewer of bfloat16 are fixed point
        for rows in (*range(first, 50), 63, 64, 65):  # a token's result is the same whichever others there are
            assert torch.equal(product.run(isa, whole[:rows], packed), expected[:rows])
        assert product.run(isa, whole[:0], packed).shape == (0, 40)
        assert product.run(isa, whole[:48].reshape(2, 24, 129), packed).shape == (2, 24, 40)
        assert not product.run(isa, torch.zeros(20, 129, dtype=dtype), packed).any()


@pytest.mark.parametrize("isa", TILED)
def test_matrix_tiles_take_static_ranges_and_more_columns_than_stay_in_cache(isa):
    act = Spec(Int(8, symmetric=False), PerTensor(), scale_dtype="float32")
    params = fit_params(inputs(64, 70000), act, MinMax())
    for columns in (40000, 70000):  # the latter are too many for one sum of tiles
        for spec in (Spec(Int(8), PerChannel()), Spec(Int(2), PerGroup(128))):
            packed, x = layer(spec, (35, columns), act, params), 2 * inputs(19, columns)
            assert sqnr_db(reference(x, packed), product.run(isa, x, packed)) > 90


@pytest.mark.parametrize(
    ("dtype", "act", "isa"),
    cases([torch.float32, torch.bfloat16], [None, Spec(Int(8, True), PerToken())], TILED),
    ids=str,
)
def test_nan_and_inf_stay_with_their_token_in_a_matrix_tile(dtype, act, isa):
    for spec in (Spec(Int(4), PerGroup(64)), Spec(Int(8), PerChannel()), Spec(NF4, PerGroup(64))):
        x = inputs(37, 129, dtype)
        x[5, 7], x[33, 128] = torch.nan, torch.inf
        y = product.run(isa, x, layer(spec, act=act))
        spoilt = torch.zeros(37, dtype=torch.bool)
        spoilt[[5, 33]] = True
        assert not torch.isfinite(y[spoilt]).any() and torch.isfinite(y[~spoilt]).all()


def test_matrix_tiles_that_fail_their_self_test_are_not_offered():
    assert native._cpu.spoiled_instruction_sets() == [isa for isa in SETS if isa not in native.MATRIX_TILES]


@pytest.mark.parametrize("isa", TILED)
def test_few_tokens_are_left_to_lanes_even_where_matrix_tiles_are_forced(isa, monkeypatch):
    packed, lanes = layer(Spec(Int(4), PerGroup(64))), native.MATRIX_TILES[isa]
    monkeypatch.setenv("LOWBIT_KERNELS", isa)
    assert kernels.choose(packed, 16).name == isa and kernels.choose(packed, 15).name == lanes
    why_not = {reason.kernel: reason.why_not for reason in kernels.explain(packed, 15)}
    assert why_not[isa] == f"a matrix tile holds 16 rows, the input has 15; {lanes} runs it" and why_not[lanes] is None
    assert torch.equal(kernels.run(inputs(15, 129), packed), product.run(lanes, inputs(15, 129), packed))
    assert kernels.choose(layer(Spec(Codebook(3), PerChannel())), 16).name == lanes


def test_torchs_own_threads_are_used():
    assert compiled._torch_pool() != 0


def test_layers_that_cannot_be_packed_say_why():
    def reason(spec, shape=(40, 128)):
        return native.why_unpackable(PackedLinear(spec, shape, pack_qtensor(weight(spec, shape))))

    assert reason(Spec(NF4, Flat(64))) is None
    assert "groups within a row" in str(reason(Spec(NF4, Flat(64)), (40, 100)))
    assert "groups within a row" in str(reason(Spec(Int(4), Block(8, 8))))
    assert "groups within a row" in str(reason(Spec(Codebook(2), PerGroup(64))))


def test_cut_off_tiles_and_unknown_instruction_sets_are_refused():
    packed = layer(Spec(Int(4), PerGroup(64)))
    assert packed.tiles is not None
    with pytest.raises(ValueError, match="cut off"):
        native.linear(SETS[0], inputs(1, 129), packed.tiles[:-64], 40)
    with pytest.raises(ValueError, match="does not run avx1024"):
        native.linear("avx1024", inputs(1, 129), packed.tiles, 40)


# A layer that holds tiles


def prepared(spec=Spec(Int(4), PerGroup(64)), shape=(40, 129), **kwargs) -> tuple[QuantLinear, QuantLinear]:
    plain = QuantLinear.from_qtensor(weight(spec, shape), torch.randn(shape[0]), **kwargs)
    packed = copy.deepcopy(plain)
    assert packed.prepare() is None and packed.prepare() is None
    return plain, packed


def test_a_prepared_layer_computes_the_same_and_holds_no_second_copy():
    plain, packed = prepared()
    x = inputs(2, 129)
    assert plain.explain(16)[-1].why_not is None and packed.explain(16)[0].why_not is None
    assert sqnr_db(plain(x), packed(x)) > 100
    assert "codes" not in dict(packed.named_buffers())
    assert torch.equal(packed.dequantize(), plain.dequantize())
    assert packed.stored_bits == plain.stored_bits


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_a_forced_instruction_set_waits_for_tiles_and_then_runs(isa, monkeypatch):
    plain, packed = prepared()
    rows = 20 if isa in native.MATRIX_TILES else 2
    x = inputs(rows, 129)
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    by_reference = plain(x)
    monkeypatch.setenv("LOWBIT_KERNELS", isa)
    assert torch.equal(plain(x), by_reference)
    forced = packed(x)
    assert not torch.equal(forced, by_reference) and sqnr_db(by_reference, forced) > 90
    assert [r.kernel for r in packed.explain(rows) if r.why_not is None] == [isa]


def test_a_prepared_layer_is_saved_and_loaded_as_any_other():
    plain, packed = prepared(act=ActSpec(Spec(Int(8, True), PerToken())))
    expected = plain.state_dict()
    found = packed.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    other = prepared(shape=(40, 129))[1]
    other.load_state_dict(prepared()[0].state_dict())
    assert other.tiles is None and torch.equal(other.dequantize(), plain.dequantize())
    packed.restore()
    assert packed.tiles is None and torch.equal(packed.get_buffer("codes"), plain.get_buffer("codes"))


def test_casting_keeps_the_tiles_and_moving_away_restores_the_codes():
    _, packed = prepared()
    assert packed.to(torch.bfloat16).tiles is not None
    assert packed(inputs(1, 129, torch.bfloat16)).dtype == torch.bfloat16
    assert packed.to("meta").tiles is None and packed.get_buffer("codes").device.type == "meta"


@pytest.mark.parametrize("act", [None, ActSpec(Spec(Int(8, True), PerToken()))], ids=str)
def test_gradients_flow_through_a_prepared_layer(act):
    plain, packed = prepared(act=act)
    grads = []
    for each in (plain, packed):
        x = inputs(2, 129).requires_grad_()
        each(x).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert grads[0].any() and sqnr_db(*grads) > 90


def test_a_machine_without_compiled_kernels_says_so_once_and_runs(monkeypatch):
    plain, _ = prepared()
    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.setattr(compiled, "library", None)
    with pytest.warns(UserWarning, match="C\\+\\+ compiler"):
        prepare(plain)
    assert plain.tiles is None and plain.explain()[-1].why_not is None


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_spoils_every_token_that_shares_its_range(isa, bad):
    x = inputs(3, 129)
    x[1, 7] = bad
    packed = layer(Spec(Int(8, True), PerChannel()), act=Spec(Int(8, True), PerTensor()))
    assert reference(x, packed).isnan().all()
    assert product.run(isa, x, packed).isnan().all()


@pytest.mark.skipif(not set(native.MATRIX_TILES) & set(native.instruction_sets()), reason="no matrix tiles here")
@pytest.mark.parametrize(("granularity", "tiled"), [(PerGroup(64), True), (PerChannel(), True), (PerGroup(16), False)])
@torch.no_grad()
def test_many_float32_tokens_run_by_matrix_tiles_where_a_group_fills_one(granularity, tiled):
    w = torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
    layer = QuantLinear.from_qtensor(quantize(w, Spec(Int(4), granularity), MinMax()))
    layer.prepare()
    x = torch.randn(400, 192, generator=torch.Generator().manual_seed(1))
    y, by_tiles = layer(x), native.linear(native.instruction_sets()[0], x, layer.tiles, 48)
    assert torch.equal(y, by_tiles) == tiled
    right = x.double() @ layer.dequantize().double().T
    assert all(10 * torch.log10(right.square().sum() / (right - z).square().sum()) > 110 for z in (y, by_tiles))
