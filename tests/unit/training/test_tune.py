"""Training of the whole packed model: what changes, what must not change, and that a killed run continues to the same
bytes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.numerics import NF4, Block, Int, Minimum, PerGroup, Spec, Unsigned, to_dict
from lowbit.recipes import Blockwise, Recipe, Train, from_plain, mix
from lowbit.scheme import linears
from lowbit.solve import Nearest
from lowbit.steps import Solve
from lowbit.training import AdamW, OneCycle, OriginalKL, StoredFloats

from helpers import random_ids, tiny_llama

QUIET = {"max_kl": 50.0, "allow_broken": True}


def _tensors(directory):
    return {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tune") / "model")


def tuned(recipe: Recipe, **settings) -> Recipe:
    """The recipe with a stage that trains the packed model's stored floats."""
    return replace(recipe, stages=(*recipe.stages, Train(StoredFloats(), OriginalKL(), **settings)))


def _recipe(**settings):
    return tuned(lowbit.recipe("gptq", bits=3, group_size=32), **{"epochs": 6, "lr": 5e-3, **settings})


def test_tuning_moves_scales_and_gains_but_neither_codes_nor_bits_and_comes_closer_to_the_original(model, tmp_path):
    ids = random_ids(6, 32)
    before = lowbit.quantize(model, "gptq", ids, out=tmp_path / "plain", **QUIET)
    plain = lowbit.quantize(model, lowbit.recipe("gptq", bits=3, group_size=32), ids, out=tmp_path / "gptq", **QUIET)
    after = lowbit.quantize(model, _recipe(), ids, out=tmp_path / "tuned", **QUIET)
    assert before.kl is not None and plain.kl is not None and after.kl is not None
    assert after.kl < 0.8 * plain.kl
    assert after.bits_per_weight == plain.bits_per_weight and after.bytes == plain.bytes
    old, new = _tensors(tmp_path / "gptq"), _tensors(tmp_path / "tuned")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any(name.endswith(".scale") for name in changed) and any("layernorm" in name for name in changed)
    assert not any(name.endswith((".codes", ".zero")) or "embed" in name for name in changed)
    assert not list((tmp_path / "tuned").glob("stage-*"))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(Spec(Minimum(3), PerGroup(16), stats=Spec(Unsigned(6), Block(2, 1))), id="K type"),
        pytest.param(
            Spec(NF4, PerGroup(16), stats=Spec(Int(8), PerGroup(64), scale_dtype="float32"), stats_centred=True),
            id="NF4 twice",
        ),
    ],
)
def test_where_scales_are_codes_their_own_scales_are_tuned_and_no_code_moves(spec, model, tmp_path):
    ids = random_ids(6, 32)
    start = Recipe("nearest", scheme=linears(spec), stages=(Blockwise((Solve(Nearest()),)),))
    plain = lowbit.quantize(model, start, ids, out=tmp_path / "plain", **QUIET)
    after = lowbit.quantize(model, tuned(start, epochs=6, lr=5e-3), ids, out=tmp_path / "tuned", **QUIET)
    assert plain.kl is not None and after.kl is not None and after.kl < 0.9 * plain.kl
    old, new = _tensors(tmp_path / "plain"), _tensors(tmp_path / "tuned")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any(name.endswith("scale_scale") for name in changed)
    assert not any(name.endswith("codes") for name in changed)


def test_the_tuned_checkpoint_computes_what_the_report_says(model, tmp_path):
    ids = random_ids(4, 32)
    report = lowbit.quantize(model, _recipe(epochs=2), ids, out=tmp_path / "tuned", **QUIET)
    packed, original = lowbit.load(tmp_path / "tuned"), lowbit.load(model)
    with torch.no_grad():
        a, b = (m(input_ids=ids).logits.log_softmax(-1) for m in (packed, original))
    assert report.kl == pytest.approx((b.exp() * (b - a)).sum(-1).mean().item(), rel=1e-3)


def test_a_tuned_model_is_measured_by_the_kernels_that_check_its_reload(model, tmp_path, monkeypatch):
    """Other kernels round 4-bit activations differently, and layers amplify the difference."""
    monkeypatch.setattr("lowbit.pipeline.RELOAD_TOLERANCE", 1e-13)
    recipe = tuned(lowbit.recipe("quip+gptq", bits=4, activation_bits=4), epochs=1)
    lowbit.quantize(model, recipe, random_ids(4, 32), out=tmp_path / "out", **QUIET)


def test_a_run_stopped_while_its_tuned_shards_are_written_ends_in_the_same_bytes(model, tmp_path, monkeypatch):
    from lowbit.stages.journal import Journal

    ids, recipe = random_ids(4, 32), _recipe(epochs=1)
    lowbit.quantize(model, recipe, ids, out=tmp_path / "whole", **QUIET)
    write = Journal.write

    def stopping(self, file, *rest):
        if file == "stage-2-00002-of-00003.safetensors":
            raise KeyboardInterrupt
        write(self, file, *rest)

    monkeypatch.setattr(Journal, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(model, recipe, ids, out=tmp_path / "stopped", **QUIET)
    monkeypatch.undo()
    lowbit.quantize(model, recipe, ids, out=tmp_path / "stopped", **QUIET)
    for file in sorted(set((tmp_path / "whole").glob("*")) - set((tmp_path / "whole").glob("training-*"))):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes(), file.name


def test_each_stage_has_its_own_part_of_the_journal(model, tmp_path, monkeypatch):
    from lowbit.stages.journal import Journal

    monkeypatch.setattr(Journal, "finish", lambda journal: journals.append(journal))
    journals: list[Journal] = []
    recipe = tuned(_recipe(epochs=1), epochs=1, lr=1e-3)
    lowbit.quantize(model, recipe, random_ids(2, 16), out=tmp_path / "out", **QUIET)
    sections = [journals[0].section(stage) for stage in range(3)]
    assert [len(section.finished) for section in sections] == [3, 3, 3]
    for section in sections[:2]:
        assert section.files == [section.unit_name(i, 3) for i in range(3)]
    assert sections[2].files == ["model.safetensors"]
    monkeypatch.undo()
    lowbit.quantize(model, recipe, random_ids(2, 16), out=tmp_path / "out", **QUIET)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_second_training_starts_from_what_the_first_left(model, tmp_path):
    ids, once = random_ids(4, 32), _recipe(epochs=1)
    first = lowbit.quantize(model, once, ids, out=tmp_path / "once", **QUIET)
    second = lowbit.quantize(model, tuned(once, epochs=3), ids, out=tmp_path / "twice", **QUIET)
    assert first.kl is not None and second.kl is not None and second.kl < first.kl


def test_a_recipe_that_trains_survives_its_plain_form_and_a_mix():
    recipe = _recipe(optimizer=AdamW(betas=(0.9, 0.999)), schedule=OneCycle(warmup=0.3))
    assert from_plain(to_dict(recipe)) == recipe
    assert recipe.needs_calibration
    assert mix("both", [recipe, lowbit.recipe("smoothquant")]).stages[1:] == recipe.stages[1:]


def test_stages_that_cannot_be_are_refused():
    recipe = _recipe()
    blockwise, train = recipe.stages
    with pytest.raises(ValueError, match="is not a stage such as Blockwise"):
        replace(recipe, stages=(blockwise, blockwise.steps[0]))
    with pytest.raises(ValueError, match="put it after Blockwise"):
        replace(recipe, stages=(train, blockwise))
    with pytest.raises(
        ValueError, match="Blockwise quantizes the original model and comes first; found it after Blockwise"
    ):
        replace(recipe, stages=(blockwise, blockwise))
    with pytest.raises(ValueError, match=r"Train\.what: expected Trainable, found Solve"):
        replace(recipe, stages=(blockwise, Train(Solve(), OriginalKL())))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Train(StoredFloats(), OriginalKL(), epochs=0), "epochs"),
        (lambda: Train(StoredFloats(), OriginalKL(), lr=0.0), "positive lr"),
        (lambda: Train(StoredFloats(), OriginalKL(), lr=float("nan")), "lr: expected a number, found nan"),
        (lambda: Train(StoredFloats(), OriginalKL(), lr=float("inf")), "positive lr"),
        (
            lambda: Train(StoredFloats(), OriginalKL(), clip_norm=float("nan")),
            "clip_norm: expected a number, found nan",
        ),
        (lambda: AdamW(betas=(0.9, 1.0)), "betas from 0 to below 1"),
        (lambda: OneCycle(warmup=1.5), "warmup is a share"),
    ],
)
def test_training_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TRAIN = {"type": "Train", "what": {"type": "StoredFloats"}, "objective": {"type": "OriginalKL"}, "epochs": 2}


def test_a_file_that_names_a_method_takes_further_stages():
    data = {"method": "gptq", "options": {"bits": 3}, "then": [TRAIN]}
    assert from_plain(data) == tuned(lowbit.recipe("gptq", bits=3), epochs=2)
    with pytest.raises(ValueError, match="is not a stage such as Blockwise"):
        from_plain(data | {"then": [{"type": "Solve", "solver": {"type": "Nearest"}}]})
    with pytest.raises(ValueError, match=r"Train has no option 'epoch' \(did you mean 'epochs'\?\)"):
        from_plain(data | {"then": [TRAIN | {"epoch": 3}]})
    with pytest.raises(ValueError, match=r"Train.objective: Field required"):
        from_plain(data | {"then": [{"type": "Train", "what": {"type": "StoredFloats"}}]})


def test_the_product_that_decodes_anew_has_the_gradients_of_one_that_does_not():
    from lowbit.training import DecodedProduct

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (12, 20), generator=generator).double()
    h, scale, zero, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 20), (12, 1), (12, 1), (2, 5, 12))
    )

    def dense(scale, zero):
        return scale * (codes - zero)

    wanted = torch.autograd.grad(h @ dense(scale, zero).T, (h, scale, zero), g)
    found = torch.autograd.grad(DecodedProduct.apply(h, dense, scale, zero), (h, scale, zero), g)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
