"""SmoothQuant: its levels, a searched alpha, and static ranges without massive first tokens."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import lowbit
from lowbit.modules import ActSpec, LinearFormat
from lowbit.numerics import AbsMax, Int, LaterRange, PerChannel, PerTensor, PerToken, Range, Spec
from lowbit.scheme import activation
from lowbit.steps import BlockState, Search, Set, SetActivationRange, Smooth, SmoothPowers
from lowbit.steps.judging import errors_of
from lowbit.steps.listen import Place, listen
from lowbit.steps.search import at_port

import helpers
from helpers import sqnr_db, tiny_llama
from matrix import save_model

W8 = Spec(Int(8, symmetric=True), PerChannel())
STATIC = activation(8, per="tensor", static=True)


@pytest.fixture(scope="module")
def first_block(tmp_path_factory):
    """The first block of a tiny llama and its calibration windows."""
    return helpers.first_block(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def state(first_block):
    def make(act: ActSpec | None = None, weight: Spec = W8, first: float = 1.0) -> BlockState:
        """A state whose up projection gives ``first`` times its output for the first token of every window."""
        block, resolved, io = first_block
        formats = {path: LinearFormat(weight, act) for path in resolved.linears}
        made = BlockState.of("model.layers.0", copy.deepcopy(block), resolved, formats, io)
        if first != 1.0:

            def massive(module: nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
                return torch.cat([y[:, :1] * first, y[:, 1:]], 1)

            made.draft("mlp.up_proj").register_forward_hook(massive)
        return made

    return make


# Levels


@pytest.mark.parametrize(
    ("level", "weight", "act", "static"),
    [
        ("O1", PerTensor(), PerToken(), False),
        ("O2", PerTensor(), PerTensor(), False),
        ("O3", PerTensor(), PerTensor(), True),
        ("O1-pc", PerChannel(), PerToken(), False),
    ],
)
def test_levels_are_those_of_the_papers_table(level, weight, act, static):
    recipe = lowbit.recipe("smoothquant", level=level)
    (rule,) = recipe.scheme.rules
    assert (rule.weight.granularity, rule.activation.spec.granularity, rule.activation.static) == (weight, act, static)
    assert rule.weight.grid == rule.activation.spec.grid == Int(8, symmetric=True)
    ranges = [step for step in recipe.steps if isinstance(step, SetActivationRange)]
    assert bool(ranges) == static and recipe.feed == "fp"
    assert isinstance(recipe.steps[0], Set)  # so ranges are measured after it


def test_static_ranges_are_measured_again_after_smoothing(state):
    before, after = state(STATIC), state(STATIC)
    SetActivationRange().run(before)
    for step in lowbit.recipe("smoothquant", level="O3").steps[:-1]:
        step.run(after)
    largest = {name: stats[AbsMax()].max().item() for name, stats in after.collect([AbsMax()]).items()}
    for shared in after.resolved.shared_inputs:
        for path in shared.readers:
            assert after.draft(path).act_params.scale.item() * 127 == pytest.approx(largest[shared.name], rel=1e-6)
    q, down = "self_attn.q_proj", "mlp.down_proj"
    assert after.draft(q).act_params.scale < 0.5 * before.draft(q).act_params.scale  # outlier channels were smoothed
    assert after.draft(down).act_params.scale == pytest.approx(
        before.draft(down).act_params.scale
    )  # nothing is smoothed there


# A searched alpha


def test_alphas_to_search_are_the_identity_and_the_rule_at_every_step_of_the_grid(state):
    s = state(activation(8))
    edge, stats = s.resolved.edge("norm_mlp"), s.collect(SmoothPowers().needs)
    tried = SmoothPowers(4)(s, edge, stats)
    assert len(tried) == SmoothPowers(4).count == 6 and torch.equal(tried[0].s, torch.ones(64))
    for i, transform in enumerate(tried[1:]):
        assert torch.equal(transform.s, Smooth(i / 4)(s, edge, stats).s)
    with pytest.raises(ValueError, match="at least one step, found 0"):
        SmoothPowers(0)


def test_a_searched_alpha_is_the_best_of_the_grid_at_each_edge_by_the_output_of_its_judge(state):
    act = activation(4)
    s = state(act)
    candidates, at = SmoothPowers(5), ("norm_*", "v_o", "up_down")
    search = Search(candidates, at)
    stats, losses, best = s.collect(candidates.needs), {}, {}
    edges = list(s.edges(at, candidates.kind))
    with torch.no_grad():
        for edge in edges:
            tried = candidates(s, edge, stats)
            calls = listen(s, [Place(edge.judge)])
            losses[edge.name] = []
            for transform in tried:
                with ExitStack() as stack:
                    for port in edge.consumers:
                        stack.enter_context(s.draft(port.module).simulated(at_port(transform, port)))
                    losses[edge.name].append(errors_of(s, calls).sum().item())
            best[edge.name] = tried[losses[edge.name].index(min(losses[edge.name]))]
    assert len({losses[name].index(min(losses[name])) for name in losses}) > 1  # no one alpha is best everywhere
    committed = {}
    s.commit = lambda edge, transform, kind: committed.update({edge.name: transform})
    search.run(s)
    assert committed.keys() == best.keys()
    assert all(torch.equal(committed[name].s, best[name].s) for name in best)


def test_a_searched_alpha_loses_less_than_any_fixed_one_on_a_lone_linear():
    torch.manual_seed(0)
    linear = nn.Linear(96, 48)
    x = torch.randn(400, 96)
    x[:, [3, 50]] *= 30
    errors = {}
    for alpha in ("search", 0.0, 0.25, 0.5, 0.75, 1.0):
        recipe = lowbit.recipe("smoothquant", bits=8, activation_bits=4, alpha=alpha, grid=4)
        with torch.no_grad():
            errors[alpha] = (linear(x) - lowbit.quantize_linear(linear, x, recipe)(x)).square().mean().item()
    fixed = [error for alpha, error in errors.items() if alpha != "search"]
    assert (
        errors["search"] <= 1.001 * min(fixed) and errors["search"] < 0.9 * errors[0.5]
    )  # scales are stored in float16


def test_what_alpha_may_be_is_a_share_or_search():
    assert lowbit.recipe("smoothquant", alpha="search", grid=8, windows=2).steps[0] == Search(
        SmoothPowers(8), ("norm_*",), 2
    )
    with pytest.raises(ValueError, match="alpha is a share"):
        lowbit.recipe("smoothquant", alpha=1.5)
    with pytest.raises(ValueError, match="alpha"):
        lowbit.recipe("smoothquant", alpha="serch")


# First tokens


def test_ranges_can_leave_out_the_first_tokens_of_every_window(state):
    s = state(first=1000.0)
    stats = s.stats_of(s.collect([Range(), LaterRange(1), LaterRange(31), LaterRange(32)]), "mlp.down_proj")
    seen = []
    s.block.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for i in range(len(s.io)):
            s.io.call(s.block, s.io.window(i))
    for skip, need in ((0, Range()), (1, LaterRange(1)), (31, LaterRange(31))):
        kept = torch.cat([x_TI[skip:] for x_TI in seen])
        assert torch.equal(stats[need], torch.stack([kept.amin(0), kept.amax(0)]))
    assert LaterRange(32) not in stats  # nothing is left
    with pytest.raises(ValueError, match="at least 1, found 0"):
        LaterRange(0)


def test_the_report_names_inputs_whose_static_range_is_set_by_the_first_token(state):
    s = state(STATIC, first=1000.0)
    SetActivationRange().run(s)
    (note,) = s.notes
    assert "mlp.down_proj: the first token of a window reaches " in note and "skip_first=1" in note
    calm = state(STATIC)
    SetActivationRange().run(calm)
    assert calm.notes == []


@pytest.mark.parametrize("skip", [1, 3])
def test_first_tokens_that_are_left_out_do_not_set_the_range(state, skip):
    down, calm, spoiled, spared = (
        "mlp.down_proj",
        state(STATIC),
        state(STATIC, first=1000.0),
        state(STATIC, first=1000.0),
    )
    SetActivationRange(skip).run(calm)
    SetActivationRange().run(spoiled)
    SetActivationRange(skip).run(spared)
    assert spared.draft(down).act_params.scale == calm.draft(down).act_params.scale
    assert spoiled.draft(down).act_params.scale > 50 * spared.draft(down).act_params.scale
    assert "at run time" in spared.notes[0] and calm.notes == []


def test_windows_shorter_than_what_is_left_out_leave_a_range_unknown_and_say_so(state):
    s = state(STATIC)
    SetActivationRange(32).run(s)
    assert any("saw no token but the first 32 of each window" in note for note in s.notes)


def test_experts_that_only_some_tokens_reach_keep_all_of_them_and_say_so(tmp_path):
    save_model("mixtral", tmp_path / "model")
    recipe = lowbit.recipe("smoothquant", level="O3", skip_first=1)
    ids = torch.randint(3, 48, (4, 24), generator=torch.Generator().manual_seed(0))
    report = lowbit.quantize(tmp_path / "model", recipe, ids, out=tmp_path / "q", max_kl=50)
    said = [note for note in report.warnings if "are unknown there" in note]
    print(said)
    assert said and all("expert" in note for note in said)


def test_keeping_massive_first_tokens_out_saves_all_the_others():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    x = torch.randn(8, 16, 64)
    x[:, 0] *= 500
    found = {}
    for skip in (0, 1):
        q = lowbit.quantize_linear(linear, x, lowbit.recipe("smoothquant", level="O3", skip_first=skip))
        with torch.no_grad():
            found[skip] = sqnr_db(linear(x[:, 1:]), q(x[:, 1:]))
    assert found[1] > 30 > 10 > found[0]


def test_skipping_first_tokens_is_of_static_ranges_only():
    assert lowbit.recipe("smoothquant", level="O3", skip_first=2).steps[1] == SetActivationRange(2)
    with pytest.raises(ValueError, match="goes with level 'O3'"):
        lowbit.recipe("smoothquant", skip_first=1)
    with pytest.raises(ValueError, match="number of tokens"):
        SetActivationRange(-1)
