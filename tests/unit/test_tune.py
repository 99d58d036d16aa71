"""Tuning the whole packed model: what it moves, what it must not move, and that a killed run ends in the same bytes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.recipes import from_plain, rebuilt
from lowbit.steps import Tune

from helpers import random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}


def _tensors(directory):
    return {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tune") / "model")


def _recipe(**options):
    tune = Tune(**{"epochs": 6, "lr": 5e-3, **options})
    return rebuilt(lowbit.recipe("gptq", bits=3, group_size=32), model_steps=(tune,))


def test_tuning_moves_scales_and_gains_but_neither_codes_nor_bits_and_comes_closer_to_the_original(model, tmp_path):
    ids = random_ids(6, 32)
    before = lowbit.quantize(model, "gptq", ids, out=tmp_path / "plain", **QUIET)
    plain = lowbit.quantize(model, lowbit.recipe("gptq", bits=3, group_size=32), ids, out=tmp_path / "gptq", **QUIET)
    tuned = lowbit.quantize(model, _recipe(), ids, out=tmp_path / "tuned", **QUIET)
    assert before.kl is not None and plain.kl is not None and tuned.kl is not None
    assert tuned.kl < 0.8 * plain.kl
    assert tuned.bits_per_weight == plain.bits_per_weight and tuned.bytes == plain.bytes
    old, new = _tensors(tmp_path / "gptq"), _tensors(tmp_path / "tuned")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any(name.endswith(".scale") for name in changed) and any("layernorm" in name for name in changed)
    assert not any(name.endswith((".codes", ".zero")) or "embed" in name for name in changed)
    assert not list((tmp_path / "tuned").glob("walked-*"))


def test_the_tuned_checkpoint_computes_what_the_report_says(model, tmp_path):
    ids = random_ids(4, 32)
    report = lowbit.quantize(model, _recipe(epochs=2), ids, out=tmp_path / "tuned", **QUIET)
    packed, original = lowbit.load(tmp_path / "tuned"), lowbit.load(model)
    with torch.no_grad():
        a, b = (m(input_ids=ids).logits.log_softmax(-1) for m in (packed, original))
    assert report.kl == pytest.approx((b.exp() * (b - a)).sum(-1).mean().item(), rel=1e-3)


def test_a_tuned_model_is_measured_by_the_kernels_that_check_its_reload(model, tmp_path, monkeypatch):
    """Roundings of 4-bit activations fall otherwise by other kernels, and layers make much of it."""
    monkeypatch.setattr("lowbit.pipeline.RELOAD_TOLERANCE", 1e-13)
    tuned = rebuilt(lowbit.recipe("quip+gptq", bits=4, activation_bits=4), model_steps=(Tune(epochs=1),))
    lowbit.quantize(model, tuned, random_ids(4, 32), out=tmp_path / "out", **QUIET)


def test_a_run_stopped_while_its_tuned_shards_are_written_ends_in_the_same_bytes(model, tmp_path, monkeypatch):
    from lowbit.stages.journal import Journal

    ids, recipe = random_ids(4, 32), _recipe(epochs=1)
    lowbit.quantize(model, recipe, ids, out=tmp_path / "whole", **QUIET)
    write = Journal.write

    def stopping(self, file, *rest):
        if file == "model-00002-of-00003.safetensors":
            raise KeyboardInterrupt
        write(self, file, *rest)

    monkeypatch.setattr(Journal, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(model, recipe, ids, out=tmp_path / "stopped", **QUIET)
    monkeypatch.undo()
    lowbit.quantize(model, recipe, ids, out=tmp_path / "stopped", **QUIET)
    for file in sorted((tmp_path / "whole").glob("*")):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes(), file.name


def test_a_recipe_with_steps_of_model_scope_survives_its_plain_form_and_a_mix():
    recipe = _recipe()
    assert from_plain(recipe.to_dict()) == recipe
    assert recipe.needs_calibration
    with pytest.raises(ValueError, match="not a step of model scope"):
        rebuilt(recipe, model_steps=(recipe.steps[0],))


def test_tuning_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="epochs"):
        Tune(epochs=0)


def test_a_file_that_names_a_method_takes_model_steps_too():
    data = {"method": "gptq", "options": {"bits": 3}, "model_steps": [{"type": "Tune", "epochs": 2}]}
    assert from_plain(data) == rebuilt(lowbit.recipe("gptq", bits=3), model_steps=(Tune(epochs=2),))
    with pytest.raises(ValueError, match="not a step of model scope"):
        from_plain(data | {"model_steps": [{"type": "Solve", "solver": {"type": "Nearest"}}]})


def test_the_product_that_decodes_anew_has_the_gradients_of_one_that_does_not():
    from lowbit.steps.tune import _Product

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (12, 20), generator=generator).double()
    h, scale, zero, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 20), (12, 1), (12, 1), (2, 5, 12))
    )

    def dense(scale, zero):
        return scale * (codes - zero)

    wanted = torch.autograd.grad(h @ dense(scale, zero).T, (h, scale, zero), g)
    found = torch.autograd.grad(_Product.apply(h, dense, scale, zero), (h, scale, zero), g)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
