"""Tensors that are not quantized, stored in a narrower type: what is cast, counted, recorded and refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.numerics import narrowed, narrower
from lowbit.plan import plan

from helpers import random_ids, tiny_llama


def _recipe(method="rtn", **options):
    return lowbit.recipe(method, **{"bits": 4, "group_size": 32} | options)


def _quantize(model, out, recipe=None, **options):
    return lowbit.quantize(model, recipe or _recipe(), random_ids(3, 24), out=out, **{"max_kl": 50} | options)


def _stored(directory):
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("keep", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "quarot"])
def test_wider_tensors_are_cast_and_the_plan_counts_every_byte(tmp_path, method, keep):
    model, dtype = tiny_llama(tmp_path / "m"), getattr(torch, keep)
    report = _quantize(model, tmp_path / "q", _recipe(method), keep_dtype=keep)
    stored = _stored(tmp_path / "q")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert stored[name].dtype == dtype
    assert json.loads((tmp_path / "q" / "config.json").read_text())["dtype"] == keep
    assert sum(x.nbytes for x in stored.values()) == plan(model, report.recipe, keep_dtype=keep).bytes_out
    assert f"at most the width of {keep}" in (tmp_path / "q" / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding", [16, 8])
def test_what_is_measured_is_the_model_with_narrower_tensors(tmp_path, monkeypatch, embedding, tied):
    monkeypatch.setattr("lowbit.pipeline.RELOAD_TOLERANCE", 1e-10)  # a cast that only the saved model has costs 1e-6
    model = tiny_llama(tmp_path / "m", tie_word_embeddings=tied)
    recipe = _recipe("gptq").with_overrides([{"match": "embedding", "bits": 8}] if embedding == 8 else [])
    report = _quantize(model, tmp_path / "q", recipe, keep_dtype="bfloat16")
    assert report.kl != _quantize(model, tmp_path / "wide", recipe).kl


def test_nothing_is_widened_and_integers_stay(tmp_path):
    model = tiny_llama(tmp_path / "m", dtype=torch.float16)
    _quantize(model, tmp_path / "a")
    _quantize(model, tmp_path / "b", keep_dtype="float32")
    _quantize(model, tmp_path / "c", keep_dtype="bfloat16")  # as wide as what is there
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()
    assert narrower(torch.int64, torch.float16) == torch.int64


def _tiny(place, kind):
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    more = {"mixtral": {"intermediate_size": 64, "num_local_experts": 4, "num_key_value_heads": 2}}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **more.get(kind, {}))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place)
    return place


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mixtral", "gpt_neox"])
def test_biases_and_routers_are_cast_in_other_families(tmp_path, family):
    model = _tiny(tmp_path / "m", family)
    report = _quantize(model, tmp_path / "q", keep_dtype="bfloat16")
    stored = _stored(tmp_path / "q")
    assert not [name for name, x in stored.items() if x.dtype == torch.float32]
    assert sum(x.nbytes for x in stored.values()) == plan(model, report.recipe, keep_dtype="bfloat16").bytes_out


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.norm.weight"])
@pytest.mark.parametrize("text", [True, False])
def test_values_beyond_float16_are_refused_with_the_name_of_their_tensor(tmp_path, name, text):
    model = tiny_llama(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors[name][3] = 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: 1 of 64 values are too large for float16.*bfloat16"):
        lowbit.quantize(model, _recipe(), random_ids(2, 8) if text else None, out=tmp_path / "q", keep_dtype="float16")
    assert not (tmp_path / "q").exists()
    _quantize(model, tmp_path / "q", keep_dtype="bfloat16", restart=True, max_kl=1e9)


def test_what_was_infinite_before_is_no_overflow():
    x = torch.tensor([float("inf"), 1.0, -7e4])
    with pytest.raises(ValueError, match="x: 1 of 3"):
        narrowed("x", x, torch.float16)
    assert narrowed("x", x[:2], torch.float16).isinf().sum() == 1


def test_a_run_with_another_dtype_is_not_continued(tmp_path):
    model = tiny_llama(tmp_path / "m")

    class Stop(Exception): ...

    def stop(done, total, what):
        if done >= 1:
            raise Stop

    with pytest.raises(Stop):
        _quantize(model, tmp_path / "q", keep_dtype="bfloat16", progress=stop)
    with pytest.raises(ValueError, match=r"something else \(keep_dtype differ\)"):
        _quantize(model, tmp_path / "q")
    _quantize(model, tmp_path / "q", keep_dtype="bfloat16")
    _quantize(model, tmp_path / "whole", keep_dtype="bfloat16")
    for file in (tmp_path / "q").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"keep_dtype = 'float8': expected auto, float32, bfloat16, float16"):
        _quantize(tiny_llama(tmp_path / "m"), tmp_path / "q", keep_dtype="float8")
