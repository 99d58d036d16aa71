"""Training of signs and of the scales around them: what it computes is what is stored, and what it moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.data import Calibration
from lowbit.modules import QuantLinear, restore
from lowbit.numerics import Int, PerChannel, PerTensor, Sign, Spec, sign_value_factors
from lowbit.recipes import Blockwise, Recipe, Train
from lowbit.scheme import activation, linears
from lowbit.solve import Nearest, SignValue
from lowbit.steps import Solve
from lowbit.training import (
    Answer,
    Batch,
    Cosine,
    HiddenStates,
    LatentSigns,
    OriginalKL,
    Start,
    StoredFloats,
    TrainedModel,
    replaced,
)
from lowbit.training.latent_signs import _Scale

from helpers import assert_same, random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}
SIGNS = Spec(Sign(), PerTensor())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("signs") / "model", dtype=torch.bfloat16)


def text() -> Calibration:
    ids = random_ids(8, 32)
    return Calibration(ids[:4], "a text", "0", held_out=ids[4:6], further=random_ids(16, 32, seed=3))


def recipe(what=LatentSigns(), *, normalize: bool = True, act=None, objective=HiddenStates(20.0), **settings) -> Recipe:
    options = {"tokens": 256, "lr": 1e-2, "schedule": Cosine(), **settings}
    blockwise = Blockwise((Solve(SignValue(normalize)),))
    return Recipe("trained", linears(SIGNS, act), (blockwise, Train(what, objective, **options)))


def run(place, out, recipe: Recipe, monkeypatch=None):
    """The report, and the logits of the model in training, at its end, on some windows."""
    seen: dict[str, torch.Tensor] = {}
    if monkeypatch is not None:
        commit = TrainedModel.commit

        def watched(self):
            with self, torch.no_grad(), replaced(self.model, self.replaced()):
                seen["logits"] = self.model(input_ids=random_ids(2, 24, seed=5), use_cache=False).logits
            commit(self)

        monkeypatch.setattr(TrainedModel, "commit", watched)
    return lowbit.quantize(place, recipe, text(), out=out, **QUIET), seen.get("logits")


def tensors(out) -> dict[str, torch.Tensor]:
    return {name: t for shard in out.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.mark.parametrize("act", [None, activation(8)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_model_in_training_computes_what_the_checkpoint_computes_bit_for_bit(
    normalize, act, place, tmp_path, monkeypatch
):
    _, logits = run(place, tmp_path / "out", recipe(normalize=normalize, act=act), monkeypatch)
    model = lowbit.load(tmp_path / "out", torch.float32)
    restore(model)
    with torch.no_grad():
        stored = model(input_ids=random_ids(2, 24, seed=5), use_cache=False).logits
    assert logits is not None
    assert_same(stored, logits)


def test_signs_scales_and_gains_move_and_nothing_else(place, tmp_path):
    run(place, tmp_path / "start", recipe(tokens=0))
    run(place, tmp_path / "after", recipe())
    before, after = tensors(tmp_path / "start"), tensors(tmp_path / "after")
    moved = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert before.keys() == after.keys() and all(t.dtype == after[name].dtype for name, t in before.items())
    still = before.keys() - moved
    assert moved and not any("embed" in name or "lm_head" in name for name in moved), sorted(still)
    for key in ("codes", "pre0_s", "post0_s", "layernorm.weight"):
        assert sum(key in name for name in moved) > sum(key in name for name in before) / 2


def test_without_rates_of_their_own_scales_and_gains_stay(place, tmp_path):
    run(place, tmp_path / "start", recipe(tokens=0))
    run(place, tmp_path / "after", recipe(LatentSigns(scale_rate=0, gains=False)))
    before, after = tensors(tmp_path / "start"), tensors(tmp_path / "after")
    moved = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert moved and all(name.endswith("codes") for name in moved)


@pytest.mark.parametrize("normalize", [True, False])
def test_training_comes_closer_to_the_original(normalize, place, tmp_path):
    start, _ = run(place, tmp_path / "start", recipe(normalize=normalize, tokens=0))
    after, _ = run(place, tmp_path / "after", recipe(normalize=normalize, tokens=4096, lr=3e-3, measures=4))
    assert start.kl is not None and after.kl is not None and after.kl < 0.9 * start.kl


def test_training_starts_at_what_is_stored_whose_latents_are_small_and_of_one_size(place, tmp_path):
    run(place, tmp_path / "start", recipe(tokens=0))
    model = lowbit.load(tmp_path / "start", torch.float32)
    restore(model)
    ids = random_ids(1, 16)
    with torch.no_grad():
        stored = model(input_ids=ids, use_cache=False).logits
        parameters = LatentSigns(0.02).parameters(model, Start())
        with parameters, replaced(model, parameters.replaced()):
            assert_same(model(input_ids=ids, use_cache=False).logits, stored)
    latents = parameters.groups[0].leaves
    assert len(latents) == 14 and all(torch.equal(latent.abs(), torch.full_like(latent, 0.02)) for latent in latents)


def test_a_scale_keeps_its_sign_and_stays_within_its_storage():
    stored = torch.tensor([0.5, -3.0, 2.0**-14, 2.0**15, 1.0]).half()
    scale = _Scale(stored)
    assert_same(scale.value().detach(), stored.float())
    with torch.no_grad():
        scale.delta.copy_(torch.tensor([-5.0, -5.0, 900.0, -5.0, 1.0]))
    value = scale.value()
    assert torch.isfinite(value.half()).all() and torch.equal(value.sign(), stored.float().sign())
    assert_same(value.detach(), value.detach().half().float())
    value.sum().backward()
    # d (1 / m) / d delta = -unit / m^2, for the last: m = 2, unit 1
    assert value[4] == 0.5 and scale.delta.grad is not None and scale.delta.grad[4] == -0.25


def test_stored_floats_of_signs_are_none_and_gradients_pass_them(place, tmp_path):
    made = recipe(StoredFloats(), normalize=False, objective=OriginalKL())
    report, _ = run(place, tmp_path / "out", made)
    assert report.coverage == 1.0


def test_a_student_that_is_its_teacher_has_no_loss():
    torch.manual_seed(0)
    logits, hidden = torch.randn(2, 7, 11), tuple(torch.randn(2, 7, 5) for _ in range(4))
    answers = [Answer(logits[i], tuple(h[i] for h in hidden)) for i in range(2)]
    batch = Batch([0, 1], torch.zeros(2, 7, dtype=torch.int64), logits, lambda i: answers[i], hidden)
    assert HiddenStates(20.0).loss(batch).abs() < 1e-5
    larger = dataclasses.replace(batch, hidden=tuple(3 * h for h in hidden))
    assert HiddenStates(20.0).loss(larger).abs() < 1e-5
    assert HiddenStates(20.0).loss(dataclasses.replace(batch, hidden=tuple(h.flip(1) for h in hidden))) > 1


def test_other_weights_than_signs_are_refused():
    with pytest.raises(ValueError, match="LatentSigns trains signs"):
        blockwise = Blockwise((Solve(Nearest()),))
        Recipe("x", linears(Spec(Int(4), PerChannel())), (blockwise, Train(LatentSigns(), OriginalKL())))


def test_the_published_method_stores_what_the_paper_counts_and_decodes_by_one_compiled_step(place, tmp_path):
    made = lowbit.recipe("onebit", tokens=512, batch=2, accumulate=2, measures=2, lr=3e-3)
    report = lowbit.quantize(place, made, text(), out=tmp_path / "out", **QUIET)
    model = lowbit.load(tmp_path / "out")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.is_tied and m.spec == SIGNS]
    assert len(layers) == 14 and report.coverage == 1.0
    for layer in layers:
        rows, columns = layer.shape
        assert layer.bits_per_weight == pytest.approx(1 + 16 * (rows + columns) / (rows * columns))
    assert model.generate(random_ids(1, 4), max_new_tokens=5, do_sample=False).shape == (1, 9)
    assert "So far: 4 tokens by it." in lowbit.decoding.explain(model)


def test_the_start_alone_is_refused_as_broken_where_it_is_normalized(place, tmp_path):
    with pytest.raises(ValueError, match="broken"):
        lowbit.quantize(place, lowbit.recipe("onebit", tokens=0), text(), out=tmp_path / "out", max_kl=1e-3)
    assert not lowbit.recipe("onebit", tokens=0).needs_calibration


def test_the_start_without_normalization_is_the_best_of_its_form(place, tmp_path):
    lowbit.quantize(place, lowbit.recipe("onebit", tokens=0, normalize=False), None, out=tmp_path / "out", **QUIET)
    found = lowbit.load(tmp_path / "out", torch.float32).model.layers[0].mlp.up_proj.effective_weight()
    w = lowbit.load(place, torch.float32).model.layers[0].mlp.up_proj.weight
    h, g = sign_value_factors(w)
    torch.testing.assert_close(found, torch.where(w >= 0, 1.0, -1.0) * h[:, None] * g, rtol=2e-3, atol=0)
