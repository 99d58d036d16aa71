"""RPTQ: clusters of channels, the order that makes them contiguous, and their ranges."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import lowbit
from lowbit.kernels import fake_quantize_activation
from lowbit.modules import ActSpec, LinearFormat
from lowbit.numerics import Affine, Int, MovingRange, PerChannel, PerCluster, PerTensor, Range, Samples, Spec
from lowbit.numerics.kmeans import kmeans_points
from lowbit.plan import plan
from lowbit.recipes import Recipe
from lowbit.scheme import activation, linears
from lowbit.solve import Gptq
from lowbit.steps import BlockState, Cluster, SearchClip, SetActivationRange, Solve
from lowbit.transforms import Permute

import helpers
from helpers import random_ids, sqnr_db, tiny_llama

W8 = Spec(Int(8), PerChannel())
STATIC = activation(4, symmetric=False, per="tensor", static=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("rptq") / "model")


@pytest.fixture(scope="module")
def first_block(place):
    return helpers.first_block(place)


@pytest.fixture
def state(first_block):
    def make(act: ActSpec | None = STATIC) -> BlockState:
        block, resolved, io = first_block
        formats = {path: LinearFormat(W8, act) for path in resolved.linears}
        return BlockState.of("model.layers.0", copy.deepcopy(block), resolved, formats, io)

    return make


def _output(state: BlockState) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([state.io.call(state.block, state.io.window(i)) for i in range(len(state.io))])


def _sizes(state: BlockState, path: str) -> tuple[int, ...]:
    grain = state.formats[path].act.spec.granularity
    assert isinstance(grain, PerCluster)
    return grain.sizes


# k-means


def test_points_that_lie_in_heaps_are_told_apart():
    heaps = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    which = torch.arange(60) % 3
    x = heaps[which] + 0.1 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    label = kmeans_points(x, 3, seed=0)
    assert all(label[which == i].unique().numel() == 1 for i in range(3)) and label.unique().numel() == 3
    assert torch.equal(label, kmeans_points(x, 3, seed=1))  # numbered by their means, not by their start


def test_no_cluster_is_empty_where_points_coincide_or_are_few():
    assert kmeans_points(torch.zeros(10, 2), 4, seed=0).unique().tolist() == [0, 1, 2, 3]
    assert sorted(kmeans_points(torch.randn(5, 2), 5, seed=0).tolist()) == [0, 1, 2, 3, 4]
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="5 points have 1 to 5 clusters"):
            kmeans_points(torch.randn(5, 2), wrong, seed=0)


# Orders


@pytest.mark.parametrize("count", [1, 5, 96])
def test_the_reordered_block_computes_what_the_original_does(state, count):
    s = state()
    Cluster(count, min(count, 16)).run(s)
    assert sqnr_db(s.io.y, _output(s)) > 110


def test_clusters_cover_the_channels_and_orders_stay_within_heads(state):
    s, before = state(), state()
    Cluster(7, 3).run(s)
    for path in s.formats:
        assert sum(_sizes(s, path)) == before.draft(path).weight.shape[1]
    assert len(_sizes(s, "mlp.down_proj")) == len(_sizes(s, "self_attn.q_proj")) == 7
    o_sizes = torch.tensor(_sizes(s, "self_attn.o_proj"))  # 4 query heads of 16 channels, on 2 key-value heads
    assert len(o_sizes) == 4 * 3 and o_sizes.view(4, 3).sum(1).tolist() == [16] * 4
    assert torch.equal(o_sizes.view(2, 2, 3)[:, 0], o_sizes.view(2, 2, 3)[:, 1])
    old, new = (each.draft("self_attn.v_proj").weight.sort(1).values.view(2, 16, 64) for each in (before, s))
    for head in range(2):
        rows = {tuple(row.tolist()) for row in old[head]}
        assert {tuple(row.tolist()) for row in new[head]} == rows and not torch.equal(old[head], new[head])


def test_gate_and_up_move_alike_and_norms_do_not(state):
    s, before = state(), state()
    Cluster(6, 2).run(s)
    order = [
        next(j for j, row in enumerate(before.draft("mlp.up_proj").weight.sort(1).values) if torch.allclose(row, moved))
        for moved in s.draft("mlp.up_proj").weight.sort(1).values
    ]
    for path in ("mlp.up_proj", "mlp.gate_proj"):
        moved = before.draft(path).weight[order].sort(1).values
        torch.testing.assert_close(s.draft(path).weight.sort(1).values, moved)
    assert torch.equal(s.block.input_layernorm.weight, before.block.input_layernorm.weight)
    readers = [s.draft(f"self_attn.{name}_proj").pre[0].index for name in "qkv"]
    assert torch.equal(readers[0], readers[1]) and torch.equal(readers[0], readers[2])
    assert not s.draft("mlp.down_proj").pre and not s.draft("self_attn.o_proj").pre


# Ranges


def _ranged(s: BlockState, count: int, head_count: int = 2, **options) -> BlockState:
    Cluster(count, head_count).run(s)
    SetActivationRange(**options).run(s)
    return s


def _lost(s: BlockState, path: str, need: Samples = Samples(4096)) -> float:
    """The error of the rounded input, each channel weighted by the weights that it meets."""
    name = next(shared.name for shared in s.resolved.shared_inputs if path in shared.readers)
    x = s.collect([need], [name])[name][need]
    form = s.formats[path]
    return (
        (
            (fake_quantize_activation(x, form.act.spec, s.draft(path).act_params) - x).square()
            * s.draft(path).weight.square().sum(0)
        )
        .sum()
        .item()
    )


def test_one_cluster_is_one_range_for_the_tensor(state):
    clustered, plain = _ranged(state(), 1, 1), state()
    SetActivationRange().run(plain)
    for path in ("mlp.down_proj", "self_attn.q_proj"):
        assert torch.equal(clustered.draft(path).act_params.scale, plain.draft(path).act_params.scale)
        assert torch.equal(clustered.draft(path).act_params.zero, plain.draft(path).act_params.zero)


def test_as_many_clusters_as_channels_are_a_range_for_each_and_the_error_falls_on_the_way(state):
    every = _ranged(state(), 96)
    (bounds,) = every.collect([Range()], ["mlp_hidden"])["mlp_hidden"].values()
    wanted = Int(4).from_range(bounds[0][:, None], bounds[1][:, None])
    torch.testing.assert_close(every.draft("mlp.down_proj").act_params.scale, wanted.scale)
    errors = [_lost(_ranged(state(), count), "mlp.down_proj") for count in (1, 4, 16, 96)]
    assert all(finer < coarser for coarser, finer in itertools.pairwise(errors))


def test_a_range_covers_its_cluster_and_a_moving_average_is_inside_it(state):
    wide, narrow = _ranged(state(), 5), _ranged(state(), 5, decay=0.5)
    (bounds,) = wide.collect([Range()], ["mlp_hidden"])["mlp_hidden"].values()
    params = wide.draft("mlp.down_proj").act_params
    start = 0
    for g, size in enumerate(_sizes(wide, "mlp.down_proj")):
        lo, hi = bounds[0, start : start + size].min().clamp(max=0), bounds[1, start : start + size].max().clamp(min=0)
        assert params.scale[g].item() == pytest.approx((hi - lo).item() / 15, rel=1e-5)
        start += size
    assert (narrow.draft("mlp.down_proj").act_params.scale <= params.scale * (1 + 1e-6)).all()
    assert (narrow.draft("mlp.down_proj").act_params.scale < params.scale).any()


def test_a_moving_average_follows_its_windows():
    need, acc = MovingRange(0.75), None
    for window in (torch.tensor([[-4.0, 1.0], [4.0, 2.0]]), torch.tensor([[0.0, 5.0], [0.0, 6.0]])):
        acc = need.update(acc, window)
    assert acc is not None and acc.tolist() == [[-3.0, 2.0], [3.0, 3.0]]
    with pytest.raises(ValueError, match="below 1"):
        MovingRange(1.0)


def test_a_searched_range_loses_no_more_on_the_tokens_that_it_saw(state):
    plain, searched = _ranged(state(), 4), _ranged(state(), 4, shrinks=20)
    for path in ("mlp.down_proj", "self_attn.o_proj", "mlp.up_proj"):
        assert (searched.draft(path).act_params.scale <= plain.draft(path).act_params.scale).all()
        lost = [_lost(each, path, Samples(2048, stride=8)) for each in (searched, plain)]
        assert lost[0] <= lost[1] * (1 + 1e-6)
    assert (searched.draft("mlp.down_proj").act_params.scale < plain.draft("mlp.down_proj").act_params.scale).any()


def test_values_of_a_cluster_use_its_parameters_only():
    spec = Spec(Int(4), PerCluster((2, 5, 1)), scale_dtype="float32")
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    params = Affine(torch.tensor([[0.1], [0.5], [2.0]]), torch.tensor([[3.0], [8.0], [0.0]]))
    found = fake_quantize_activation(x, spec, params)
    for g, columns in enumerate((slice(0, 2), slice(2, 7), slice(7, 8))):
        alone = Affine(params.scale[g : g + 1], params.zero[g : g + 1])
        assert torch.equal(
            found[..., columns], fake_quantize_activation(x[..., columns], Spec(Int(4), PerTensor()), alone)
        )
    codes = spec.grid.encode(spec.granularity.split(x), params)  # what the canonical view gives
    assert torch.equal(found, spec.granularity.join(spec.grid.decode(codes, params), tuple(x.shape)))


def test_an_input_that_no_token_reached_is_cut_as_it_comes(state):
    s = state()
    s.collect = lambda needs, inputs=None: {name: {} for name in s.readers().values()}
    _ranged(s, 8)
    assert len(_sizes(s, "mlp.down_proj")) == 8 and s.draft("mlp.down_proj").act_params.scale.shape == (8, 1)
    assert torch.equal(s.draft("mlp.down_proj").weight, state().draft("mlp.down_proj").weight)
    assert any("saw no token" in note for note in s.notes)


# Whole runs


def test_clusters_beat_one_range_at_the_same_bits(place, tmp_path):
    errors = []
    for name, options in (("one", {"clusters": 1, "head_clusters": 1}), ("many", {"clusters": 16, "head_clusters": 4})):
        recipe = lowbit.recipe("rptq", bits=8, norm_bits=4, ranges="minmax", **options)
        errors.append(lowbit.quantize(place, recipe, random_ids(6, 24), out=tmp_path / name, max_kl=50).kl)
    assert errors[1] < 0.7 * errors[0]


def test_what_norms_give_keeps_eight_bits_and_the_plan_says_what_is_stored(place, tmp_path):
    recipe = lowbit.recipe("rptq", clusters=8, head_clusters=2)
    report = lowbit.quantize(place, recipe, random_ids(4, 24), out=tmp_path / "q", max_kl=50)
    layers = lowbit.load(tmp_path / "q", torch.float32).model.layers
    for linear, bits, clusters in (
        (layers[0].self_attn.k_proj, 8, 8),
        (layers[0].mlp.gate_proj, 8, 8),
        (layers[0].self_attn.o_proj, 4, 8),
        (layers[0].mlp.down_proj, 4, 8),
    ):
        assert linear.act.spec.grid == Int(bits) and linear.act_params.scale.shape == (clusters, 1)
    assert isinstance(layers[0].self_attn.q_proj.pre[0], Permute) and layers[0].mlp.down_proj.pre == ()
    (integer,) = (r.why_not for r in layers[0].mlp.down_proj.explain() if r.kernel == "int8_torch")
    assert integer is not None and "an integer sum needs one scale" in integer
    told = plan(place, recipe)
    stored = {layer.name: layer.bits_per_weight for layer in report.layers}
    assert {layer.name: layer.bits_per_weight for layer in told.layers if not layer.reason} == stored
    rows = {layer.name: layer.activation for layer in told.layers if not layer.reason}
    assert rows["model.layers.0.mlp.down_proj"] == "int4 asymmetric, 8 clusters of channels, static"
    assert rows["model.layers.1.self_attn.q_proj"] == "int8 asymmetric, 8 clusters of channels, static"
    assert any("a range for each cluster" in warning for warning in told.warnings)


def test_a_gather_is_counted_in_the_bits():
    linear, x = torch.nn.Linear(96, 48), torch.randn(400, 96)
    plain = lowbit.quantize_linear(linear, None, lowbit.recipe("rtn", bits=4, group_size=None))
    q = lowbit.quantize_linear(linear, x, lowbit.recipe("rptq", clusters=8))
    assert q.stored_bits - plain.stored_bits == 32 * 96 + 2 * 32 * 8
    with torch.no_grad():
        assert sqnr_db(linear(x), q(x)) > 10


# Refusals


def test_a_mix_keeps_the_inputs_formats_of_the_roles():
    mixed = lowbit.recipe("rptq+gptq", bits=3, group_size=32)
    rules = {rule.match: rule for rule in mixed.scheme.rules}
    assert {match: rule.activation.spec.grid.bits for match, rule in rules.items()} == {"*": 4, "behind_norm": 8}
    assert {rule.weight for rule in rules.values()} == {
        lowbit.recipe("gptq", bits=3, group_size=32).scheme.rules[0].weight
    }
    with pytest.raises(ValueError, match=r"'mlp'.*'behind_norm'"):
        lowbit.recipe("rptq+zeroquant", ffn_bits=4)


@pytest.mark.parametrize(
    ("steps", "act", "reason"),
    [
        ((Cluster(), Solve()), activation(8), "activations here are dynamic"),
        (
            (SetActivationRange(), Cluster(), Solve()),
            STATIC,
            "Cluster transforms channels whose static activation ranges",
        ),
        ((Cluster(), SetActivationRange(), Solve(Gptq(order="act"))), STATIC, "order='group'"),
        ((SearchClip(), Cluster(), SetActivationRange(), Solve()), STATIC, "SearchClip chooses a range"),
    ],
)
def test_steps_that_would_undo_the_order_are_refused_before_any_work(steps, act, reason):
    with pytest.raises(ValueError, match=reason):
        Recipe.blockwise(
            name="mine", scheme=linears(lowbit.recipe("rtn", group_size=16).scheme.rules[0].weight, act), steps=steps
        )
