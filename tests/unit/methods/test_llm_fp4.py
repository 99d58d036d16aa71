"""LLM-FP4: what the paper promises of searched formats, ranges and exponents of input channels."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.linear_api import lone_block
from lowbit.modules import ActSpec, QuantLinear, fake_quantize_activation
from lowbit.numerics import Float, PerChannel, PerInput, PerTensor, Spec, powers_of_two, quantize
from lowbit.plan import plan
from lowbit.steps import BlockState, SearchFloat
from lowbit.steps.search_float import input_range

from helpers import held, random_ids, tiny_llama

O, I = 24, 40
HALVED = Spec(powers_of_two(3), PerTensor(), scale_dtype="float32")
INPUT = Spec(Float(2, 1), PerInput(), HALVED, "float32")


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(I, O, bias=False)
    layer.weight.data[:, ::8] *= 4
    return layer


def inputs(seed: int = 1, spread: float = 1.0) -> Tensor:
    """Tokens ``[3, 64, I]`` whose channels differ in size, some by a large factor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 64, I, generator=generator) * torch.exp(spread * torch.randn(I, generator=generator))


def solved(x: Tensor | None = None, **options) -> QuantLinear:
    return lowbit.quantize_linear(linear(), inputs() if x is None else x, lowbit.recipe("llm-fp4", **options))


def lost(q: QuantLinear, x: Tensor) -> float:
    wanted = x @ linear().weight.T
    return ((q(x) - wanted).double().square().sum() / wanted.double().square().sum()).item()


def exponents(scale: Tensor) -> Tensor:
    """The k of each scale, which must be the largest scale halved k times."""
    k = (scale.max() / scale).log2()
    assert torch.equal(k, k.round())
    return k[:, 0]


@pytest.mark.parametrize("grid", Float.of(4).splits(), ids=lambda g: g.name)
def test_scales_of_channels_are_the_largest_halved_as_often_as_the_format_allows(grid):
    absmax = torch.tensor([8.0, 5.7, 5.6, 1.0, 1e-9, 0.0])
    k = exponents(input_range(Spec(grid, PerInput(), HALVED, "float32"), absmax, 1.0).scale)
    most = 2**grid.exponent - 1
    assert k.tolist() == [0, 0, 1, min(3, most), most, most]


def test_covering_scales_clip_no_channel_but_those_that_the_share_clips():
    absmax = 8 * torch.rand(200, generator=torch.Generator().manual_seed(0)) + 1
    spec = Spec(Float(4, 3), PerInput(), Spec(powers_of_two(4), PerTensor(), scale_dtype="float32"), "float32")
    nearest, covering = (
        input_range(spec, absmax, 1.0, way).scale[:, 0] * spec.grid.max_level / absmax for way in (False, True)
    )
    assert 0.7 < nearest.min() < 0.75 and covering.min() > 1 - 1e-6 and covering.max() < 2


def test_a_smaller_share_clips_the_widest_channels_only():
    absmax = torch.tensor([8.0, 4.0, 2.0])
    whole, half = (input_range(INPUT, absmax, share).scale[:, 0] for share in (1.0, 0.5))
    torch.testing.assert_close(whole, absmax / 6)
    torch.testing.assert_close(half, torch.tensor([4.0, 4.0, 2.0]) / 6)


def test_the_exponents_of_channels_move_into_the_weights_bit_for_bit():
    x, w = inputs()[0], linear().weight.detach()
    params = input_range(INPUT, x.abs().amax(0), 1.0)
    seen = fake_quantize_activation(x, ActSpec(INPUT, static=True), params)
    k_I, rho = exponents(params.scale), params.scale.max()
    on_one_grid = fake_quantize_activation(
        x * torch.exp2(k_I), ActSpec(Spec(INPUT.grid, PerTensor()), static=True), params._replace(scale=rho.view(1, 1))
    )
    assert torch.equal(on_one_grid * torch.exp2(-k_I), seen) and k_I.max() > 0
    stored = quantize(w, Spec(Float(2, 1), PerChannel()), lowbit.numerics.MinMax()).dequantize()
    products = seen[:, None] * stored
    assert torch.equal(on_one_grid[:, None] * (stored * torch.exp2(-k_I)), products)


def test_without_differences_between_channels_their_exponents_change_nothing():
    x = inputs(spread=0.0).clamp(-2, 2)
    x[0, 0] = 2.0  # every channel reaches the same magnitude
    formats = {"weight_format": "E2M1", "activation_format": "E2M1"}
    with_them, without = (solved(x, channel_bias=on, **formats) for on in (True, False))
    assert with_them.act_params is not None and without.act_params is not None
    assert (with_them.act_params.scale == without.act_params.scale).all()
    assert torch.equal(with_them(x), without(x))


def test_exponents_of_channels_help_where_channels_differ():
    x, unseen = inputs(spread=1.5), inputs(spread=1.5, seed=1)[:1]
    with_them, without = (lost(solved(x, channel_bias=on), unseen) for on in (True, False))
    assert with_them < 0.7 * without


@pytest.mark.parametrize("act_bits", [4, 6, 8, None])
def test_no_round_of_the_search_is_worse_than_the_one_before(act_bits):
    x = inputs()
    sampled = x[:, ::4].reshape(-1, I)
    losses = [lost(solved(x, activation_bits=act_bits, rounds=r, grid=7), sampled) for r in (0, 1, 2, 3)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[1] < losses[0]


def test_what_the_search_judged_is_what_is_stored():
    """No pair of formats, each searched by itself, has a smaller error on the tokens that the search saw."""
    x = inputs()
    sampled = x[:, ::4].reshape(-1, I)
    best = lost(solved(x), sampled)
    alone = {
        (w.name, a.name): lost(solved(x, weight_format=w.name, activation_format=a.name), sampled)
        for w in Float.of(4).splits()
        for a in Float.of(4).splits()
    }
    assert best <= 1.05 * min(alone.values()) and best < sorted(alone.values())[4]


def test_searching_only_the_format_of_weights_finds_the_best_of_all():
    x = inputs()
    sampled = x[:, ::4].reshape(-1, I)
    alone = {w.name: lost(solved(x, activation_bits=None, weight_format=w.name), sampled) for w in Float.of(4).splits()}
    found = solved(x, activation_bits=None)
    assert isinstance(found.spec.grid, Float) and found.spec.grid.name == min(alone, key=lambda name: alone[name])
    assert lost(found, sampled) == pytest.approx(min(alone.values()), rel=1e-6)


def test_weights_have_at_most_fifteen_values_a_row_and_the_bits_are_counted():
    for options in (
        {},
        {"channel_bias": False},
        {"activation_bits": 8},
        {"bits": 6, "activation_bits": 6},
        {"activation_format": "E2M1"},
    ):
        q, bits = solved(**options), options.get("bits", 4)
        assert all(len(row.unique()) <= 2**bits - 1 for row in q.dequantize())
        act = q.act
        assert act is not None
        width = 0 if act.spec.stats is None else act.spec.stats.grid.bits
        assert q.stored_bits == O * I * bits + 16 * O + I * width + 32
        assert q.stored_bits == 8 * sum(t.nbytes for t in q.state_dict().values())
    assert width == 2  # with a given format: as many bits as its exponent has


def test_more_bits_lose_less():
    x = inputs()
    losses = [lost(solved(x, bits=w, activation_bits=a), x) for w, a in ((3, 3), (4, 4), (4, 8), (6, 8), (8, 8))]
    assert all(after < before for before, after in pairwise(losses)) and losses[-1] < 1e-3 < 0.01 < losses[1]


def test_an_input_channel_that_is_always_zero_and_a_zero_token_are_kept():
    x = inputs()
    x[..., 5] = 0
    q = solved(x)
    assert torch.isfinite(q(x)).all() and torch.equal(q(torch.zeros(2, I)), torch.zeros(2, O))
    assert torch.isfinite(solved(torch.zeros(2, 8, I))(x)).all()


def test_formats_that_are_not_of_the_bits_are_refused():
    for options in ({"weight_format": "E4M3"}, {"activation_format": "E2M2"}, {"weight_format": "fp4"}):
        with pytest.raises(ValueError, match="floating format of 4 bits is called such as E2M1"):
            lowbit.recipe("llm-fp4", **options)
    with pytest.raises(ValueError, match="floating grid has 1 to 5 exponent bits"):
        lowbit.recipe("llm-fp4", bits=9)


def test_the_plan_tells_the_bits_whichever_formats_are_found(tmp_path):
    model = tiny_llama(tmp_path / "model")
    for options in ({}, {"activation_bits": 8, "activation_format": "E4M3"}, {"bits": 6}):
        recipe = lowbit.recipe("llm-fp4", grid=3, tokens=32, **options)
        report = lowbit.quantize(model, recipe, random_ids(3, 24), out=tmp_path / f"q{len(options)}", max_kl=50)
        told = {layer.name: layer.bits_per_weight for layer in plan(model, recipe).layers if not layer.reason}
        assert told == {layer.name: layer.bits_per_weight for layer in report.layers}


def test_layers_of_one_block_may_have_formats_of_their_own_and_load_with_them(tmp_path):
    model = tiny_llama(tmp_path / "model")
    lowbit.quantize(model, lowbit.recipe("llm-fp4", grid=5), random_ids(4, 32), out=tmp_path / "q", max_kl=50)
    packed = [m for m in lowbit.load(tmp_path / "q", torch.float32).modules() if isinstance(m, QuantLinear)]
    assert len({(m.spec, m.act) for m in packed}) > 1
    assert {m.spec.grid.bits for m in packed} == {4} and all(m.act and m.act.static for m in packed)
    assert all(
        (m.act_params.scale > 0).all() and len(m.act_params.scale) == m.in_features for m in packed if m.act_params
    )


@pytest.mark.parametrize("solver", [{"order": "act", "group_size": 8}, {"order": "group", "group_size": None}])
def test_channels_keep_their_scales_where_a_solver_stores_them_in_another_order(solver):
    x = inputs(spread=1.5)
    recipe = lowbit.recipe("llm-fp4+gptq", bits=8, activation_bits=8, mse=False, **solver)
    q = lowbit.quantize_linear(linear(), x, recipe)
    assert bool(q.pre) == (solver["order"] == "act")
    assert lost(q, x) < 3e-3


def test_no_channel_is_transformed_after_its_static_range_was_fixed():
    for name in ("llm-fp4+awq", "llm-fp4+quip", "llm-fp4+smoothquant"):
        with pytest.raises(ValueError, match=r"transforms channels whose static activation ranges are fixed.*before"):
            lowbit.recipe(name)
    assert [type(s).__name__ for s in lowbit.recipe("awq+llm-fp4", clip=False).steps] == [
        "Search",
        "SearchFloat",
        "Solve",
    ]


def test_a_linear_that_saw_no_token_is_stored_in_the_scheme_of_the_recipe():
    recipe = lowbit.recipe("llm-fp4")
    layer = linear()
    block = nn.Module()
    block.linear = layer.requires_grad_(False)
    form = recipe.scheme.format("linear", "linear")
    assert form is not None
    state = BlockState.of("b", block, lone_block(layer), {"linear": form})
    SearchFloat()._place(state, "linear", state.draft("linear"), {})
    assert state.formats["linear"] == form and not held(state, "range_shares") and "saw no token" in state.notes[0]
    torch.testing.assert_close(state.draft("linear").act_params.scale, torch.full((I, 1), 1 / 6))


@pytest.mark.parametrize("make", [{"rounds": -1}, {"grid": 0}, {"tokens": 0}])
def test_impossible_searches_are_refused(make):
    with pytest.raises(ValueError, match="found"):
        SearchFloat(**make)


def test_one_is_among_the_shares_whatever_the_grid():
    for grid in (1, 2, 3, 10, 19):
        shares = SearchFloat(grid=grid).shares
        assert shares[0] == 1.0 and len(set(shares)) == len(shares) and 0.3 <= min(shares) and max(shares) <= 1.2 + 1e-9
    assert len(SearchFloat(grid=19).shares) == 19
