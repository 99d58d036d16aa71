"""compressed-tensors, GPTQ and AWQ: words as their packages have them, and every layer back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.formats.awq import _layer as awq_layer
from lowbit.checkpoints.formats.integers import codes_of, words
from lowbit.modules import QuantLinear
from lowbit.plan import plan

from helpers import random_ids, tiny_llama


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


def quantized(place: Path, method: str = "rtn", ids=None, **options) -> Path:
    tiny_llama(place / "model", dtype=torch.float16, attention_bias=True)
    lowbit.quantize(place / "model", lowbit.recipe(method, **options), ids, out=place / "q", max_kl=50)
    return place / "q"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


CASES = {
    "compressed-tensors": [
        {"bits": 4, "group_size": 32, "symmetric": True},
        {"bits": 4, "group_size": 32},
        {"bits": 8, "group_size": None, "symmetric": True},
        {"bits": 8, "group_size": None},
        {"bits": 3, "group_size": 16},
    ],
    "gptq": [
        {"bits": 4, "group_size": 32, "symmetric": True},
        {"bits": 4, "group_size": 32},
        {"bits": 8, "group_size": None},
        {"bits": 3, "group_size": 16, "symmetric": True},
        {"bits": 2, "group_size": 16},
    ],
    "gptq:v2": [{"bits": 4, "group_size": 32, "symmetric": True}],
    "awq": [{"bits": 4, "group_size": 32}, {"bits": 4, "group_size": None, "symmetric": True}],
}
EVERY = [(name, options) for name, cases in CASES.items() for options in cases]


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_layers_come_back_bit_for_bit_and_compute_the_same(tmp_path, name, options):
    source = quantized(tmp_path, **options)
    lowbit.export(source, name, out=tmp_path / "out")
    before, after = lowbit.load(source), lowbit.load(tmp_path / "out")
    layers = {key: module for key, module in before.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 14
    for key, layer in layers.items():
        back = after.get_submodule(key)
        assert back.description == layer.description
        assert all(torch.equal(value, back.state_dict()[buffer]) for buffer, value in layer.state_dict().items())
    ids = random_ids(2, 16)
    assert torch.equal(before(ids).logits, after(ids).logits)


@torch.no_grad()
def test_a_column_order_becomes_the_groups_of_inputs(tmp_path):
    source = quantized(tmp_path, "gptq", random_ids(8, 32), bits=4, group_size=16, act_order=True)
    lowbit.export(source, "gptq", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["desc_act"] and config["checkpoint_format"] == "gptq_v2"
    before, after = lowbit.load(source), lowbit.load(tmp_path / "out")
    assert any(module.description.pre for module in before.modules() if isinstance(module, QuantLinear))
    for key, layer in before.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(layer.effective_weight(), after.get_submodule(key).effective_weight())
    with pytest.raises(ValueError, match="layers keep column orders of inputs"):
        lowbit.export(source, "awq", out=tmp_path / "awq")


def test_words_are_those_that_the_packages_write():
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert [word % 2**32 for word in words(codes, 4)[0].tolist()] == [0x76543210, 0xFEDCBA98]
    assert words(torch.zeros(1, 37, dtype=torch.uint8), 3).shape == (1, 4)  # dense, across words
    for bits in range(2, 9):
        codes = torch.randint(0, 2**bits, (3, 37), dtype=torch.uint8)
        assert torch.equal(codes_of(words(codes, bits), bits, 37), codes)


def test_tensors_of_each_format_mean_the_weight_by_their_own_formula(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32)
    weights = {
        key: module.dequantize()
        for key, module in lowbit.load(source).named_modules()
        if isinstance(module, QuantLinear)
    }
    for name in ("compressed-tensors", "gptq", "awq"):
        lowbit.export(source, name, out=tmp_path / name)
        tensors = tensors_of(tmp_path / name)
        for key, weight in weights.items():
            assert torch.equal(_formula(name, {n: tensors[f"{key}.{n}"] for n in _names(tensors, key)}), weight), key


def _names(tensors, key: str) -> list[str]:
    return [name.removeprefix(f"{key}.") for name in tensors if name.startswith(f"{key}.")]


def _nibbles(word: torch.Tensor) -> torch.Tensor:
    """Eight nibbles of each word, the lowest first, on a new last axis."""
    return torch.stack([(word.long() >> 4 * i) & 15 for i in range(8)], -1)


def _formula(name: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    if name == "compressed-tensors":
        q = _nibbles(t["weight_packed"]).flatten(1) - 8
        zero = _nibbles(t["weight_zero_point"].T).flatten(1).T - 8
        spread = t["weight_scale"].float().repeat_interleave(32, 1), zero.repeat_interleave(32, 1)
        return (q - spread[1]) * spread[0]
    if name == "gptq":
        q = _nibbles(t["qweight"].T).flatten(1).T  # [I, O]
        zero, group = _nibbles(t["qzeros"]).flatten(1), t["g_idx"].long()
        return ((q - zero[group]) * t["scales"].float()[group]).T
    back = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    q, zero = (_nibbles(t[part])[..., back].flatten(1) for part in ("qweight", "qzeros"))
    return ((q - zero.repeat_interleave(32, 0)) * t["scales"].float().repeat_interleave(32, 0)).T


def test_symmetric_models_are_version_1_of_gptq_and_others_version_2(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32, symmetric=True)
    lowbit.export(source, "gptq", out=tmp_path / "out")
    zeros = next(t for name, t in tensors_of(tmp_path / "out").items() if name.endswith("qzeros"))
    assert (zeros == 0x77777777).all()
    assert json.loads((tmp_path / "out/quantize_config.json").read_text())["checkpoint_format"] == "gptq"
    lowbit.export(source, "gptq:v2", out=tmp_path / "two")
    zeros = next(t for name, t in tensors_of(tmp_path / "two").items() if name.endswith("qzeros"))
    assert (zeros == 0x88888888 - 2**32).all()


def test_the_order_of_nibbles_of_awq():
    codes = torch.arange(8, dtype=torch.uint8).repeat(32, 1)  # [I, O]: every row 0 to 7
    tensors = {
        "qweight": torch.full((32, 1), 0x75316420),
        "qzeros": torch.full((1, 1), 0x75316420),
        "scales": torch.ones(1, 8),
    }
    tensors = {name: t.int() if "q" in name else t.half() for name, t in tensors.items()}
    description, found = awq_layer({"group_size": 128}, "layer", tensors)
    layer = QuantLinear(description, found)
    assert torch.equal(layer.qtensor().codes, codes.T)


REFUSED = [
    ("compressed-tensors", {"group_size": 24}, "its groups divide a row; 24 does not divide 64"),
    ("compressed-tensors", {"group_size": 32, "activation_bits": 6}, "inputs are integers of 4 or 8 bits or E4M3"),
    ("gptq", {"group_size": 32, "bits": 5}, "it has weights of 2, 3, 4, 8 bits, not of 5"),
    ("gptq:v1", {"group_size": 32}, "its version 1 does not hold every zero point"),
    ("awq", {"group_size": 32, "bits": 8}, "it has weights of 4 bits, not of 8"),
]


@pytest.mark.parametrize(("name", "options", "words_"), REFUSED, ids=str)
def test_what_a_format_cannot_hold_is_refused_by_plan_export_and_quantize_before_work(tmp_path, name, options, words_):
    source = quantized(tmp_path, **options)
    with pytest.raises(ValueError, match="cannot be written as") as refusal:
        lowbit.export(source, name, out=tmp_path / "out")
    assert words_ in str(refusal.value)
    recipe = lowbit.recipe("rtn", **options)
    if ":" not in name:
        assert words_ in plan(tmp_path / "model", recipe).compatibility[find_format(name).title]
    with pytest.raises(ValueError, match="the result could not be written as"):
        lowbit.quantize(tmp_path / "model", recipe, None, out=tmp_path / "out", format=name)
    assert not list(tmp_path.glob("out*"))


def test_foreign_checkpoints_of_other_kinds_are_refused(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32)
    lowbit.export(source, "awq", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 'gemv', which lowbit does not read as AWQ"):
        find_format("awq").read(tmp_path / "out")
