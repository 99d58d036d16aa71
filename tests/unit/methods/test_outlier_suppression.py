"""Outlier Suppression and Outlier Suppression+: what the two papers promise of their parts."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.architectures import Kind, block_modules, for_config, resolve, unfuse_experts
from lowbit.architectures.check import TOLERANCE, logits, randomize
from lowbit.checkpoints.source import open_model
from lowbit.modules import LinearFormat
from lowbit.numerics import (
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    Range,
    Samples,
    Spec,
    TokenRange,
    clipped_tokens,
    quantize,
)
from lowbit.numerics.fit import MinMax
from lowbit.recipes import Recipe
from lowbit.recipes import recipe as recipe_of
from lowbit.scheme import activation, linears
from lowbit.stages.stream import Stream
from lowbit.steps import (
    BlockIO,
    BlockMSE,
    BlockState,
    Incoherence,
    Learn,
    LearnedStepSizes,
    Midpoint,
    OwnGain,
    Search,
    SearchActivationRange,
    Set,
    SetActivationRange,
    Smooth,
    Solve,
    Thresholds,
)
from lowbit.transforms import Scale

from helpers import held, random_ids, sqnr_db, tiny_llama
from laws.test_architectures import CASES, SEEDS
from matrix import MIXED_ON, WORKS, outcome, save_model

NORMS = ("norm_*",)
W4 = Spec(Int(4), PerChannel())
STATIC4 = activation(4, symmetric=False, per="tensor", static=True)


def _random_model(case: str):
    model_type, options = CASES[case]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    unfuse_experts(model)
    randomize(model.double().eval(), SEEDS.get(case, 0))
    return model


def _bare_states(model) -> list[BlockState]:
    """Float64 blocks without calibration inputs, for rules that get their statistics directly."""
    architecture, states = for_config(model.config), []
    for block in block_modules(model, architecture):
        resolved = resolve(architecture, block.requires_grad_(False), model.config)
        states.append(BlockState.of("block", block, resolved, {}, None, store_dtype=torch.float64))
    return states


def _tokens() -> torch.Tensor:
    return torch.randint(0, 48, (3, 12), generator=torch.Generator().manual_seed(0))


def _change(model, before: torch.Tensor) -> float:
    return float((logits(model, _tokens()) - before).abs().max() / before.abs().max())


def _make(path):
    """A function from formats to a state of the first block of the model in ``path``, with its calibration windows."""
    source = open_model(path)
    model, architecture = source.load_full(), for_config(source.config)
    stream = Stream(model, architecture)
    vocabulary = source.config.vocab_size
    entered = [stream.enter(window[None] % vocabulary) for window in random_ids(4, 24)]
    x, call = torch.cat([hidden for hidden, _ in entered]), entered[0][1][0]
    block = block_modules(model, architecture)[0].requires_grad_(False)
    with torch.no_grad():
        y = torch.cat([call(block, window[None]) for window in x])
    resolved = resolve(architecture, block, source.config)

    def make(weight: Spec = W4, act=None) -> BlockState:
        formats = {path: LinearFormat(weight, act) for path in resolved.linears}
        return BlockState.of("block.0", copy.deepcopy(block), resolved, formats, BlockIO(x, y, call))

    return make


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return _make(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    path = tmp_path_factory.mktemp("opt")
    model = save_model("opt", path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm.weight" in name:  # one loud channel
                parameter.copy_(0.5 + torch.rand_like(parameter))
                parameter[3] *= 20
            elif "layer_norm.bias" in name:  # each channel to one side
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(path)
    return _make(path)


def _output(state: BlockState) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([state.io.call(state.block, state.io.window(i)) for i in range(len(state.io))])


def _error(state: BlockState) -> float:
    """The error of the quantized block. Solves the block."""
    Solve().run(state)
    return (_output(state) - state.io.y).square().mean().item()


# Gamma migration


@pytest.mark.parametrize("case", CASES)
def test_after_gamma_migration_every_gain_is_one_and_the_logits_are_what_they_were(case):
    model = _random_model(case)
    before, moved = logits(model, _tokens()), 0
    for state in _bare_states(model):
        Set(OwnGain(), NORMS).run(state)
        for edge in state.edges(NORMS, Kind.SCALE, note=False):
            (norm,) = edge.producers
            gain = state.block.get_parameter(norm.weight) + norm.gain_offset
            assert torch.equal(gain, torch.ones_like(gain))
            moved += 1
    assert _change(model, before) <= TOLERANCE
    assert moved or case in ("opt norm after, projected embeddings", "bloom residual after norm") or "weights" in case


def test_a_gain_stored_as_one_less_migrates_whole():
    (state, _) = _bare_states(_random_model("gemma2"))
    gain = 1 + state.block.get_parameter("input_layernorm.weight").clone()
    columns = state.block.get_parameter("self_attn.k_proj.weight").clone()
    Set(OwnGain(), NORMS).run(state)
    assert state.block.get_parameter("input_layernorm.weight").abs().max() == 0
    assert torch.equal(state.block.get_parameter("self_attn.k_proj.weight"), columns * gain)


def test_gains_next_to_nothing_stay_where_they_are(opt):
    state = opt()
    with torch.no_grad():
        state.block.self_attn_layer_norm.weight[:2] = torch.tensor([1e-7, 0.0])
    before, wanted = state.block.self_attn_layer_norm.bias.clone(), _output(state)
    Set(OwnGain(), NORMS).run(state)
    norm = state.block.self_attn_layer_norm
    assert norm.weight[:2].tolist() == pytest.approx([1e-7, 0.0]) and torch.equal(norm.bias[:2], before[:2])
    assert (norm.weight[2:] == 1).all() and not torch.equal(norm.bias[2:], before[2:])
    assert sqnr_db(wanted, _output(state)) > 90


def test_where_the_norms_output_is_the_residual_stream_the_report_says_that_gains_stay():
    (state, _) = _bare_states(_random_model("opt norm after, projected embeddings"))
    Set(OwnGain(), NORMS).run(state)
    assert state.notes == ["block: no edge 'norm_*' in this architecture: its scale is not applied"]


def test_only_an_edge_behind_a_norm_has_a_gain_to_migrate(llama):
    with pytest.raises(ValueError, match=r"'up_down' has no norm of its own.*mlp\.up_proj"):
        Set(OwnGain(), ("up_down",)).run(llama())


# Token-wise clipping


def test_a_share_of_one_is_the_range_of_all_values_and_smaller_shares_lie_within():
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) ** 3 + 1
    bounds = TokenRange().merge(x)
    assert clipped_tokens(bounds, 1.0).tolist() == [x.min().item(), x.max().item()]
    ranges = torch.stack([clipped_tokens(bounds, k / 50) for k in range(1, 51)])
    assert (ranges[1:, 0] <= ranges[:-1, 0]).all() and (ranges[1:, 1] >= ranges[:-1, 1]).all()
    assert len(ranges[:, 1].unique()) > 20


def test_a_clipped_range_ends_at_a_tokens_own_extreme():
    x = torch.randn(97, 8, generator=torch.Generator().manual_seed(1))
    largest, smallest = x.amax(1), x.amin(1)
    for share in (0.3, 0.9, 0.99):
        upper, lower = largest.abs().quantile(share), smallest.abs().quantile(share)
        wanted = [smallest[smallest >= -lower].min().item(), largest[largest <= upper].max().item()]
        assert clipped_tokens(TokenRange().merge(x), share).tolist() == wanted
    with pytest.raises(ValueError, match="above 0 and at most 1, found 0"):
        clipped_tokens(TokenRange().merge(x), 0)


def test_one_extreme_token_among_a_thousand_moves_the_range_by_one_token_at_most():
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(2))
    loud = torch.cat([x, 1000 * torch.ones(1, 8)])
    before, after = (clipped_tokens(TokenRange().merge(each), 0.99) for each in (x, loud))
    ordered = x.amax(1).sort().values
    assert before[1] == ordered[989] and after[1] in (ordered[989], ordered[990])


def test_the_search_for_ranges_never_loses_to_the_range_of_all_values(llama):
    extremes, searched = llama(act=STATIC4), llama(act=STATIC4)
    SetActivationRange().run(extremes)
    SearchActivationRange(span=0.9, step=0.1).run(searched)
    whole, found = (held(each, "act_params") for each in (extremes, searched))
    assert all(found[path].scale <= whole[path].scale for path in whole)
    assert any(found[path].scale < whole[path].scale for path in whole)
    assert _error(searched) < _error(extremes)


def test_a_search_of_one_share_is_the_range_of_all_values(llama):
    extremes, searched = llama(act=STATIC4), llama(act=STATIC4)
    SetActivationRange().run(extremes)
    SearchActivationRange(span=0.01, step=0.01).run(searched)
    assert held(searched, "act_params") == held(extremes, "act_params")


def test_static_ranges_are_searched_where_there_are_some(llama):
    state = llama(act=activation(8))
    SearchActivationRange().run(state)
    Learn((LearnedStepSizes(),), BlockMSE(), epochs=1).run(state)
    assert not held(state, "act_params")


def _simulated(state: BlockState, path: str, x: torch.Tensor, *trial) -> torch.Tensor:
    with state.draft(path).simulated(*trial):
        return state.draft(path)(x)


def _loss(state: BlockState) -> float:
    """The objective of search and learning: the block's error with everything quantized as simulated."""
    with ExitStack() as stack:
        for draft in state.drafts.values():
            stack.enter_context(draft.simulated())
        return (_output(state) - state.io.y).square().mean().item()


def test_learned_steps_end_no_worse_than_the_search_and_lower_the_error(llama):
    state = llama(act=STATIC4)
    SearchActivationRange(span=0.9, step=0.1).run(state)
    coarse, before = _loss(state), held(state, "act_params")
    Learn((LearnedStepSizes(1e-2),), BlockMSE(), epochs=8).run(state)
    assert _loss(state) < 0.99 * coarse
    assert state.draft("self_attn.q_proj").act_params.scale != before["self_attn.q_proj"].scale
    for path, params in held(state, "act_params").items():
        assert params.scale > 0 and params.zero == params.zero.round() and 0 <= params.zero <= 15, path


def test_no_epochs_of_learning_leave_the_ranges_as_the_search_found_them(llama):
    state = llama(act=STATIC4)
    SearchActivationRange().run(state)
    before = held(state, "act_params")
    Learn((LearnedStepSizes(),), BlockMSE(), epochs=0).run(state)
    assert held(state, "act_params") == before


def test_linears_that_read_one_input_share_its_learned_step(llama):
    state = llama(act=STATIC4)
    SearchActivationRange().run(state)
    Learn((LearnedStepSizes(1e-2),), BlockMSE(), epochs=1).run(state)
    q, k, v = (state.draft(f"self_attn.{role}_proj").act_params for role in "qkv")
    assert q == k == v


def test_gradients_reach_steps_and_zero_points(llama):
    state = llama(act=STATIC4)
    SearchActivationRange(span=0.5, step=0.1).run(state)
    module = LearnedStepSizes().make(state, {})
    params = module.chosen("mlp.down_proj", state.draft("mlp.down_proj").weight)["act_params"]
    x = state.collect([Samples(64)])["mlp_hidden"][Samples(64)] * 1.5  # some values beyond the range
    state.formats["mlp.down_proj"].act.spec.grid.fake(x.reshape(1, -1), params).square().sum().backward()
    reached = [p for p in module.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) == 2


def test_steps_are_learned_from_a_range_that_is_there(llama):
    with pytest.raises(ValueError, match="put SearchActivationRange or SetActivationRange first"):
        Learn((LearnedStepSizes(),), BlockMSE(), epochs=1).run(llama(act=STATIC4))


# Shift and thresholds


def _random_ranges(state: BlockState) -> dict:
    generator = torch.Generator().manual_seed(5)
    widths = {s.name: state.draft(s.readers[0]).weight.shape[1] for s in state.resolved.shared_inputs}
    bounds = {
        name: 4 * torch.randn(2, width, generator=generator, dtype=torch.float64) for name, width in widths.items()
    }
    return {name: {Range(): each.sort(0).values} for name, each in bounds.items()}


@pytest.mark.parametrize("case", CASES)
def test_shifts_and_threshold_scales_leave_the_logits_as_they_were(case):
    model = _random_model(case)
    before, applied = logits(model, _tokens()), 0
    for state in _bare_states(model):
        stats = _random_ranges(state)
        for edge in state.edges(NORMS, Kind.SHIFT, note=False):
            state.commit(edge, Midpoint()(state, edge, stats), Kind.SHIFT)
        for edge in state.edges(("norm_*", "*up_down*"), Kind.SCALE, note=False):
            scale = Thresholds(10)(state, edge, stats)[7]
            assert (scale.s > 1).any()
            state.commit(edge, scale, Kind.SCALE)
            applied += 1
    assert applied or "gelu" in case or for_config(model.config).name in ("opt", "bloom")
    assert _change(model, before) <= TOLERANCE


def test_after_the_shift_every_channel_is_centred(opt):
    state = opt()
    Set(Midpoint(), NORMS).run(state)
    assert not state.notes
    for name in ("attention_in", "mlp_in"):
        lo, hi = state.collect([Range()])[name][Range()]
        torch.testing.assert_close(hi, -lo, rtol=1e-4, atol=1e-5)
    assert sqnr_db(state.io.y, _output(state)) > 90


def test_norms_without_a_bias_are_not_shifted_and_the_report_says_so(llama):
    state = llama()
    Set(Midpoint(), NORMS).run(state)
    assert [note for note in state.notes if "'norm_qkv' cannot carry a shift" in note]
    assert state.block.get_submodule("self_attn.q_proj").bias is None


def test_thresholds_begin_with_no_scale_and_no_scale_is_under_one(llama):
    state = llama()
    stats, edge = state.collect([Range()]), state.resolved.edge("norm_mlp")
    bounds = stats["mlp_in"][Range()]
    magnitude = bounds.abs().amax(0)
    tried = Thresholds(grid=20, smallest=0.1, widest=1e9)(state, edge, stats)
    assert len(tried) == 21 and torch.equal(tried[0].s, torch.ones(64))
    largest = float(magnitude.max())
    for i, transform in enumerate(tried):
        t = largest - i * (largest - 0.1) / 20
        assert (transform.s >= 1).all()
        assert (magnitude / transform.s).max().item() == pytest.approx(t, rel=1e-4)
        assert torch.equal(transform.s > 1 + 1e-5, magnitude > t * (1 + 1e-5))


def test_wide_ranges_are_cut_into_more_thresholds_and_small_ones_end_at_a_tenth(llama):
    state = llama()
    edge = state.resolved.edge("norm_mlp")
    wide = torch.zeros(2, 64)
    wide[1, 3] = 70.2
    assert len(Thresholds()(state, edge, {"mlp_in": {Range(): wide}})) == 141
    assert len(Thresholds()(state, edge, {"mlp_in": {Range(): wide / 2}})) == 101
    small = Thresholds()(state, edge, {"mlp_in": {Range(): wide / 1000}})
    assert len(small) == 101 and small[-1].s.max().item() == pytest.approx(10)
    assert [t.s.max() for t in Thresholds()(state, edge, {"mlp_in": {Range(): 0 * wide}})] == [1.0]
    assert not Thresholds()(state, edge, {"mlp_in": {}})


def test_a_channel_that_is_silent_is_not_scaled(llama):
    state = llama()
    edge, bounds = state.resolved.edge("norm_mlp"), torch.tensor([[-9.0], [9.0]]).repeat(1, 64)
    bounds[:, 5] = 0.0
    for transform in Thresholds(5)(state, edge, {"mlp_in": {Range(): bounds}}):
        assert transform.s[5] == 1 and torch.isfinite(transform.s).all()


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("by", ["judge", "linears"])
def test_searched_thresholds_keep_the_function_and_lower_the_error(llama, by, in_turn):
    act = activation(4, symmetric=False)
    plain, searched = llama(act=act), llama(act=act)
    Search(Thresholds(20), ("norm_*", "*up_down*"), None, by, in_turn).run(searched)
    assert sqnr_db(searched.io.y, _output(searched)) > 90
    assert _error(searched) < 0.8 * _error(plain)


def test_in_turn_only_the_first_edge_is_searched_on_the_block_as_it_was(llama):
    rough = Spec(Int(2), PerChannel())
    at_once, in_turn = (llama(rough, activation(3, symmetric=False)) for _ in range(2))
    Search(Thresholds(20), ("*up_down*", "norm_*"), None).run(at_once)
    Search(Thresholds(20), ("*up_down*", "norm_*"), None, in_turn=True).run(in_turn)
    assert torch.equal(at_once.draft("self_attn.q_proj").weight, in_turn.draft("self_attn.q_proj").weight)
    assert not torch.equal(at_once.draft("mlp.down_proj").weight, in_turn.draft("mlp.down_proj").weight)


def test_in_turn_each_edge_sees_its_input_behind_quantized_linears(llama):
    seen: list[float] = []

    class Watched(Thresholds):
        def __call__(self, state, edge, stats):
            seen.append(stats[edge.inputs[0]][Range()].abs().max().item())
            return super().__call__(state, edge, stats)

    rough = Spec(Int(2), PerChannel())
    for in_turn in (False, True):
        Search(Watched(2), ("norm_qkv", "norm_mlp", "up_down"), 1, in_turn=in_turn).run(llama(rough))
    assert seen[0] == seen[3] and seen[1] != seen[4] and seen[2] != seen[5]


@pytest.mark.parametrize("grain", [PerChannel(), PerGroup(16)], ids=str)
def test_the_codes_of_up_are_those_before_the_fold_into_its_rows(llama, grain):
    state, spec = llama(), Spec(Int(4), grain, scale_dtype="float32")
    before = quantize(state.draft("mlp.up_proj").weight, spec, MinMax())
    edge, stats = state.resolved.edge("up_down"), state.collect([Range()])
    scale = Thresholds(20)(state, edge, stats)[-3]
    assert (scale.s > 1.5).any()
    state.commit(edge, scale, Kind.SCALE)
    after = quantize(state.draft("mlp.up_proj").weight, spec, MinMax())
    assert torch.equal(after.codes, before.codes) and torch.equal(after.params.zero, before.params.zero)
    rows = before.params.scale.view(96, -1) / scale.s[:, None]
    torch.testing.assert_close(after.params.scale.view(96, -1), rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("act", [activation(6, symmetric=False), STATIC4], ids=["dynamic", "static"])
def test_what_the_search_simulates_is_what_is_stored(llama, act):
    state = llama(act=act)
    edge, stats = state.resolved.edge("norm_mlp"), state.collect([Range(), Samples(64)])
    x, bounds = stats["mlp_in"][Samples(64)], stats["mlp_in"][Range()]
    scale = Thresholds(20)(state, edge, stats)[12]
    foreseen = _simulated(state, "mlp.gate_proj", x, scale, bounds)
    state.commit(edge, scale, Kind.SCALE)
    if act.static:
        SetActivationRange().run(state)
    Solve().run(state)
    assert sqnr_db(state.block.get_submodule("mlp.gate_proj")(scale.forward(x)), foreseen) > 45


def test_without_a_known_range_a_static_activation_is_simulated_by_the_calls_own(llama):
    state, x = llama(act=STATIC4), torch.randn(3, 64)
    dynamic = llama(act=activation(4, symmetric=False, per="tensor"))
    assert torch.equal(_simulated(state, "mlp.up_proj", x), _simulated(dynamic, "mlp.up_proj", x))
    assert not torch.equal(
        _simulated(state, "mlp.up_proj", x, Scale(torch.ones(64)), 9 * torch.tensor([[-1.0], [1.0]]).repeat(1, 64)),
        _simulated(dynamic, "mlp.up_proj", x),
    )


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="smallest > 0"):
        Thresholds(smallest=0)
    with pytest.raises(ValueError, match="'judge' or 'linears', found 'both'"):
        Search(Thresholds(), NORMS, by="both")
    with pytest.raises(ValueError, match="0 < step <= span"):
        SearchActivationRange(span=0.1, step=0.2)
    with pytest.raises(ValueError, match="one window or more"):
        SearchActivationRange(windows=0)


# The methods


def test_a_method_may_have_a_short_name_alone_and_in_a_mix():
    assert recipe_of("osplus", bits=4) == recipe_of("outlier-suppression-plus", bits=4)
    assert recipe_of("osplus+gptq") == recipe_of("outlier-suppression-plus+gptq")
    with pytest.raises(ValueError, match="osplus"):
        recipe_of("os-plus")


def test_ranges_are_fixed_behind_every_transform_of_a_mix():
    steps = [type(step).__name__ for step in recipe_of("outlier-suppression+quip").steps]
    assert steps == ["Set", "Incoherence", "SearchActivationRange", "Learn", "Solve"]
    steps = [type(step).__name__ for step in recipe_of("smoothquant+quip", level="O3").steps]
    assert steps == ["Set", "Incoherence", "SetActivationRange", "Solve"]


@pytest.mark.parametrize("late", [Set(Smooth(), NORMS), Incoherence()], ids=["Set", "Incoherence"])
def test_a_transform_behind_a_fixed_range_is_refused(late):
    scheme = linears(Spec(Int(4), PerTensor()), STATIC4)
    for step in (SetActivationRange(), SearchActivationRange()):
        with pytest.raises(
            ValueError, match=f"{type(late).__name__} transforms channels whose static activation ranges"
        ):
            Recipe.blockwise(name="mine", scheme=scheme, steps=(step, late, Solve()))
    Recipe.blockwise(name="mine", scheme=scheme, steps=(late, SearchActivationRange(), Solve()))
    with pytest.raises(ValueError, match="need the step SetActivationRange or SearchActivationRange"):
        Recipe.blockwise(name="mine", scheme=scheme, steps=(Learn((LearnedStepSizes(),)), Solve()))


def test_the_authors_settings_follow_the_bits():
    spans = {bits: recipe_of("outlier-suppression", activation_bits=bits).steps[1].span for bits in (8, 6, 4)}
    assert spans == {8: 0.1, 6: 0.3, 4: 0.9}
    with pytest.raises(ValueError, match="per tensor, per cluster"):
        recipe_of("osplus", static=True)
    static = recipe_of("osplus", static=True, per="tensor", symmetric=True)
    assert isinstance(static.steps[-2], SetActivationRange)


@pytest.mark.parametrize("name", ["outlier-suppression-plus", "outlier-suppression"])
def test_suppressing_outliers_beats_rounding_on_a_block_with_loud_channels(opt, name):
    options = {"bits": 6, "activation_bits": 5}
    wanted = recipe_of(name, **options)
    form = wanted.scheme.rules[0]
    plain, moved = opt(form.weight, form.activation), opt(form.weight, form.activation)
    if form.activation.static:
        SetActivationRange().run(plain)
    for step in wanted.steps[:-1]:
        step.run(moved)
    assert _error(moved) < 0.7 * _error(plain)


@pytest.mark.parametrize(
    "name", ["outlier-suppression-plus+gptq", "outlier-suppression-plus+quip", "outlier-suppression+quip"]
)
def test_mixes_with_solvers_and_rotations_run_end_to_end(name, tmp_path):
    model = save_model(MIXED_ON, tmp_path / "model")
    assert outcome(name, model, tmp_path / "model", tmp_path / "out") == WORKS


@pytest.mark.parametrize("name", ["outlier-suppression-plus", "outlier-suppression"])
def test_static_ranges_are_stored_with_the_layer_and_counted(name, tmp_path):
    path, ids = tiny_llama(tmp_path / "model"), random_ids(4, 32)
    options = {"static": True, "per": "tensor", "grid": 10} if name.endswith("plus") else {}
    lowbit.quantize(path, lowbit.recipe(name, **options), ids, out=tmp_path / "q", max_kl=50)
    layer = lowbit.load(tmp_path / "q").model.layers[1].mlp.down_proj
    assert layer.act_params is not None and layer.act_params.scale > 0
    rows, columns = 64, 96
    stored = columns * rows * layer.spec.grid.bits + rows * (
        16 + (not layer.spec.grid.symmetric) * layer.spec.grid.bits
    )
    assert layer.stored_bits == stored + 32 * (1 + (layer.act_params.zero is not None))
