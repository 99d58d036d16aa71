"""Low-rank corrections: learned over the block, kept next to the codes or folded into the weights."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from lowbit.checkpoints.native import bits_report
from lowbit.modules import LinearFormat, QuantLinear
from lowbit.numerics import Int, LowRank, MinMax, PerChannel, Spec, quantize
from lowbit.plan import plan
from lowbit.scheme import activation
from lowbit.steps import (
    BlockState,
    ClipShares,
    Learn,
    LowRankCorrection,
    NormsAndBiases,
    SearchReassembly,
    Solve,
)
from unit.steps.test_reassembly import normal, outlier_states

from helpers import assert_same, random_ids, sqnr_db, tiny_llama


@pytest.fixture
def state():
    return lambda: outlier_states()[2][0]


def learned(state: BlockState, *makers, epochs: int = 8, solve: bool = True) -> BlockState:
    Learn(makers, epochs=epochs, batch=3, decay=True).run(state)
    if solve:
        Solve().run(state)
    return state


@torch.no_grad()
def output(state: BlockState) -> Tensor:
    return state.io.call(state.block, state.io.x)


def mse(state: BlockState) -> float:
    return (output(state) - state.io.y).square().mean().item()


def test_both_forms_of_a_term_agree_and_its_factors_are_half_precision():
    term = LowRank.of(normal(3, 10), normal(7, 3, seed=1))
    x = normal(4, 5, 10).float()
    torch.testing.assert_close(term.apply(x, 7), x @ term.dense((7, 10)).T)
    assert term.a.dtype == term.b.dtype == torch.float16
    with pytest.raises(ValueError, match="does not fit float16"):
        LowRank.of(1e6 * normal(3, 10), normal(7, 3))
    with pytest.raises(ValueError, match=r"\[R, I\] and \[O, R\]"):
        LowRank.of(normal(3, 10), normal(7, 4))


def test_a_correction_begins_as_none_at_all(state):
    assert_same(
        output(learned(state(), LowRankCorrection(4), epochs=0)),
        output(learned(state(), LowRankCorrection(2, fold=True), epochs=0)),
    )
    plain = state()
    Solve().run(plain)
    assert_same(output(learned(state(), LowRankCorrection(4), epochs=0)), output(plain))


@pytest.mark.parametrize("fold", [True, False])
def test_learning_lowers_the_error_of_the_packed_block(state, fold):
    plain = state()
    Solve().run(plain)
    found = learned(state(), LowRankCorrection(4, 5e-2, fold), epochs=25)
    assert mse(found) < 0.95 * mse(plain)
    assert all(bool(found.block.get_submodule(path).side_terms) is not fold for path in found.formats)


def test_a_folded_correction_is_the_plain_rounding_of_another_weight(state):
    before, moved = state(), learned(state(), LowRankCorrection(4, 5e-2, fold=True), epochs=25, solve=False)
    weights = {path: moved.draft(path).weight.clone() for path in moved.formats}
    Solve().run(moved)
    changed = 0
    for path, form in moved.formats.items():
        delta = (weights[path] - before.draft(path).weight).double()
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4 and delta.abs().max() > 0
        q = quantize(weights[path], form.weight, MinMax())
        assert_same(moved.block.get_submodule(path).dequantize(), q.dequantize())
        changed += (q.codes != quantize(before.draft(path).weight, form.weight, MinMax()).codes).sum().item()
    assert changed > 0 and any("added to the weights" in note for note in moved.notes)


def test_a_kept_correction_leaves_the_codes_and_reads_the_input_before_it_is_quantized(state):
    plain, found = state(), learned(state(), LowRankCorrection(4, 5e-3))
    Solve().run(plain)
    for path in found.formats:
        layer, without = found.block.get_submodule(path), plain.block.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        assert_same(layer.qtensor().codes, without.qtensor().codes)
        (term,) = layer.side_terms
        x = normal(5, layer.in_features, seed=3).float()
        torch.testing.assert_close(layer(x), without(x) + term.apply(x, layer.out_features), rtol=1e-4, atol=1e-4)
        assert layer.stored_bits == without.stored_bits + 16 * 4 * (layer.in_features + layer.out_features)
    assert any("next to the codes" in note for note in found.notes)


def test_learning_sees_the_block_as_it_will_run(state):
    found = state()
    exact = LinearFormat(Spec(Int(4), PerChannel(), scale_dtype="float32"), activation(4, symmetric=False))
    for draft in found.drafts.values():
        draft.format = exact
    SearchReassembly(0.3, "none", steps=3).run(found)
    for path in found.formats:
        rows, columns = found.draft(path).weight.shape
        found.draft(path).side_terms = (LowRank.of(normal(2, columns) / 9, normal(rows, 2, seed=1) / 9),)
    with torch.no_grad(), ExitStack() as stack:
        for draft in found.drafts.values():
            stack.enter_context(draft.simulated())
        simulated = output(found)
    uncorrected = output(found)
    Solve().run(found)
    assert sqnr_db(output(found), simulated) > 50 > 20 > sqnr_db(output(found), uncorrected)


def test_norms_and_biases_move_and_are_rounded_as_they_are_stored(state):
    found = state()
    found.context = dataclasses.replace(found.context, store_dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in found.block.named_parameters()}
    learned(found, NormsAndBiases(5e-3), solve=False)
    for name, p in found.block.named_parameters():
        assert torch.equal(p, before[name]) is (p.dim() > 1)
        if p.dim() == 1:
            assert_same(p.detach(), p.detach().bfloat16().float())


def test_a_fold_comes_before_the_rounding_whatever_the_order_of_the_makers(state):
    orders = [(ClipShares(), LowRankCorrection(2, 5e-3, True)), (LowRankCorrection(2, 5e-3, True), ClipShares())]
    first, second = (learned(state(), *makers, epochs=2) for makers in orders)
    assert_same(output(first), output(second))


def test_what_would_change_the_inputs_of_a_correction_is_refused_before_any_work():
    for name, options, reason in (
        ("qllm+smoothquant", {}, "Set transforms channels that SearchReassembly has split"),
        ("qllm+quip", {"bits": 4}, "Incoherence transforms the inputs that the low-rank corrections"),
        ("qllm+squeezellm", {"rank": 0}, "Fisher information"),
        ("autoround+qllm", {}, "SearchReassembly changes weights after"),
    ):
        with pytest.raises(ValueError, match=reason):
            lowbit.recipe(name, **options)
    for name in ("smoothquant+qllm", "awq+qllm", "qllm+gptq", "omniquant+qllm", "qllm+autoround"):
        assert any(isinstance(step, SearchReassembly) for step in lowbit.recipe(name).steps)
    assert lowbit.recipe("qllm+quip", bits=4, rank=0)
    with pytest.raises(ValueError, match="rank of 1 or more"):
        LowRankCorrection(0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("options", [{}, {"fold": True}, {"assembly": "none"}], ids=["kept", "folded", "growing"])
def test_a_model_is_quantized_saved_and_read_back(llama, tmp_path, options):
    ids, recipe = (
        random_ids(4, 24),
        lowbit.recipe("qllm", bits=6, activation_bits=6, epochs=2, threshold_steps=4, **options),
    )
    report = lowbit.quantize(llama, recipe, ids, out=tmp_path / "q", max_kl=5)
    assert report.coverage == 1.0 and all(layer.error is not None and layer.error < 0.05 for layer in report.layers)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["version"] == (1 if "fold" in options else 2)
    stored = bits_report(tmp_path / "q")["bits_per_weight"]
    assert report.bits_per_weight == pytest.approx(stored, abs=1e-9)
    foretold = plan(llama, recipe)
    assert stored <= foretold.bits_per_weight < stored + 0.9
    assert any("how many channels" in warning for warning in foretold.warnings)
    tensors = {k: v for f in (tmp_path / "q").glob("*.safetensors") for k, v in load_file(f).items()}
    moved = {v.dtype for k, v in tensors.items() if ".pre0_" in k}
    assert moved == {torch.int16}
    read, original = lowbit.load(tmp_path / "q"), lowbit.load(llama)
    with torch.no_grad():
        assert sqnr_db(original(input_ids=ids).logits, read(input_ids=ids).logits) > 12
    assert read.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 27)
