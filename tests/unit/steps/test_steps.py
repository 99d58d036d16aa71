"""Steps on one block: what each method's paper promises."""

from __future__ import annotations

import copy
import dataclasses
from fnmatch import fnmatch

import pytest
import torch

from lowbit.modules import LinearFormat, QuantLinear, draft_linear
from lowbit.numerics import AbsMax, AbsSum, Clipped, Gram, Int, MinMax, PerChannel, PerGroup, Samples, Spec, fit_params
from lowbit.recipes import recipe as recipe_of
from lowbit.scheme import activation
from lowbit.solve import Nearest
from lowbit.stages.stream import Call
from lowbit.steps import (
    BlockMSE,
    BlockState,
    ClipShares,
    Learn,
    MeanAbsPower,
    Scales,
    Search,
    SearchClip,
    Set,
    SetActivationRange,
    Smooth,
    SmoothPowers,
    Solve,
)

import helpers
from helpers import held, sqnr_db, tiny_llama

W4 = Spec(Int(4), PerGroup(32))
W3 = Spec(Int(3), PerGroup(32))


@pytest.fixture(scope="module")
def first_block(tmp_path_factory):
    """The first block of a tiny llama, its calibration windows and its own outputs for them."""
    return helpers.first_block(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def state(first_block):
    def make(weight: Spec = W4, act=None) -> BlockState:
        block, resolved, io = first_block
        formats = {path: LinearFormat(weight, act) for path in resolved.linears}
        return BlockState.of("model.layers.0", copy.deepcopy(block), resolved, formats, io)

    return make


def _output(state: BlockState) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([state.io.call(state.block, state.io.window(i)) for i in range(len(state.io))])


def _mse(state: BlockState) -> float:
    return (_output(state) - state.io.y).square().mean().item()


def _norm_edge(state: BlockState):
    return state.resolved.edge("norm_mlp")


def _magnitudes(state: BlockState):
    """Largest activation and largest weight of each channel at the MLP norm's edge."""
    a = state.collect([AbsMax()])["mlp_in"][AbsMax()]
    w = torch.stack([state.draft(port.module).weight.abs().amax(0) for port in _norm_edge(state).consumers]).amax(0)
    return a, w


def test_smoothing_does_not_change_what_the_block_computes(state):
    s = state()
    before = state().draft("mlp.up_proj").weight
    Set(Smooth(0.5), ("norm_*", "v_o", "up_down")).run(s)
    assert not torch.equal(s.draft("mlp.up_proj").weight, before)
    assert sqnr_db(s.io.y, _output(s)) > 100


def test_smoothing_with_alpha_0_evens_out_the_weights_and_with_alpha_1_the_activations(state):
    flat_weights, flat_activations = state(), state()
    Set(Smooth(0.0), ("norm_mlp",)).run(flat_weights)
    Set(Smooth(1.0), ("norm_mlp",)).run(flat_activations)
    torch.testing.assert_close(_magnitudes(flat_weights)[1], torch.ones(64))
    torch.testing.assert_close(_magnitudes(flat_activations)[0], torch.ones(64))


def test_smoothing_with_alpha_half_shares_the_difficulty_and_twice_is_once(state):
    s = state()
    Set(Smooth(0.5), ("norm_mlp",)).run(s)
    a, w = _magnitudes(s)
    torch.testing.assert_close(a, w)
    once = s.draft("mlp.up_proj").weight.clone()
    Set(Smooth(0.5), ("norm_mlp",)).run(s)
    torch.testing.assert_close(s.draft("mlp.up_proj").weight, once)


def test_smoothing_leaves_dead_channels_alone(state):
    s = state()
    with torch.no_grad():
        s.block.post_attention_layernorm.weight[5] = 0.0
    edge = _norm_edge(s)
    scale = Smooth(0.5)(s, edge, s.collect([AbsMax()])).s
    assert scale[5] == 1 and torch.isfinite(scale).all()


def test_smoothing_helps_int8_activations_with_outlier_channels(state):
    errors = {}
    for alpha in (None, 0.5):
        s = state(Spec(Int(8, symmetric=True), PerChannel()), activation(6))
        if alpha is not None:
            Set(Smooth(alpha), ("norm_*",)).run(s)
        Solve().run(s)
        errors[alpha] = _mse(s)
    assert errors[0.5] < 0.7 * errors[None]


def test_static_activation_ranges_never_clip_the_calibration_set(state):
    s = state(Spec(Int(8, symmetric=True), PerChannel()), activation(8, per="tensor", static=True))
    Set(Smooth(0.5), ("norm_*",)).run(s)
    SetActivationRange().run(s)
    largest = {name: stats[AbsMax()].max() for name, stats in s.collect([AbsMax()]).items()}
    for path, params in held(s, "act_params").items():
        shared = next(each for each in s.resolved.shared_inputs if path in each.readers)
        assert params.scale.item() * 127 >= largest[shared.name] * (1 - 1e-6)


def test_scale_candidates_start_with_the_identity_and_are_normalised(state):
    s = state()
    edge = _norm_edge(s)
    tried = MeanAbsPower(20)(s, edge, s.collect([AbsSum()]))
    assert len(tried) == 20 and torch.equal(tried[0].s, torch.ones(64))
    for transform in tried:
        assert (transform.s.max() * transform.s.min()).sqrt().item() == pytest.approx(1, rel=1e-5)


def test_the_scale_search_keeps_the_function_and_never_loses_to_no_scale(state):
    plain, searched = state(W3), state(W3)
    Search(MeanAbsPower(20), ("norm_*", "v_o", "up_down")).run(searched)
    assert sqnr_db(searched.io.y, _output(searched)) > 100
    # Judged like the search, edge by edge: the MLP's output with its first linears rounded to nearest.
    assert _mlp_loss(searched) <= _mlp_loss(plain) * (1 + 1e-6)
    assert not torch.equal(searched.draft("mlp.up_proj").weight, plain.draft("mlp.up_proj").weight)


@pytest.mark.parametrize("candidates", [MeanAbsPower(20), SmoothPowers(10)])
def test_a_race_chooses_the_scales_of_whole_sums(state, candidates):
    raced, summed = state(W3), state(W3)
    for s, certain in ((raced, False), (summed, True)):
        Search(candidates, ("norm_*", "v_o", "up_down"), certain=certain).run(s)
    assert all(torch.equal(draft.weight, summed.draft(path).weight) for path, draft in raced.drafts.items())


def _mlp_loss(state: BlockState) -> float:
    """Squared error of the MLP's output with gate and up rounded, on the output of the block's own norm."""
    inputs = []
    handle = state.block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    _output(state)
    handle.remove()
    x = torch.cat(inputs)
    with torch.no_grad():
        wanted, rounded = state.block.mlp(x), copy.deepcopy(state.block.mlp)
        for name in ("gate_proj", "up_proj"):
            weight = getattr(rounded, name).weight
            weight.copy_(Nearest().solve(weight, state.formats[f"mlp.{name}"].weight, {}).q.dequantize())
        return (rounded(x) - wanted).square().sum().item()


def test_one_loud_channel_makes_the_search_scale_it(state):
    s = state(W3)
    with torch.no_grad():
        s.block.post_attention_layernorm.weight[7] *= 50
    edge = _norm_edge(s)
    before = s.draft("mlp.up_proj").weight.clone()
    Search(MeanAbsPower(20), ("norm_mlp",)).run(s)
    grown = s.draft("mlp.up_proj").weight.abs().amax(0) / before.abs().amax(0)
    assert grown.argmax().item() == 7 and grown[7] > 2 * grown.median(), edge.name


def test_searched_clipping_never_loses_to_no_clipping_on_any_granule(state):
    s = state(W3)
    SearchClip().run(s)
    assert {"self_attn.q_proj", "self_attn.k_proj"}.isdisjoint(held(s, "range_shares"))
    gram = s.stats_of(s.collect([Gram()]), "mlp.down_proj")[Gram()]
    w = s.draft("mlp.down_proj").weight
    spec = Spec(Int(3), PerGroup(32), scale_dtype="float32")
    clipped = Nearest().solve(w, spec, {}, s.draft("mlp.down_proj").range_shares).q.dequantize() - w
    plain = Nearest().solve(w, spec, {}).q.dequantize() - w
    better = 0
    for start in range(0, 96, 32):
        h = gram[start : start + 32, start : start + 32]
        loss = [((d[:, start : start + 32] @ h) * d[:, start : start + 32]).sum(1) for d in (clipped, plain)]
        assert (loss[0] <= loss[1] * (1 + 1e-4) + 1e-9).all()
        better += int((loss[0] < loss[1] * 0.99).sum())
    assert better > 10


def test_a_clip_share_of_one_is_no_clipping():
    w = torch.randn(8, 64)
    ones = torch.ones(16, 1)
    clipped = fit_params(w, W4, Clipped(ones, ones))
    assert torch.equal(clipped.scale, fit_params(w, W4, MinMax()).scale)


def test_learned_clipping_with_open_logits_and_no_epochs_is_round_to_nearest(state):
    learned, plain = state(), state()
    Learn((ClipShares(init=30.0),), BlockMSE(), epochs=0).run(learned)
    Solve().run(learned)
    Solve().run(plain)
    for path in plain.formats:
        assert torch.equal(learned.block.get_submodule(path).dequantize(), plain.block.get_submodule(path).dequantize())


def test_learned_clipping_starts_from_the_share_of_its_logit(state):
    s = state()
    Learn((ClipShares(),), BlockMSE(), epochs=0).run(s)
    assert s.draft("mlp.up_proj").range_shares.hi_share_G1.unique().item() == pytest.approx(0.98201, abs=1e-4)


def test_learning_the_clipping_lowers_the_blocks_error_and_leaves_the_weights(state):
    learned, plain = state(W3), state(W3)
    before = {name: value.clone() for name, value in learned.block.state_dict().items()}
    Learn((ClipShares(lr=0.1),), BlockMSE(), epochs=10).run(learned)
    for name, value in learned.block.state_dict().items():
        assert torch.equal(value, before[name])
    Solve().run(learned)
    Solve().run(plain)
    assert _mse(learned) < 0.9 * _mse(plain)


def test_learned_scales_keep_the_function_and_lower_the_error_of_four_bit_activations(state):
    act = activation(4, symmetric=False)
    learned, plain = state(W4, act), state(W4, act)
    Learn((Scales(("norm_*", "v_o", "q_k")), ClipShares()), BlockMSE(), epochs=6).run(learned)
    assert sqnr_db(learned.io.y, _output(learned)) > 90
    Solve().run(learned)
    Solve().run(plain)
    assert _mse(learned) < 0.8 * _mse(plain)


def _epochs_until(state, monkeypatch, losses: list[float], epochs: int) -> int:
    """Epochs of gradient steps where the losses of the start and of each epoch are ``losses``; ``state`` has one batch."""
    given, seen = iter(losses), []

    def loss(self, *args):
        seen.append(next(given))
        leaf = args[2][0].lower[0]
        return leaf.sum() * 0 + seen[-1]

    monkeypatch.setattr(Learn, "_loss", loss)
    assert state.io is not None
    Learn((ClipShares(),), BlockMSE(), epochs=epochs, batch=len(state.io)).run(state)
    return len(seen) - 1


def test_learning_stops_where_the_loss_stands_still_for_a_quarter_of_the_epochs(state, monkeypatch):
    falling = [1 - 0.01 * i for i in range(13)]
    going, still = state(), state()
    assert _epochs_until(going, monkeypatch, falling, 12) == 12 and not going.notes
    assert _epochs_until(still, monkeypatch, [1.0, 0.9, *[0.9 - 1e-6 * i for i in range(11)]], 12) == 4
    assert _epochs_until(state(), monkeypatch, [1.0, *[1.1] * 11, 0.9], 12) == 12  # it may rise first
    assert "stood still" in still.notes[0]


def test_readers_of_one_input_quantize_it_once_while_learning(state, monkeypatch):
    s, calls = state(W4, activation(4, symmetric=False)), []
    plain = draft_linear.fake_activation
    monkeypatch.setattr(draft_linear, "fake_activation", lambda h, *rest: calls.append(h) or plain(h, *rest))
    assert s.io is not None
    Learn((ClipShares(),), BlockMSE(), epochs=0, batch=len(s.io)).run(s)
    assert len(calls) == 4 < len(s.drafts)  # the inputs of attention, its output, the MLP and its last linear


def test_gradients_reach_scales_and_both_ends_of_the_clipping(state):
    s = state(W3)
    stats = s.collect([AbsMax()])
    scales = Scales(("norm_*", "v_o")).make(s, stats)
    clip = ClipShares().make(s, stats)
    weights = {name: p.detach() for name, p in s.block.named_parameters()}
    scaled, loss = scales(weights), torch.zeros(())
    for path, draft in s.drafts.items():
        w_OI = scaled[f"{path}.weight"]
        with draft.simulated(weight=w_OI, **clip.chosen(path, w_OI)):
            loss = loss + draft(torch.eye(w_OI.shape[1])).square().sum()
    loss.backward()
    for parameter in (*scales.parameters(), *clip.parameters()):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_scales_that_would_vanish_are_held_at_the_smallest_allowed(state):
    s = state()
    module = Scales(("norm_mlp",)).make(s, s.collect([AbsMax()]))
    with torch.no_grad():
        module.vectors[0][:3] = torch.tensor([1e-5, -1e-5, 0.5])
    module.constrain()
    assert module.vectors[0][:3].tolist() == pytest.approx([1e-2, -1e-2, 0.5])


def test_a_step_that_names_no_edge_of_this_model_says_so(state):
    s = state()
    Set(Smooth(0.5), ("norm_elsewhere",)).run(s)
    assert any("no edge 'norm_elsewhere'" in note for note in s.notes)


def test_true_sequential_solving_sees_the_quantized_stages_before(state):
    at_once, in_turn = state(W3), state(W3)
    solver = recipe_of("gptq", bits=3, group_size=32).steps[-1].solver
    Solve(solver).run(at_once)
    Solve(solver, true_sequential=True).run(in_turn)
    first = (
        at_once.block.get_submodule("self_attn.q_proj").dequantize(),
        in_turn.block.get_submodule("self_attn.q_proj").dequantize(),
    )
    last = (
        at_once.block.get_submodule("mlp.down_proj").dequantize(),
        in_turn.block.get_submodule("mlp.down_proj").dequantize(),
    )
    assert torch.equal(*first) and not torch.equal(*last)


def test_solving_records_what_every_linear_lost(state):
    s = state()
    Solve().run(s)
    assert [record.role for record in s.records] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert all(isinstance(s.block.get_submodule(path), QuantLinear) for path in s.formats)
    assert all(0 < record.error < 0.1 and record.bits_per_weight > 4 for record in s.records)
    assert fnmatch(s.records[0].name, "model.layers.0.*q_proj")


def test_recorded_errors_are_those_of_the_packed_linear(state):
    s = state()
    x = s.collect([Samples(4096)])["mlp_in"][Samples(4096)]
    original = s.draft("mlp.up_proj").weight.clone()
    Solve().run(s)
    wanted, found = x @ original.T, s.block.get_submodule("mlp.up_proj")(x)
    error = ((wanted - found).square().sum() / wanted.square().sum()).item()
    assert next(r for r in s.records if r.role == "up").error == pytest.approx(error, rel=0.3)


def test_learning_without_text_is_refused(state):
    s = state()
    s.context = dataclasses.replace(s.context, io=None)
    with pytest.raises(ValueError, match="calibration text"):
        Learn((ClipShares(),)).run(s)


def test_calls_run_functions_as_well_as_modules():
    call = Call((1,), {"b": 2})
    assert call(lambda x, a, b: x + a + b, torch.zeros(1)).item() == 3
    assert call(lambda x, a, b: (x, "cache"), torch.zeros(1)).item() == 0
