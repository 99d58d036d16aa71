"""Caches in compressed-tensors: E4M3 with a static scale for a layer's keys and one for its values, written and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.formats.compressed_cache import CACHE
from lowbit.checkpoints.native import Native
from lowbit.checkpoints.packed_model import PackedModel, PlainTensor
from lowbit.checkpoints.shards import ModelError

from helpers import random_ids, tiny_llama

STATIC = {"ranges": "static", "heads": "shared"}


def exported(place: Path, cache: str = "kv-fp8", **options) -> Path:
    tiny_llama(place / "model", dtype=torch.float16)
    recipe = lowbit.recipe("rtn", bits=4, group_size=32, symmetric=True).with_cache(lowbit.recipe(cache, **options))
    lowbit.quantize(
        place / "model",
        recipe.with_overrides([{"match": "embedding", "bits": 16}]),
        random_ids(8, 32),
        out=place / "q",
        max_kl=50,
    )
    lowbit.export(place / "q", "compressed-tensors", out=place / "out")
    return place / "out"


def ranges(model: PackedModel) -> dict[str, torch.Tensor]:
    return {
        part.name: part.tensor
        for part in model.parts()
        if isinstance(part, PlainTensor) and part.name.endswith("_range")
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    exported(root, **STATIC)
    return root


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_config_has_the_scheme_that_vllm_reads_and_each_layer_two_scales(place):
    said = json.loads((place / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert said == {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    own, found = ranges(Native().read(place / "q")), tensors_of(place / "out")
    for i in range(2):
        for short, long in (("k", "key"), ("v", "value")):
            scale = found[f"model.layers.{i}.self_attn.{short}_scale"]
            largest = own[f"model.layers.{i}.self_attn.lowbit_cache.{long}_range"].abs().max()
            assert scale.shape == (1,) and scale.dtype == torch.float32
            assert scale.item() == pytest.approx(largest.item() / 448, rel=1e-6)
    assert not any("lowbit" in name for name in found)


def test_what_is_written_is_read_back_as_a_cache_of_the_same_scales(place):
    model = find_format("compressed-tensors").read(place / "out")
    assert model.description.kv == CACHE
    assert model.description.kv_calibration == Native().read(place / "q").description.kv_calibration
    found = tensors_of(place / "out")
    for name, range_G2 in ranges(model).items():
        path, leaf = name.split(".lowbit_cache.")
        assert range_G2.shape == (2, 2) and torch.equal(-range_G2[:, 0], range_G2[:, 1])
        assert range_G2[0, 1].item() == pytest.approx(448 * found[f"{path}.{leaf[0]}_scale"].item(), rel=1e-6)


def in_two_parts(model, cache=None) -> torch.Tensor:
    """Logits of tokens that read others through the cache; without one, as the model computes them."""
    ids = random_ids(1, 24)
    with torch.no_grad():
        if cache is None:
            return model(ids, use_cache=False).logits[:, 16:]
        model(ids[:, :16], cache=cache, use_cache=True)
        return model(ids[:, 16:], cache=cache, use_cache=True).logits


def test_the_model_that_is_read_back_runs_through_the_same_cache(place, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    one, other = (lowbit.load(place / name, dtype=torch.float32) for name in ("q", "out"))
    kept, read = (in_two_parts(model, lowbit.kv_cache(model)) for model in (one, other))
    torch.testing.assert_close(read, kept, rtol=1e-4, atol=1e-4)
    assert (kept - in_two_parts(one)).abs().max() > 1e-2  # the cache is quantized


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ("kivi", {"bits": 4, "recent": 32, "group_size": 16}),
        ("kv-fp8", {}),
        ("kv-fp8", {"ranges": "static"}),
        ("kv-fp8", {**STATIC, "format": "E5M2"}),
        ("kv-fp8", {**STATIC, "sink": 1}),
    ],
)
def test_other_caches_are_refused_with_the_one_that_fits(tmp_path, cache, options):
    with pytest.raises(ValueError, match="ranges=static,heads=shared"):
        exported(tmp_path, cache, **options)
    assert not (tmp_path / "out").exists()


def rewritten(place: Path, target: Path, config=lambda said: None, tensors=lambda found: None) -> Path:
    target.mkdir()
    data = json.loads((place / "out" / "config.json").read_text())
    config(data["quantization_config"])
    (target / "config.json").write_text(json.dumps(data))
    found = tensors_of(place / "out")
    tensors(found)
    save_file(found, target / "model.safetensors")
    return target


def test_a_layer_with_one_scale_is_refused(place, tmp_path):
    broken = rewritten(place, tmp_path / "x", tensors=lambda found: found.pop("model.layers.1.self_attn.v_scale"))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn needs one positive v_scale"):
        find_format("compressed-tensors").read(broken)


def test_a_scheme_that_is_not_known_is_left_out_with_a_warning(place, tmp_path):
    other = rewritten(place, tmp_path / "x", config=lambda said: said["kv_cache_scheme"].update(type="int"))
    with pytest.warns(UserWarning, match="the cache is quantized in this model"):
        model = find_format("compressed-tensors").read(other)
    assert model.description.kv is None and not ranges(model)
