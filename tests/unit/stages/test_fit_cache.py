"""The stage that calibrates a cache: what it finds, where it is refused, and that a killed one ends in the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

import lowbit
from lowbit.architectures import observed
from lowbit.caches import Operands, SecondMoments
from lowbit.caches.coordinates import hadamard
from lowbit.checkpoints.description import ModelDescription
from lowbit.modules import KVRule, QuantLinear, calibrations, kv_formats
from lowbit.numerics import from_dict, to_dict
from lowbit.plan import explain, plan
from lowbit.recipes import FitCache, Recipe, from_plain, mix, recipe
from lowbit.stages.journal import Journal

from helpers import random_ids, tiny_llama

OPTIONS = {"recent": 16, "sink": 4}
QUIET = {"allow_broken": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("fit") / "model", blocks=3)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """A model whose cache alone is quantized."""
    out = tmp_path_factory.mktemp("fit") / "out"
    report = lowbit.quantize(model, recipe("kv-oscar", **OPTIONS), random_ids(4, 48), out=out, **QUIET)
    return out, report


def assert_same_files(a, b):
    names = [sorted(file.name for file in directory.iterdir()) for directory in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def operands(seed=0, windows=2, heads=6, groups=2, count=40, dim=16, value_dim=8):
    made = torch.Generator().manual_seed(seed)
    sizes = ((heads, dim), (groups, dim), (groups, value_dim))
    return Operands(*(torch.randn(windows, number, count, size, generator=made) for number, size in sizes))


# ---- second moments --------------------------------------------------------------------------------------------------


def test_second_moments_are_those_of_queries_and_of_what_attention_mixes():
    seen, fit, sums = operands(), SecondMoments(), {}
    fit.observe(sums, seen)
    keys, values = (t.repeat_interleave(3, 1).double() for t in (seen.key, seen.value))
    score = seen.query.double() @ keys.mT / 4
    weight = score.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    for g in range(2):
        heads = slice(3 * g, 3 * g + 3)
        query = seen.query[:, heads].double().flatten(0, 2)
        torch.testing.assert_close(sums["key_rotation"][g], query.T @ query, atol=1e-5, rtol=1e-5)
        mixed = (weight @ values)[:, heads].flatten(0, 2)
        torch.testing.assert_close(sums["value_rotation"][g], mixed.T @ mixed, atol=1e-4, rtol=1e-4)
    assert {sum.dtype for sum in sums.values()} == {torch.float64}


def test_windows_add_up():
    whole, pieces, fit = {}, {}, SecondMoments()
    seen = operands()
    fit.observe(whole, seen)
    for w in range(2):
        fit.observe(pieces, Operands(*(t[w : w + 1] for t in (seen.query, seen.key, seen.value))))
    for name, total in whole.items():
        torch.testing.assert_close(pieces[name], total, atol=1e-5, rtol=1e-5)


def test_rotations_are_orthogonal_and_spread_the_moment_evenly():
    """Eigenvectors make it diagonal; the Hadamard matrix gives every channel the same share."""
    fit, sums = SecondMoments(), {}
    fit.observe(sums, operands(count=400))
    for name, rotation in fit.found(sums).items():
        assert rotation.dtype == torch.float32
        dim, turn = rotation.shape[-1], rotation.double()
        torch.testing.assert_close(turn @ turn.mT, torch.eye(dim).double().expand_as(turn), atol=1e-5, rtol=0)
        turned = turn.mT @ sums[name] @ turn
        shares = turned.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(shares, shares.mean(1, keepdim=True).expand_as(shares), rtol=1e-4, atol=1e-4)
        vectors = turn @ hadamard(dim).double().T
        diagonal = vectors.mT @ sums[name] @ vectors
        values = diagonal.diagonal(dim1=1, dim2=2)
        assert (values.diff(dim=1) <= 1e-6 * values[:, :1]).all()
        assert (diagonal - torch.diag_embed(values)).abs().max() < 1e-4 * values.max()


def test_operands_that_are_not_finite_are_told():
    seen = operands()
    seen.query[0, 0, 0, 0] = torch.nan
    sums = {}
    SecondMoments().observe(sums, seen)
    with pytest.raises(ValueError, match="NaN or Inf"):
        SecondMoments().found(sums)


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_a_cache_alone_is_calibrated_on_the_model_as_it_is(model, alone):
    out, report = alone
    loaded, original = lowbit.load(out), lowbit.load(model)
    assert kv_formats(loaded).kv == recipe("kv-oscar", **OPTIONS).scheme.kv
    assert not report.layers
    assert report.kl is not None and 0 < report.kl and "through the cache, chunks of 8" in report.measured_on
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())
    original.set_attn_implementation("lowbit")
    sums = {}

    def observe(query, key, value, scaling):
        SecondMoments().observe(sums, Operands(query, key, value, scaling))

    with torch.no_grad(), observed(original.model.layers[1].self_attn, observe):
        for ids_T in random_ids(4, 48):
            original(ids_T[None], use_cache=False)
    found = {path: calibration for path, _, calibration in calibrations(loaded)}
    assert sorted(found) == [f"model.layers.{i}.self_attn" for i in range(3)]
    for name, rotation in SecondMoments().found(sums).items():
        moment = sums[name]
        for turn in (rotation.double(), found["model.layers.1.self_attn"].get_buffer(name).double()):
            shares = (turn.mT @ moment @ turn).diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(shares, shares.mean(1, keepdim=True).expand_as(shares), rtol=1e-3, atol=1e-3)


def test_what_plan_foresees_is_what_is_written(model, alone):
    foreseen = plan(model, recipe("kv-oscar", **OPTIONS), samples=4, seq_len=48)
    weights = sum(file.stat().st_size for file in alone[0].glob("*.safetensors"))
    assert 0 <= weights - foreseen.bytes_out < 10000  # headers
    assert foreseen.peak_ram_parts["calibrate cache"]["sums"] == 3 * 8 * 2 * 2 * 16**2
    mixed = plan(model, recipe("rtn+kv-oscar", **OPTIONS), samples=4, seq_len=48)
    assert mixed.peak_ram_parts["calibrate cache"]["sums"] == 3 * 8 * 2 * 2 * 16**2
    text = " ".join(explain(recipe("gptq+kv-oscar", **OPTIONS), model).notes)
    assert "SecondMoments" in text and "key rotation, value rotation" in text


def test_it_runs_behind_every_other_stage(model, tmp_path):
    """The packed model's own attention is listened to, so other weights give other rotations."""
    ids = random_ids(4, 48)
    for bits in (2, 8):
        made = recipe("rtn+kv-oscar", bits=bits, kv_bits=2, **OPTIONS)
        lowbit.quantize(model, made, ids, out=tmp_path / f"w{bits}", **QUIET)
    models = [lowbit.load(tmp_path / f"w{bits}") for bits in (2, 8)]
    assert all(isinstance(m.model.layers[0].self_attn.k_proj, QuantLinear) for m in models)
    first, second = ([found.key_rotation for *_, found in calibrations(m)] for m in models)
    assert len(first) == 3 and not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["kv-oscar", "rtn+kv-oscar"])
def test_a_run_killed_anywhere_ends_in_the_same_bytes(model, tmp_path, name, monkeypatch):
    ids, made = random_ids(4, 48), recipe(name, **OPTIONS)
    lowbit.quantize(model, made, ids, out=tmp_path / "whole", **QUIET)

    def at(text):
        def stop(done, total, what):
            if text in what:
                raise KeyboardInterrupt

        return stop

    for text in ("calibrating the cache: window 3 of 4", "comparing with the original"):
        with pytest.raises(KeyboardInterrupt):
            lowbit.quantize(model, made, ids, out=tmp_path / "killed", progress=at(text), **QUIET)
    place = Journal.place

    def placing(self, file, write):
        if file == "model.safetensors":
            raise KeyboardInterrupt
        place(self, file, write)

    monkeypatch.setattr(Journal, "place", placing)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(model, made, ids, out=tmp_path / "killed", **QUIET)
    monkeypatch.undo()
    listened = []
    lowbit.quantize(model, made, ids, out=tmp_path / "killed", progress=lambda *said: listened.append(said[2]), **QUIET)
    assert not any("calibrating the cache" in what for what in listened)  # the journal had it
    assert_same_files(tmp_path / "whole", tmp_path / "killed")


def test_layers_that_stay_as_they_are_carry_nothing(model, tmp_path):
    made = recipe("kv-oscar", **OPTIONS)
    made = replace(made, scheme=replace(made.scheme, kv_overrides=(KVRule((0, -1)),)))
    lowbit.quantize(model, made, random_ids(2, 48), out=tmp_path / "out", **QUIET)
    described = ModelDescription.of(lowbit.load(tmp_path / "out"))
    assert list(described.kv_calibration) == ["model.layers.1.self_attn"]


def test_keys_alone_carry_the_rotation_of_keys_alone(model, tmp_path):
    lowbit.quantize(
        model, recipe("kv-oscar", value_bits=16, **OPTIONS), random_ids(2, 48), out=tmp_path / "out", **QUIET
    )
    specs = {found.spec.buffers for *_, found in calibrations(lowbit.load(tmp_path / "out"))}
    assert specs == {("key_rotation",)}


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_a_mix_and_kv_carry_the_stage_along_and_it_comes_last():
    oscar = recipe("kv-oscar")
    for made in (
        recipe("gptq+kv-oscar"),
        recipe("smoothquant+kv-oscar"),
        recipe("kv-oscar+gptq"),
        recipe("gptq").with_cache(oscar),
        recipe("gptq+kivi").with_cache(oscar),
    ):
        assert made.cache_stages == oscar.stages and made.stages[-1] == oscar.stages[0] and len(made.stages) == 2
        assert made.scheme.kv == oscar.scheme.kv
        assert from_dict(to_dict(made), Recipe) == made
    for two in (["gptq", "kivi", "kv-oscar"], ["kv-oscar", "kivi"]):
        with pytest.raises(ValueError, match="both say how the KV cache is held, and differ"):
            mix("two", map(recipe, two))
    assert recipe("gptq+kv-oscar").with_cache(None).stages == recipe("gptq").stages
    assert recipe("gptq+kv-oscar").with_cache(recipe("kivi")).cache_stages == ()
    assert recipe("kv-oscar", bits=16).stages == ()


def test_a_recipe_file_may_name_it(tmp_path):
    data = {"method": "gptq+kv-oscar", "options": {"bits": 4, "kv_bits": 2}}
    assert from_plain(data).cache_stages == recipe("kv-oscar").stages
    spelled = to_dict(recipe("kv-oscar"))
    assert from_plain(spelled) == recipe("kv-oscar")
    other = to_dict(recipe("kivi").scheme.kv)
    assert from_plain({**data, "kv": other}).cache_stages == ()


def test_stages_that_do_not_fit_the_cache_are_refused():
    fit = recipe("kv-oscar").stages
    with pytest.raises(
        ValueError, match="finds key_rotation, value_rotation, and the format of the cache has none of them"
    ):
        replace(recipe("kivi"), stages=fit)
    with pytest.raises(ValueError, match="FitCache both find"):
        replace(recipe("kv-oscar"), stages=(*fit, *fit))
    with pytest.raises(ValueError, match="Blockwise"):
        replace(recipe("gptq+kv-oscar"), stages=(*fit, *recipe("gptq").stages))
    with pytest.raises(ValueError, match="no stage of the recipe finds it"):
        replace(recipe("gptq+kv-oscar"), stages=recipe("gptq").stages)


# ---- refusals before any work ----------------------------------------------------------------------------------------


def test_calibration_text_is_asked_for_before_the_work(model, tmp_path):
    for name in ("kv-oscar", "rtn+kv-oscar"):
        with pytest.raises(ValueError, match="needs calibration text"):
            lowbit.quantize(model, name, None, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_whose_attention_cannot_be_listened_to_is_refused_before_the_work(tmp_path):
    config = BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ValueError, match="cannot be observed; choose a method for caches that needs no data"):
        lowbit.quantize(tmp_path / "bloom", "kv-oscar", random_ids(2, 16), out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_model_without_calibration_is_refused_with_what_to_do(model, alone):
    with pytest.raises(ValueError, match=r"only calibration finds.*lowbit quantize MODEL --kv NAME --calibration TEXT"):
        lowbit.load(model, kv="kv-oscar:2")
    lowbit.load(alone[0], kv="kv-oscar:3")  # the same rotations at other bits


def test_second_moments_survive_their_plain_form():
    stage = FitCache(SecondMoments())
    assert from_dict(to_dict(stage)) == stage
