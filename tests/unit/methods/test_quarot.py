"""QuaRot: what is folded, what runs, what is stored, and which mixes work."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.checkpoints import native
from lowbit.checkpoints.description import ModelDescription
from lowbit.kernels import PackedLinear
from lowbit.kernels.native import integer_input
from lowbit.modules import QuantLinear, residual_of
from lowbit.numerics import Int, PerChannel, PerToken, Spec
from lowbit.plan import explain, plan
from lowbit.steps import RotateInputs, RotateResidual
from lowbit.transforms import RandomHadamard

from helpers import random_ids, sqnr_db, tiny_llama

ALMOST_NONE = {"bits": 8, "activation_bits": 16, "group_size": 16}
"""Weights so fine that what is left is what the rotations do."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("quarot") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def quantized(model) -> Path:
    out = model.with_name("quantized")
    lowbit.quantize(model, lowbit.recipe("quarot", **ALMOST_NONE), random_ids(3, 24), out=out, max_kl=50)
    return out


def _hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.is_file()}


@torch.no_grad()
def test_a_rotated_model_computes_what_the_original_does_and_its_embeddings_stay_as_they_are(model, quantized):
    original, rotated = lowbit.load(model, torch.float32), lowbit.load(quantized, torch.float32)
    ids = random_ids(2, 24, seed=5)
    assert sqnr_db(original(ids).logits, rotated(ids).logits) > 30
    assert rotated.lm_head.weight is rotated.model.embed_tokens.weight  # tied as before
    assert torch.equal(original.lm_head.weight, rotated.lm_head.weight)
    assert torch.equal(original.model.norm.weight, rotated.model.norm.weight)
    stored = [name for shard in quantized.glob("*.safetensors") for name in load_file(shard)]
    assert "lm_head.weight" not in stored
    for block in rotated.model.layers:
        assert (block.input_layernorm.weight == 1).all() and (block.post_attention_layernorm.weight == 1).all()


@torch.no_grad()
def test_without_the_turns_at_both_ends_the_stored_blocks_are_of_another_basis(model, quantized):
    original, rotated = lowbit.load(model, torch.float32), lowbit.load(quantized, torch.float32)
    ids = random_ids(2, 24, seed=5)
    rotated.model.layers[0]._forward_pre_hooks.clear()
    rotated.model.layers[0]._forward_pre_hooks_with_kwargs.clear()
    rotated.model.layers[-1]._forward_hooks.clear()
    assert sqnr_db(original(ids).logits, rotated(ids).logits) < 10


@torch.no_grad()
def test_a_rotated_model_is_saved_again_and_loaded_as_it_was(quantized, tmp_path):
    first = native.load(quantized)
    native.save(first, tmp_path / "again")
    second = native.load(tmp_path / "again")
    ids = random_ids(1, 16, seed=6)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert residual_of(second) == residual_of(first) == second.config.quantization_config.description().residual
    assert ModelDescription.of(first) == first.config.quantization_config.description()
    assert ModelDescription.of(first).version == first.config.quantization_config.to_dict()["version"] == 3
    assert native.bits_report(quantized)["layers"] == 14


def test_the_down_projection_runs_its_rotation_and_the_residual_stream_costs_its_readers_nothing(quantized):
    loaded = lowbit.load(quantized, torch.float32)
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    pre = {name.rpartition(".")[2]: [type(t) for t in m.pre] for name, m in layers.items()}
    assert pre.pop("down_proj") == pre.pop("o_proj") == [RandomHadamard]
    assert set(pre) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} and not any(pre.values())
    seeds = [m.pre[0].seed for m in layers.values() if m.pre]
    assert len(set(seeds)) == len(seeds)


def test_heads_that_are_folded_cost_nothing_to_run_and_compute_the_same(model, tmp_path):
    recipe = lowbit.recipe("quarot", **ALMOST_NONE, heads="folded", solver="nearest")
    assert not recipe.needs_calibration
    lowbit.quantize(model, recipe, None, out=tmp_path / "out")
    folded, original = lowbit.load(tmp_path / "out", torch.float32), lowbit.load(model, torch.float32)
    assert not folded.model.layers[0].self_attn.o_proj.pre
    ids = random_ids(2, 24, seed=5)
    with torch.no_grad():
        assert sqnr_db(original(ids).logits, folded(ids).logits) > 30
    old, new = original.model.layers[0].self_attn.o_proj.weight, folded.model.layers[0].self_attn.o_proj
    assert not torch.allclose(new.effective_weight(), old, atol=0.1 * old.std().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, dtype):
    """It holds even if unquantized parameters, gains and routers, are rounded to a narrow dtype when stored."""
    torch.manual_seed(3)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 128}
    config = AutoConfig.for_model("mixtral", **small, **experts)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path / "model")
    recipe, ids = lowbit.recipe("quarot", bits=4, activation_bits=8, group_size=16), random_ids(3, 24)
    lowbit.quantize(tmp_path / "model", recipe, ids, out=tmp_path / "whole", max_kl=50)

    def interrupt(done, total, what):
        if done > 1.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(tmp_path / "model", recipe, ids, out=tmp_path / "again", max_kl=50, progress=interrupt)
    assert (tmp_path / "again.partial" / "stage-1-00001-of-00004.safetensors").exists()
    lowbit.quantize(tmp_path / "model", recipe, ids, out=tmp_path / "again", max_kl=50)
    assert _hashes(tmp_path / "again") == _hashes(tmp_path / "whole")


def test_where_norms_do_not_commute_every_input_is_rotated_at_run_time_and_the_report_says_why(tmp_path):
    torch.manual_seed(1)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": 128, "n_positions": 64}
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **small)).eval()
    original.save_pretrained(tmp_path / "model")
    recipe, ids = lowbit.recipe("quarot", **ALMOST_NONE, heads="folded"), random_ids(3, 24)
    report = lowbit.quantize(tmp_path / "model", recipe, ids, out=tmp_path / "out", max_kl=50)
    assert any("LayerNorm subtracts the mean" in warning for warning in report.warnings)
    rotated = lowbit.load(tmp_path / "out", torch.float32)
    assert residual_of(rotated) is None
    block = rotated.transformer.h[0]
    runs = {name: bool(m.pre) for name, m in block.named_modules() if isinstance(m, QuantLinear)}
    assert runs == {"attn.c_attn": True, "attn.c_proj": False, "mlp.c_fc": True, "mlp.c_proj": True}
    with torch.no_grad():
        assert sqnr_db(original(ids).logits, rotated(ids).logits) > 30
    foretold = plan(tmp_path / "model", recipe)
    assert [x.bits_per_weight for x in foretold.layers if x.weight] == [x.bits_per_weight for x in report.layers]


@pytest.mark.parametrize("heads", ["all", "folded"])
def test_a_plan_foretells_what_rotations_take(model, tmp_path, heads):
    recipe = lowbit.recipe("quarot", bits=4, solver="nearest", heads=heads)
    report = lowbit.quantize(model, recipe, None, out=tmp_path / "out", allow_broken=True)
    foretold = [x.bits_per_weight for x in plan(model, recipe).layers if x.weight]
    assert foretold == [x.bits_per_weight for x in report.layers]
    assert "RotateResidual: One random Hadamard rotation" in explain(recipe, model).steps[0]


def test_one_linear_runs_the_rotation_of_its_input():
    torch.manual_seed(2)
    linear, x = nn.Linear(48, 24), torch.randn(64, 48)
    x[:, 5] *= 60
    rotated = lowbit.quantize_linear(linear, x, lowbit.recipe("quarot", group_size=None))
    assert [type(t) for t in rotated.pre] == [RandomHadamard]
    plain = lowbit.quantize_linear(linear, x, lowbit.recipe("gptq", bits=4, group_size=None, activation_bits=4))
    with torch.no_grad():
        wanted = linear(x)
        assert sqnr_db(wanted, rotated(x)) > sqnr_db(wanted, plain(x)) + 3


# Mixes


def _steps(name: str, **options) -> list[str]:
    return [type(step).__name__ for step in lowbit.recipe(name, **options).steps]


def test_what_is_folded_comes_before_rotations_at_run_time_and_clipping_behind_them():
    assert _steps("quarot+gptq") == ["RotateResidual", "RotateInputs", "Solve"]
    assert _steps("quarot+osplus") == ["RotateResidual", "Set", "Search", "RotateInputs", "Solve"]
    assert _steps("quarot+smoothquant") == ["RotateResidual", "Set", "RotateInputs", "Solve"]
    assert _steps("quarot+smoothquant", level="O3")[-3:] == ["RotateInputs", "SetActivationRange", "Solve"]
    assert _steps("quarot+awq") == ["RotateResidual", "Search", "RotateInputs", "SearchClip", "Solve"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "smoothquant+quarot",
            {},
            "RotateResidual changes the model that every step works on, and Set would come before",
        ),
        ("gptq+quarot", {}, "leave 'gptq' out, or put it last"),
        ("quarot+quip", {}, "RotateInputs transforms channels that Incoherence has mixed"),
        ("quarot+squeezellm", {}, "Fisher information.*RotateResidual, RotateInputs"),
        ("quarot+rptq", {}, "activations here are dynamic"),
        ("quarot+omniquant", {"activation_bits": 4}, "Learn chooses a range for every row or group, and RotateInputs"),
    ],
)
def test_mixes_that_cannot_be_are_refused_before_any_work(name, options, message):
    with pytest.raises(ValueError, match=message):
        lowbit.recipe(name, **options)


@pytest.mark.parametrize("name", ["quarot+gptq", "quarot+outlier-suppression-plus", "quarot+smoothquant"])
def test_a_mix_runs_to_the_end_and_takes_less_from_the_model_than_rounding_alone(model, tmp_path, name):
    options = {"bits": 4, "activation_bits": 4, "group_size": None, "grid": 8}
    ids, reports = random_ids(3, 24), {}
    for each in (name, "rtn"):
        known = {k: v for k, v in options.items() if k != "grid" or "plus" in each}
        reports[each] = lowbit.quantize(model, lowbit.recipe(each, **known), ids, out=tmp_path / each, max_kl=50)
    assert reports[name].kl < reports["rtn"].kl
    assert residual_of(lowbit.load(tmp_path / name, torch.float32)) is not None


def test_the_rotation_follows_the_recipes_seed_alone():
    step = RotateResidual()
    assert step.residual_rotation(64, 0) == step.residual_rotation(64, 0) != step.residual_rotation(64, 1)
    assert 0 <= step.residual_rotation(576, 5).seed < 2**32
    assert RotateInputs() != RotateInputs("all")


# Levels that reach a share of the range


@pytest.mark.parametrize("symmetric", [True, False])
def test_levels_that_reach_less_clip_what_is_beyond(symmetric):
    x = torch.linspace(-2, 3, 11)[None]
    whole, part = (Int(4, symmetric=symmetric, reach=reach) for reach in (1.0, 0.5))
    lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    wide, narrow = whole.from_range(lo, hi), part.from_range(lo, hi)
    assert torch.allclose(narrow.scale, wide.scale / 2)
    kept = part.decode(part.encode(x, narrow), narrow)
    assert kept.max() <= 1.5 + narrow.scale and kept.max() < x.max()
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Int(4, symmetric=symmetric, reach=0.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_input_whose_levels_reach_less_is_an_integer_product_too(bits):
    act = Spec(Int(bits, symmetric=True, reach=0.9), PerToken())
    assert integer_input(PackedLinear(Spec(Int(4, symmetric=True), PerChannel()), (8, 8), {}, act))
