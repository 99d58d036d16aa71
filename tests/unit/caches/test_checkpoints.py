"""Checkpoints that carry formats of a cache: written, read back, and used by generate."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import lowbit
from lowbit.caches import PackedCache, PackedLayer
from lowbit.checkpoints import native
from lowbit.checkpoints.description import ModelDescription
from lowbit.decoding import cache_argument
from lowbit.modules import KVFormats, KVRule, kv_formats, set_kv_formats
from lowbit.recipes import kv_scheme

from helpers import random_ids, tiny_llama
from models import qwen2_with_large_key_biases, tokens

OPTIONS = {"group_size": 32, "recent": 32}
KIVI = kv_scheme("kivi:2", **OPTIONS)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("cache") / "model", blocks=4)


@pytest.fixture(scope="module")
def checkpoint(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "out"
    lowbit.quantize(original, lowbit.recipe("kivi", **OPTIONS), random_ids(2, 96), out=out, allow_broken=True)
    return out


def made_caches(model, monkeypatch, ids, **options):
    """The tokens that ``generate`` gives, and the caches that reach the model's forward."""
    seen, name, ordinary = [], cache_argument(model), type(model).forward

    @functools.wraps(ordinary)
    def forward(self, *args, **kwargs):
        seen.append(kwargs.get(name))
        return ordinary(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    monkeypatch.undo()
    return out, seen


def test_a_description_keeps_formats_and_rules_and_says_the_oldest_version_that_has_them():
    rules = (KVRule((0, -1)), KVRule((2,), KIVI.kv))
    for kv, overrides, version in ((KIVI.kv, (), 4), (KIVI.kv, rules, 6), (None, rules, 6)):
        description = ModelDescription({}, kv=kv, kv_overrides=overrides)
        data = json.loads(json.dumps(description.to_json()))
        assert data["version"] == version and ModelDescription.from_json(data) == description
    with pytest.raises(ValueError, match="no layer is quantized"):
        ModelDescription({}, kv_overrides=(KVRule((0,)),)).to_json()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv", 4),
        ("kv_overrides", 4),
        ("kv_overrides", [4]),
        ("kv_overrides", [{"layers": "all"}]),
        ("kv_overrides", [{}]),
    ],
)
def test_damaged_formats_are_refused(key, value):
    data = ModelDescription({}, kv=KIVI.kv).to_json() | {key: value}
    with pytest.raises(ValueError, match=r"formats? of|layers"):
        ModelDescription.from_json(data)


def test_a_recipe_with_only_a_cache_writes_the_model_as_it_is(original, checkpoint):
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (original, checkpoint))
    assert kv_formats(after) == KIVI.cache and not kv_formats(before)
    a, b = before.state_dict(), after.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert native.bits_report(checkpoint)["bits_per_weight"] is None
    report = json.loads((checkpoint / "lowbit-report.json").read_text())
    assert report["layers"] == [] and report["cache_bits"] == KIVI.kv.bits(16)
    assert "through the cache, chunks of 16" in report["measured_on"] and report["kl"] > 0
    assert f"{KIVI.kv.bits(16):.4g}" in (checkpoint / "README.md").read_text()


def test_generate_packs_unless_the_call_brings_or_names_a_cache(checkpoint, monkeypatch):
    model, ids = lowbit.load(checkpoint), random_ids(1, 70)
    packed, seen = made_caches(model, monkeypatch, ids)
    assert seen and all(type(cache) is PackedCache for cache in seen)
    given = lowbit.kv_cache(model, "kivi:2", **OPTIONS)
    assert torch.equal(
        packed, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **{cache_argument(model): given})
    )
    assert any(layer.key_side.packed_length for layer in seen[-1].layers)
    assert lowbit.kv_cache(model).layers[0].spec == given.layers[0].spec  # as the checkpoint says
    for options in (
        {"cache_implementation": "dynamic"},
        {cache_argument(model): DynamicCache(config=model.config)},
    ):
        plain, seen = made_caches(model, monkeypatch, ids, **options)
        assert type(seen[-1]) is DynamicCache
    _, seen = made_caches(model, monkeypatch, ids, use_cache=False)
    assert set(seen) == {None}
    set_kv_formats(model, KVFormats())
    off, seen = made_caches(model, monkeypatch, ids)
    assert type(seen[-1]) is DynamicCache and torch.equal(off, plain)


def test_copies_and_pickles_keep_the_formats(checkpoint, monkeypatch):
    model = lowbit.load(checkpoint)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kv_formats(other) == KIVI.cache
        assert type(made_caches(other, monkeypatch, random_ids(1, 8))[1][-1]) is PackedCache


def test_left_padding_is_told_to_the_cache(checkpoint, monkeypatch):
    model, ids = lowbit.load(checkpoint), random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    _, seen = made_caches(model, monkeypatch, ids, attention_mask=mask)
    assert [layer.padding for layer in seen[-1].layers] == [9] * 4
    given = lowbit.kv_cache(model, "kivi:2", **OPTIONS)
    model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0, **{cache_argument(model): given})
    assert given.layers[0].padding == 9


def test_beams_and_samples_work_with_the_packed_cache(checkpoint):
    model, ids = lowbit.load(checkpoint), random_ids(2, 40)
    beams = model.generate(ids, max_new_tokens=8, num_beams=3, num_return_sequences=2, pad_token_id=0)
    assert beams.shape == (4, 48)
    assert model.generate(ids, max_new_tokens=8, do_sample=True, pad_token_id=0).shape == (2, 48)


def test_an_assistant_proposes_tokens_that_the_packed_cache_takes_back(original, checkpoint, monkeypatch):
    model, ids = lowbit.load(checkpoint), random_ids(1, 70)
    alone, _ = made_caches(model, monkeypatch, ids)
    assisted, seen = made_caches(model, monkeypatch, ids, assistant_model=lowbit.load(original))
    assert type(seen[-1]) is PackedCache and assisted.shape == alone.shape
    assert torch.equal(
        assisted[:, :71], alone[:, :71]
    )  # later calls hold other numbers of their own tokens as they are


def test_a_model_in_memory_is_saved_with_its_formats(checkpoint, tmp_path):
    model = lowbit.load(checkpoint)
    native.save(model, tmp_path / "again")
    again = lowbit.load(tmp_path / "again")
    assert kv_formats(again) == KIVI.cache and ModelDescription.of(again) == ModelDescription.of(model)


def test_a_checkpoint_of_layers_that_the_model_does_not_have_is_refused(checkpoint, tmp_path):
    model = lowbit.load(checkpoint)
    set_kv_formats(model, KVFormats(KIVI.kv, (KVRule((9,)),)))
    native.save(model, tmp_path / "out")
    with pytest.raises(ValueError, match="name layers 9, and the model has 4"):
        lowbit.load(tmp_path / "out")


def test_a_model_with_large_key_biases_is_trained_with_its_cache_and_not_with_a_calibrated_one(tmp_path):
    qwen2_with_large_key_biases().save_pretrained(tmp_path / "model")
    recipe = lowbit.recipe("llm-qat", bits=4, kv_bits=4, tokens=64, batch=1, accumulate=1)
    report = lowbit.quantize(tmp_path / "model", recipe, tokens(4, 32), out=tmp_path / "q", max_kl=50)
    assert report.coverage == 1.0 and report.cache_bits
    with pytest.raises(ValueError, match="cannot simulate a cache that needs a calibration"):
        lowbit.recipe("wkvquant+llm-qat")


def test_the_checkpoint_of_a_model_with_large_key_biases_says_how_its_keys_are_packed(tmp_path):
    qwen2_with_large_key_biases().save_pretrained(tmp_path / "model")
    for name in ("kv-rotated", "rtn+kv-rotated"):
        report = lowbit.quantize(tmp_path / "model", name, tokens(2, 128), out=tmp_path / name, allow_broken=True)
        formats = kv_formats(lowbit.load(tmp_path / name))
        assert [rule.layers for rule in formats.overrides] == [(0,), (1,), (2,), (3,)]
        assert all(rule.kv.before_rope and rule.kv.centred for rule in formats.overrides)
        made = lowbit.load(tmp_path / name)
        layers = lowbit.decoding.packed_cache.packed_cache(made, formats.kv, formats.overrides).layers
        assert all(
            isinstance(layer, PackedLayer) and layer.spec == rule.kv for layer, rule in zip(layers, formats.overrides)
        )
        assert report.kl is not None and report.kl < 0.5
