"""Weights that are stored with scales are read as what they stand for, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lowbit
from families import FAMILIES, ids, save_model
from lowbit.checkpoints.shards import ModelError
from lowbit.checkpoints.source import open_model
from lowbit.plan.foresight import plan

from helpers import random_ids, tiny_llama

WIDE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 144,
    "num_key_value_heads": 4,
}  # no multiple of the blocks


def _rewrite(model: Path, change, quantization: dict | None = None) -> None:
    """Replaces the tensors of a one-file model by ``change(tensors)``, and says how they are quantized."""
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"})
    if quantization is not None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def _to_fp8(tensors: dict, block: tuple[int, int] | None, suffix: str = "_scale_inv") -> dict:
    """Every projection as float8 with a scale for the tensor or for each block."""
    made = {}
    for name, value in tensors.items():
        if "proj" not in name:
            made[name] = value
            continue
        rows, columns = block or value.shape
        grid = torch.nn.functional.pad(value.abs(), (0, -value.shape[1] % columns, 0, -value.shape[0] % rows))
        peaks = grid.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))
        scale = (peaks / 448).float()
        spread = scale.repeat_interleave(rows, 0)[: value.shape[0]].repeat_interleave(columns, 1)[:, : value.shape[1]]
        made[name] = (value / spread).to(torch.float8_e4m3fn)
        made[name + suffix] = scale if block else scale.reshape(())
    return made


def _tensors(model: Path) -> dict:
    return {name: value for file in model.glob("*.safetensors") for name, value in load_file(file).items()}


def _restored(tensors: dict, block: tuple[int, int] | None) -> dict:
    plain = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None and block:
            scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            scale = scale[: value.shape[0], : value.shape[1]]
        plain[name] = value if scale is None else value.float() * scale
    return plain


@pytest.mark.parametrize("block", [(128, 128), (64, 32), None])
def test_float8_weights_are_multiplied_by_their_scales(tmp_path, block):
    described = {"quant_method": "fp8", "weight_block_size": list(block) if block else None}
    model = tiny_llama(tmp_path / "model", **WIDE)
    _rewrite(model, lambda t: _to_fp8(t, block), None if block == (128, 128) else described)
    state = lowbit.load(model).state_dict()
    for name, value in _restored(load_file(model / "model.safetensors"), block).items():
        assert torch.equal(state[name], value.float()), name
    report = lowbit.quantize(model, lowbit.recipe("rtn", bits=8, group_size=32), random_ids(2, 16), out=tmp_path / "q")
    assert any("stored in 8 bits" in warning for warning in report.warnings)
    assert "fp8" not in (tmp_path / "q" / "config.json").read_text()
    plain = tiny_llama(tmp_path / "plain", **WIDE)
    _rewrite(plain, lambda t: _restored(load_file(model / "model.safetensors"), block))
    lowbit.quantize(plain, lowbit.recipe("rtn", bits=8, group_size=32), None, out=tmp_path / "of_plain")
    found, wanted = (_tensors(tmp_path / name) for name in ("q", "of_plain"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: _to_fp8(t, None, "_scale"), "is stored as torch.float8_e4m3fn with .*_scale, and what that means"),
        (lambda t: _to_fp8(t, (16, 16)), r"expected one scale, or one for each block of \[128, 128\]"),
        (lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.int8)}, "is stored as torch.int8"),
    ],
)
def test_scales_of_unknown_meaning_and_codes_without_scales_are_refused(tmp_path, change, message):
    model = tiny_llama(tmp_path / "model")
    _rewrite(model, change)
    with pytest.raises(ModelError, match=message):
        open_model(model)


def test_float8_weights_without_scales_are_read_as_their_values(tmp_path):
    model = tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    _rewrite(model, lambda t: {name: value.to(torch.float8_e4m3fn) for name, value in t.items()})
    plain = tiny_llama(tmp_path / "plain")
    _rewrite(plain, lambda t: {n: v.bfloat16() for n, v in load_file(model / "model.safetensors").items()})
    assert lowbit.load(model).dtype == torch.bfloat16
    for name, method in (("folded", "quarot"), ("rounded", "rtn")):
        for source in (model, plain):
            text = random_ids(2, 16) if method == "quarot" else None
            lowbit.quantize(
                source, lowbit.recipe(method, bits=8), text, out=tmp_path / f"{name}_{source.name}", allow_broken=True
            )
        found, wanted = (_tensors(tmp_path / f"{name}_{source.name}") for source in (model, plain))
        assert found.keys() == wanted.keys()
        assert all(found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_float8_weight_whose_scale_alone_is_missing_is_refused(tmp_path):
    model = tiny_llama(tmp_path / "model")
    lost = "model.layers.0.mlp.up_proj.weight_scale_inv"
    _rewrite(model, lambda t: {name: value for name, value in _to_fp8(t, None).items() if name != lost})
    with pytest.raises(ModelError, match=f"what that means is not known. Expected {lost}"):
        open_model(model)


def test_mxfp4_experts_are_read_as_transformers_reads_them(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "gpt_oss", ("gpt_oss", FAMILIES["gpt_oss"][1] | {"intermediate_size": 32}))
    save_model("gpt_oss", tmp_path / "model", torch.bfloat16)
    torch.manual_seed(0)

    def pack(tensors: dict) -> dict:
        made = {}
        for name, value in tensors.items():
            if value.dim() == 3:
                experts, columns, rows = value.shape
                made[f"{name}_blocks"] = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
                made[f"{name}_scales"] = torch.randint(122, 125, (experts, rows, columns // 32), dtype=torch.uint8)
            else:
                made[name] = value
        return made

    _rewrite(tmp_path / "model", pack, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    source = open_model(tmp_path / "model")
    original, stored = source.load_full(), load_file(tmp_path / "model" / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        path = f"model.layers.1.mlp.experts.{name}"
        wanted = convert_moe_packed_tensors(stored[f"{path}_blocks"], stored[f"{path}_scales"]).float()
        assert torch.equal(original.get_parameter(path), wanted)
    lowbit.quantize(tmp_path / "model", lowbit.recipe("rtn", bits=8, group_size=16), ids(2, 16, 1), out=tmp_path / "q")
    x = ids(2, 16, 2)
    with torch.no_grad():
        wanted, found = original(x).logits, lowbit.load(tmp_path / "q", torch.float32)(x).logits
    assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.05


def test_tensors_that_the_model_does_not_take_are_named(tmp_path):
    model = tiny_llama(tmp_path / "model")
    _rewrite(
        model,
        lambda t: t | {"model.layers.2.eh_proj.weight": torch.ones(64, 64), "model.rotary_emb.inv_freq": torch.ones(8)},
    )
    report = lowbit.quantize(model, lowbit.recipe("rtn", bits=8), None, out=tmp_path / "q")
    named = [warning for warning in report.warnings if "have no place in LlamaForCausalLM" in warning]
    assert len(named) == 1 and "model.layers.2.eh_proj.weight" in named[0] and "inv_freq" not in named[0]


def test_an_adapter_next_to_the_weights_is_refused_by_load_and_quantize(tmp_path):
    model = tiny_llama(tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    for use in (lowbit.load, lambda path: lowbit.quantize(path, "rtn", None, out=tmp_path / "q")):
        with pytest.raises(ModelError, match="Merge the adapter first"):
            use(model)


def test_every_unquantized_tensor_keeps_its_own_dtype(tmp_path):
    model = tmp_path / "model"
    save_model("deepseek_v3", model, torch.bfloat16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = (14 + 0.05 * torch.randn(8, generator=torch.Generator().manual_seed(1))).float()
    _rewrite(model, lambda t: t | {bias: exact, "model.norm.weight": t["model.norm.weight"].float() + 1e-4})
    report = lowbit.quantize(model, lowbit.recipe("rtn", bits=8, group_size=16), ids(2, 16, 1), out=tmp_path / "q")
    assert not report.problems
    before = load_file(model / "model.safetensors")
    after = _tensors(tmp_path / "q")
    kept = before.keys() & {name for name, tensor in after.items() if tensor.numel()}
    assert {bias, "model.norm.weight", "model.embed_tokens.weight"} <= kept
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in kept)
    for dtype in (torch.float32, torch.bfloat16):
        loaded, original = lowbit.load(tmp_path / "q", dtype), AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        assert torch.equal(loaded.get_buffer(bias), exact) and original.get_buffer(bias).dtype == torch.float32
        assert loaded.model.norm.weight.dtype == dtype


def test_the_bias_of_a_quantized_linear_keeps_its_dtype(tmp_path):
    model = tiny_llama(tmp_path / "model", dtype=torch.bfloat16, attention_bias=True)
    bias = "model.layers.0.self_attn.q_proj.bias"
    exact = torch.randn(64, generator=torch.Generator().manual_seed(1))
    _rewrite(model, lambda t: t | {bias: exact})
    lowbit.quantize(model, lowbit.recipe("rtn", bits=8, group_size=32), None, out=tmp_path / "q")
    loaded = lowbit.load(tmp_path / "q")
    assert torch.equal(loaded.get_buffer(bias), exact)
    assert loaded.get_buffer(bias.replace("q_proj", "k_proj")).dtype == torch.bfloat16
    planned = plan(model, lowbit.recipe("rtn", bits=8, group_size=32)).bytes_out
    assert planned == sum(tensor.nbytes for tensor in _tensors(tmp_path / "q").values())


def test_float8_experts_that_are_stored_one_by_one_are_joined_as_what_they_stand_for(tmp_path):
    model = tmp_path / "model"
    save_model("deepseek_v3", model, torch.bfloat16)
    _rewrite(model, lambda t: _to_fp8(t, (128, 128)), {"quant_method": "fp8", "weight_block_size": [128, 128]})
    stored = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    wanted = (stored[name].float() * stored[f"{name}_scale_inv"]).bfloat16().float()
    source = open_model(model)
    fused, unfused = source.load_full(), source.skeleton(unfuse=True)
    source.load_into(unfused, "model.layers.1")
    assert torch.equal(fused.model.layers[1].mlp.experts.gate_up_proj[3, 32:], wanted)
    assert torch.equal(unfused.get_parameter(name), wanted) and source.dtype == torch.bfloat16
    report = lowbit.quantize(model, lowbit.recipe("rtn", bits=8, group_size=16), ids(2, 16, 1), out=tmp_path / "q")
    assert report.kl is not None and report.kl < 0.05
