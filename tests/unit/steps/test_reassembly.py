"""Channel reassembly: splitting, merging, dropping, and the limits of the search."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import lowbit
from lowbit.architectures.check import float64_everywhere, logits
from lowbit.modules import LinearFormat, QuantLinear
from lowbit.numerics import AbsMax, Gram, Int, PerChannel, Spec
from lowbit.scheme import activation
from lowbit.steps import BlockState, SearchReassembly, Solve
from lowbit.steps.judging import errors_of
from lowbit.steps.listen import Place, listen
from lowbit.steps.reassembly import assembled, disassembly, merge_distances, simulated_with, site_of, thresholds
from lowbit.transforms import Reassembly, Split
from unit.methods.test_quip import assert_unchanged, model_of, states

from helpers import assert_close_f64, held, sqnr_db
from laws.test_architectures import CASES


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int16)


# The transform

MOVED = Reassembly(8, numbers(6, 1, 4), numbers(2, 1, 2), numbers(5, 0, 5))


def test_a_reassembly_is_a_split_and_a_merge_in_place():
    x, w = normal(5, 8), normal(7, 8, seed=1)
    split = Split(torch.tensor([2, 1, 1, 1, 1, 3, 1, 1]))  # copies of 0 and 5 at the end
    groups = torch.tensor([0, 1, 7, 2, 3, 2, 4, 5, 6, 2, 8])  # 4 and 6 join 2; 1 keeps a group, to be dropped
    merge = torch.nn.functional.one_hot(groups).double()  # column g marks the channels of group g
    both = split.forward(x) @ (merge / merge.sum(0))
    w_both = split.fold_in(w, None)[0] @ merge
    keep = [g for g in range(9) if g != 7]
    wanted = linear(both[:, keep], w_both[:, keep])
    assert_close_f64(linear(MOVED.forward(x), MOVED.fold_in(w, None)[0]), wanted)
    assert MOVED.forward(x).shape == x.shape
    assert MOVED.shares().tolist() == [2, 1, 3, 1, 1, 3, 1, 1]


def test_it_is_exact_where_merged_channels_are_equal_and_dropped_ones_zero():
    x, w, b = normal(5, 8), normal(7, 8, seed=1), normal(7, seed=2)
    assert not torch.allclose(linear(MOVED.forward(x), *MOVED.fold_in(w, b)), linear(x, w, b))
    x[:, [4, 6]], x[:, 1] = x[:, 2:3], 0
    assert_close_f64(linear(MOVED.forward(x), *MOVED.fold_in(w, b)), linear(x, w, b))


def test_a_zero_channel_is_not_exact_to_merge():
    x, w = normal(5, 8), normal(7, 8, seed=1)
    x[:, 1] = 0
    merged = Reassembly(8, numbers(1), numbers(3), numbers(0))
    assert (linear(merged.forward(x), merged.fold_in(w, None)[0]) - linear(x, w)).abs().max() > 0.1


def packed(transform, w: Tensor, act=None) -> QuantLinear:
    solved = lowbit.numerics.quantize(transform.fold_in(w, None)[0], SPEC, lowbit.numerics.MinMax())
    return QuantLinear.from_qtensor(solved, None, act, pre=(transform,))


SPEC = Spec(Int(8), PerChannel())


@pytest.mark.parametrize("transform", [MOVED, Split(torch.tensor([3, 1, 1, 1, 1, 2, 1, 1], dtype=torch.int16))])
def test_a_packed_layer_stores_it_and_reads_the_input_as_it_comes(transform):
    w, x = normal(7, 8, seed=1).float(), normal(5, 8).float()
    layer = packed(transform, w)
    held = 3 * 3 * 16 if isinstance(transform, Reassembly) else 8 * 16
    assert layer.stored_bits == 8 * layer.shape[0] * layer.shape[1] + 7 * (16 + 8) + held
    assert (layer.in_features, layer.out_features) == (8, 7)
    again = QuantLinear.empty(layer.description, "cpu")
    again.load_state_dict(layer.state_dict())
    wanted = linear(transform.forward(x), transform.fold_in(w, None)[0])
    assert sqnr_db(wanted, again(x)) > 35
    torch.testing.assert_close(linear(x, layer.effective_weight()), layer(x), rtol=1e-4, atol=1e-4)


def test_the_integer_kernel_multiplies_what_the_transform_gives():
    w, x = normal(32, 8, seed=1).float(), normal(5, 8).float()
    layer = packed(MOVED, w, activation(8, symmetric=False))
    wanted = layer(x)
    if layer.prepare() is None:
        assert layer.explain(16)[0].why_not is None
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    assert sqnr_db(linear(MOVED.forward(x), MOVED.fold_in(w, None)[0]), wanted) > 30


# Choosing


def test_thresholds_add_the_channels_that_they_say():
    largest = normal(40).abs() * torch.tensor([50.0] + [1.0] * 39)
    found = thresholds(largest, 30)
    assert len(found) == 31 and (found.diff() <= 0).all()
    for copies, threshold in enumerate(found.tolist()):
        counts = disassembly(largest, threshold)
        assert int(counts.sum()) - 40 == copies
        assert (largest / counts).max() <= threshold * (1 + 1e-8)  # T = ceil(M / threshold)
        assert torch.equal(counts, (largest / threshold - 1e-9).ceil().clamp(min=1).long())


def test_equal_channels_are_split_together_or_not_at_all():
    found = thresholds(torch.tensor([4.0, 4.0, 1.0]), 2)
    assert [int(disassembly(torch.tensor([4.0, 4.0, 1.0]), t).sum()) - 3 for t in found.tolist()] == [0, 0, 2]
    assert disassembly(torch.zeros(3), 0.0).tolist() == [1, 1, 1]


def test_the_distance_is_the_error_of_the_mean():
    x, w = normal(30, 6), normal(7, 6, seed=1)
    distance = merge_distances(x.T @ x, w.T @ w)
    for i in range(6):
        for j in range(6):
            merged = (x[:, i] + x[:, j])[:, None] / 2 * (w[:, i] + w[:, j])
            error = x[:, i, None] * w[:, i] + x[:, j, None] * w[:, j] - merged if i != j else torch.zeros(1)
            torch.testing.assert_close(distance[i, j], error.square().sum().double(), rtol=1e-9, atol=1e-9)


def chosen(x: Tensor, w: Tensor, copies: int, merge: bool = True) -> tuple[Tensor, Reassembly | None]:
    largest, gram, weight_gram = x.abs().amax(0), x.T @ x, w.T @ w
    counts = disassembly(largest, thresholds(largest, copies)[-1].item())
    energy = gram.diagonal() * weight_gram.diagonal()
    return counts, assembled(counts, merge_distances(gram, weight_gram), energy, merge)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("size", [40, 41])
@pytest.mark.parametrize("copies", [1, 5, 12])
def test_no_split_channel_is_merged_and_none_is_lost(merge, size, copies):
    x, w = normal(60, size), normal(9, size, seed=1)
    x[:, 3] *= 40
    counts, found = chosen(x, w, copies, merge)
    assert found is not None and int(counts.sum()) == size + copies and found.size == size
    slot, into, copied = found.slot.tolist(), found.into.tolist(), found.copied.tolist()
    assert len(set(slot)) == len(slot) == copies
    split = set((counts > 1).nonzero()[:, 0].tolist())
    assert set(copied) == split and not split & set(slot) and not split & set(into)
    assert merge is all(a != b for a, b in zip(slot, into, strict=True))
    assert not set(slot) & {b for a, b in zip(slot, into, strict=True) if a != b}
    sizes = torch.ones(size).index_add(0, torch.tensor(into), torch.ones(copies))[
        [i for i in range(size) if i not in slot]
    ]
    if merge:  # each input channel is in one cluster, each added copy is a cluster
        assert int(sizes.sum()) + copies == size + copies
    assert found.forward(x).abs().max() <= x.abs().max() / counts.max() * 2


def test_identical_channels_are_merged_first_and_exactly():
    x, w = normal(60, 20), normal(9, 20, seed=1)
    x[:, 3] *= 40
    x[:, 8], x[:, 12] = x[:, 7], x[:, 11]
    _, found = chosen(x, w, 2)
    assert found is not None
    pairs = {frozenset(p) for p in zip(found.slot.tolist(), found.into.tolist(), strict=True)}
    assert pairs == {frozenset({7, 8}), frozenset({11, 12})}
    torch.testing.assert_close(linear(found.forward(x), found.fold_in(w, None)[0]), linear(x, w), rtol=0, atol=1e-5)


@pytest.mark.parametrize("merge", [True, False])
def test_dead_channels_make_room_before_any_other(merge):
    x, w = normal(60, 20), normal(9, 20, seed=1)
    x[:, 3] *= 40
    x[:, 10], w[:, 15] = 0, 0
    _, found = chosen(x, w, 2, merge)
    assert found is not None and set(found.slot.tolist()) == {10, 15} and torch.equal(found.slot, found.into)
    assert_close_f64(linear(found.forward(x), found.fold_in(w, None)[0]), linear(x, w))


def test_pruning_drops_what_adds_least_to_the_output():
    x, w = normal(60, 20), normal(9, 20, seed=1)
    x[:, 3] *= 40
    x[:, 5] /= 10
    w[:, 9] /= 20
    _, found = chosen(x, w, 2, merge=False)
    assert found is not None and set(found.slot.tolist()) == {5, 9}


def test_too_many_copies_have_no_place():
    x, w = normal(60, 8), normal(9, 8, seed=1)
    x[:, 3] *= 40
    counts = torch.tensor([1, 1, 1, 6, 1, 1, 1, 1])
    gram, weight_gram = x.T @ x, w.T @ w
    assert assembled(counts, merge_distances(gram, weight_gram), gram.diagonal(), True) is None


# The step


@pytest.mark.parametrize("case", CASES)
def test_splitting_alone_changes_no_architectures_function(case):
    model, tokens = model_of(case)
    before = logits(model, tokens)
    step = SearchReassembly(0.3, "none", steps=2, skip=())
    for state in states(model, tokens):
        with float64_everywhere():
            split_everything(step, state)
        assert set(held(state, "pre")) == set(state.formats)
    assert_unchanged(before, logits(model, tokens))


def split_everything(step: SearchReassembly, state: BlockState) -> None:
    """Takes the last candidate of every input, whatever its error."""
    stats = state.collect(step.needs)
    for shared in state.resolved.shared_inputs:
        site = site_of(state, shared)
        *_, last = step._candidates(state, site, stats[shared.name])
        for path in site.readers:
            state.transform(path, last)


def test_a_fold_that_forgets_a_reader_changes_the_function():
    model, tokens = model_of("llama grouped")
    before = logits(model, tokens)
    state = states(model, tokens)[0]
    with float64_everywhere():
        split_everything(SearchReassembly(0.3, "none", steps=2), state)
        path = "mlp.gate_proj"
        weight = state.draft(path).weight
        weight.data.mul_(torch.where(torch.arange(weight.shape[1]) == 0, 2.0, 1.0))
    assert (logits(model, tokens) - before).abs().max() > 1e-6 * before.abs().max()


W4A4 = LinearFormat(Spec(Int(4), PerChannel()), activation(4, symmetric=False))


def outlier_states(skip: tuple[str, ...] = ()) -> tuple[nn.Module, Tensor, list[BlockState]]:
    model, tokens = model_of("llama grouped")
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[3] *= 30
            block.post_attention_layernorm.weight[5] *= 30
    found = states(model.float(), tokens, skip)
    for state in found:
        for draft in state.drafts.values():
            draft.format = W4A4
    return model, tokens, found


@pytest.mark.parametrize("assembly", ["merge", "prune", "none"])
def test_what_is_chosen_loses_no_more_than_no_change_and_outliers_are_split(assembly):
    _, _, (state, *_) = outlier_states()
    step = SearchReassembly(0.3, assembly, steps=5, windows=None, skip=())
    original = copy.deepcopy(state)
    step.run(state)
    for name, channel in (("attention_in", 3), ("mlp_in", 5)):
        site = site_of(original, next(s for s in original.resolved.shared_inputs if s.name == name))
        calls = listen(original, site.places)
        (transform,) = state.draft(site.readers[0]).pre
        assert all(state.draft(path).pre == (transform,) for path in site.readers)
        losses = []
        for each in (None, transform):
            with simulated_with(original, site, each):
                losses.append(errors_of(original, calls).sum().item())
        assert losses[1] < (0.6 if assembly == "none" else 0.9) * losses[0]
        counts = (
            transform.counts
            if isinstance(transform, Split)
            else transform.copied.long().bincount(minlength=channel + 1) + 1
        )
        assert counts[channel] > 1
        assert isinstance(transform, Split) is (assembly == "none")


def test_attention_is_judged_before_its_output_projection_and_an_mlp_in_its_hidden_layer():
    _, _, (state, *_) = outlier_states()
    judged = {s.name: site_of(state, s) for s in state.resolved.shared_inputs}
    assert judged["attention_in"].places == (Place("self_attn", "self_attn.o_proj"),)
    assert judged["mlp_in"].places == (Place("mlp", "mlp.down_proj"),)
    assert judged["mlp_hidden"].places == (Place("mlp.down_proj"),)
    call = listen(state, judged["mlp_in"].places)[0]
    mlp, x = state.block.mlp, call.args[0]
    torch.testing.assert_close(call.answer, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def test_inputs_that_are_skipped_and_readers_that_stay_as_they_are_get_nothing():
    _, _, (state, *_) = outlier_states(skip=("v",))
    SearchReassembly(0.3, "none", steps=3).run(state)
    transformed = held(state, "pre")
    assert "self_attn.o_proj" not in transformed and "self_attn.v_proj" not in transformed
    assert "self_attn.q_proj" in transformed and "mlp.up_proj" in transformed


def test_without_a_share_of_channels_nothing_changes():
    _, _, (state, *_) = outlier_states()
    SearchReassembly(0.0).run(state)
    assert not held(state, "pre")


def lone() -> tuple[nn.Linear, Tensor]:
    module = nn.Linear(48, 32)
    with torch.no_grad():
        module.weight.copy_(normal(32, 48).float() / 7)
        module.bias.copy_(normal(32, seed=9))
    x = normal(400, 48, seed=1)
    x[:, 5] *= 60
    return module.requires_grad_(False), x.float()


@pytest.mark.parametrize("assembly", ["merge", "prune", "none"])
def test_a_lone_linear_with_a_planted_outlier_beats_the_same_bits_without(assembly):
    module, x = lone()
    plain = lowbit.quantize_linear(module, x, lowbit.recipe("qllm", channel_ratio=0.0, rank=0))
    q = lowbit.quantize_linear(module, x, lowbit.recipe("qllm", assembly=assembly, rank=0))
    assert sqnr_db(module(x), q(x)) > sqnr_db(module(x), plain(x)) + 1
    assert q.in_features == 48 and (q.shape[1] > 48) is (assembly == "none")


def test_more_bits_lose_less_and_odd_inputs_stay_finite():
    module, x = lone()
    signals = []
    for bits in (4, 6, 8):
        q = lowbit.quantize_linear(module, x, lowbit.recipe("qllm", bits=bits, activation_bits=bits, rank=0))
        signals.append(sqnr_db(module(x), q(x)))
        assert q(torch.zeros(1, 48)).isfinite().all() and q(x[:1]).shape == (1, 32)
        assert torch.equal(q(x[:7]), torch.cat([q(x[:3]), q(x[3:7])]))
    assert signals == sorted(signals)


def test_the_search_refuses_what_it_cannot_do():
    for options in ({"ratio": 0.6}, {"steps": 0}, {"assembly": "add"}, {"windows": 0}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            SearchReassembly(**options)


def test_every_input_is_moved_once_and_statistics_behind_it_are_of_what_is_read():
    _, _, (state, *_) = outlier_states()
    SearchReassembly(0.3, steps=3).run(state)
    stats = state.collect([AbsMax(), Gram()])
    before = outlier_states()[2][0].collect([AbsMax()])
    assert stats["attention_in"][AbsMax()].max() < 0.7 * before["attention_in"][AbsMax()].max()
    Solve().run(state)
    assert all(isinstance(state.block.get_submodule(path), QuantLinear) for path in state.formats)
