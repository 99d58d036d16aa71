"""Methods for caches: with every method for weights, in recipes, files and mixes."""

from __future__ import annotations

import pytest

import lowbit
from lowbit.methods import USUAL_CACHE
from lowbit.recipes import KV_FAMILY, METHODS, Train, as_recipe, recipe

from helpers import random_ids, tiny_llama

CACHES = [name for name, method in METHODS.items() if method.family == KV_FAMILY]
OTHERS = [name for name in METHODS if name not in CACHES and not recipe(name).scheme.cache]


@pytest.mark.parametrize("cache", CACHES)
def test_a_method_for_caches_goes_with_every_other_method_on_either_side(cache):
    wanted = recipe(cache)
    assert wanted.stages == wanted.cache_stages and wanted.scheme.cache
    assert wanted.needs_calibration == bool(wanted.stages) == bool(wanted.scheme.cache.calibrated)
    for name in OTHERS:
        alone = recipe(name)
        if wanted.scheme.cache.calibrated and any(isinstance(stage, Train) and stage.cache for stage in alone.stages):
            with pytest.raises(ValueError, match="cannot simulate a cache that needs a calibration"):
                recipe(f"{name}+{cache}")
            continue
        for mixed in (recipe(f"{name}+{cache}"), recipe(f"{cache}+{name}")):
            assert mixed.stages == (*alone.stages, *wanted.stages) and mixed.scheme.rules == alone.scheme.rules
            assert mixed.scheme.cache == wanted.scheme.cache


def test_a_method_with_a_cache_of_its_own_is_not_mixed_with_another():
    for name in ("wkvquant+kivi", "kivi+wkvquant", "kivi+gptq+kv-fp8"):
        with pytest.raises(ValueError, match="both say how the KV cache is held, and differ: leave one out"):
            recipe(name)


def test_an_option_of_a_mix_can_be_said_of_its_cache_alone():
    mixed = recipe("gptq+kivi", bits=4, group_size=64, kv_bits=2, kv_group_size=32, recent=64)
    assert mixed.scheme.cache == recipe("kivi", bits=2, group_size=32, recent=64).scheme.cache
    assert mixed.scheme.rules == recipe("gptq", bits=4, group_size=64).scheme.rules
    both = recipe("gptq+kivi", bits=4)
    assert (
        both.scheme.cache == recipe("kivi", bits=4).scheme.cache
        and both.scheme.rules == recipe("gptq", bits=4).scheme.rules
    )
    assert recipe("kivi", kv_bits=3) == recipe("kivi", bits=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gptq+kivi", {"kv_recnt": 3}, "none of the methods in 'gptq.kivi' has an option 'kv_recnt'.*kv_recent"),
        ("gptq+awq", {"kv_bits": 3}, "has an option 'kv_bits'"),
        ("gptq", {"kv_bits": 3}, "has no option 'kv_bits'"),
        ("gptq", {"bits": True}, "'gptq': bits is True, expected int"),
        ("kivi", {"bits": 2, "kv_bits": 3}, "has the option 'bits' once; found it and kv_bits"),
    ],
)
def test_an_option_that_no_method_has_or_of_another_type_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(name, **options)


def test_the_recipe_that_comes_along_packs_weights_and_cache(tmp_path):
    found = as_recipe("w4-gptq-kivi4")
    assert found.scheme.cache == recipe("kivi", bits=4).scheme.cache
    assert found.scheme.rules == recipe("gptq", bits=4, group_size=64).scheme.rules
    report = lowbit.quantize(tiny_llama(tmp_path / "model"), found, random_ids(2, 96), out=tmp_path / "out", max_kl=50)
    assert report.cache_bits == found.scheme.kv.bits(16) and report.bits_per_weight > 4 and report.kl > 0
    assert "through the cache" in report.measured_on


@pytest.mark.parametrize("ids", [random_ids(2, 64), None], ids=["short windows", "drawn tokens"])
def test_a_run_whose_windows_read_nothing_packed_warns_that_its_figures_tell_nothing(tmp_path, ids):
    model = tiny_llama(tmp_path / "model")
    report = lowbit.quantize(model, recipe("kivi", bits=2), ids, out=tmp_path / "out")
    assert report.kl == 0 and "of which nothing was read packed" in report.measured_on
    assert any("KL and agreement tell nothing of the quantized cache" in text for text in report.warnings)
    long = lowbit.quantize(model, recipe("kivi", bits=2), random_ids(2, 200), out=tmp_path / "long", max_kl=50)
    assert long.kl > 0 and not any("tell nothing" in text for text in long.warnings)


def test_a_file_gives_a_mix_or_a_method_another_cache(tmp_path):
    file = tmp_path / "mine.yaml"
    side = "{grid: {type: Int, bits: 4}, granularity: {type: PerToken}}"
    file.write_text(f"method: rtn\nkv: {{key: {side}, value: {side}, recent: 16}}\n")
    report = lowbit.quantize(tiny_llama(tmp_path / "model"), file, random_ids(2, 64), out=tmp_path / "out", max_kl=50)
    made = lowbit.load(tmp_path / "out")
    assert lowbit.decoding.model.kv_formats(made).kv.recent == 16 and report.cache_bits == 4 + 2 * 16 / 16


def test_a_cache_of_no_named_method_is_of_the_one_that_the_methods_call_usual(tmp_path):
    model = lowbit.load(tiny_llama(tmp_path))
    for options in ({}, {"bits": 4, "recent": 64}):
        found, wanted = lowbit.kv_cache(model, **options), lowbit.kv_cache(model, USUAL_CACHE, **options)
        assert [layer.spec for layer in found.layers] == [layer.spec for layer in wanted.layers]
    assert found.layers[0].spec.key.grid.bits == 4


def test_kivi_gives_the_keys_of_some_layers_more_bits(tmp_path):
    model = lowbit.load(tiny_llama(tmp_path))
    cache = lowbit.kv_cache(model, "kivi", bits=2, wide_layers="1", wide_bits=8, recent=32)
    bits = [(layer.spec.key.grid.bits, layer.spec.value.grid.bits) for layer in cache.layers]
    assert bits == [(8 if i == 1 else 2, 2) for i in range(len(bits))]
    with pytest.raises(ValueError, match="wide_layers are numbers of layers by commas"):
        recipe("kivi", wide_layers="first")
    with pytest.raises(ValueError, match="name layers 99, and the model has"):
        lowbit.kv_cache(model, "kivi", wide_layers=99)
