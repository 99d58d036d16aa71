"""Unfusing experts changes where weights live and nothing about what is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowbit.architectures import UnfusedExperts, unfuse_experts

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 10, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 10},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},  # biases, gate and up interleaved, a gate of its own
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 12,
        "interleave_moe_layer_step": 1,
    },  # sorted, transposed
    "nemotron_h": {  # no gate
        "num_hidden_layers": 1,
        "layers_block_type": ["moe"],
        "n_routed_experts": 4,
        "moe_intermediate_size": 10,
        "moe_shared_expert_intermediate_size": 12,
    },
}


def _model(model_type: str) -> PreTrainedModel:
    """Fused, and computed expert by expert: the grouped product that is the default knows no float64."""
    config = AutoConfig.for_model(model_type, **(SMALL | MIXTURES[model_type]))
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager")


class FusedExperts(nn.Module):
    """The structure that is recognized, with 3 experts of width 4 over 6 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        gate, up = (hidden_states @ self.gate_up_proj[0].T).chunk(2, -1)  # of one expert; the tests do not call it
        return (self.act_fn(gate) * up) @ self.down_proj[0].T


@pytest.mark.parametrize("model_type", MIXTURES)
def test_unfused_experts_give_the_same_output(model_type: str) -> None:
    torch.manual_seed(0)
    model = _model(model_type).double().eval()
    fused = next(m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module))
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        before = fused(x)
        assert unfuse_experts(fused) == ["experts"]
        after = fused(x)
    before, after = (y[0] if isinstance(y, tuple) else y for y in (before, after))
    gap = 1e-5 if model_type == "nemotron_h" else 1e-12  # it adds up its experts in float32
    torch.testing.assert_close(after, before, rtol=gap, atol=gap)
    assert before.abs().max() > 0.1


def test_every_layer_of_a_model_is_unfused_and_named_by_expert() -> None:
    model = _model("mixtral")
    assert unfuse_experts(model) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    names = set(model.state_dict())
    assert not any("gate_up_proj" in name for name in names)
    assert {f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(4)} <= names
    assert isinstance(model.get_submodule("model.layers.1.mlp.experts.3.gate_proj"), nn.Linear)
    assert unfuse_experts(model) == []


def test_weights_keep_their_values_dtype_and_gradient_flag() -> None:
    parent = nn.ModuleDict({"experts": FusedExperts().bfloat16().requires_grad_(False)})
    gate_up, down = parent["experts"].gate_up_proj, parent["experts"].down_proj
    unfuse_experts(parent)
    for e, expert in enumerate(parent["experts"]):
        assert torch.equal(expert.gate_proj.weight, gate_up[e, :4])
        assert torch.equal(expert.up_proj.weight, gate_up[e, 4:])
        assert torch.equal(expert.down_proj.weight, down[e])
        assert expert.up_proj.weight.untyped_storage().nbytes() == 4 * 6 * 2
        assert not any(parameter.requires_grad for parameter in expert.parameters())


def test_meta_experts_stay_meta() -> None:
    with torch.device("meta"):
        model = _model("qwen3_moe")
    unfuse_experts(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.get_submodule("model.layers.0.mlp.experts.0.up_proj").weight.shape == (10, 16)


def test_hooks_see_only_the_tokens_of_their_expert() -> None:
    parent = nn.ModuleDict({"experts": FusedExperts()})
    unfuse_experts(parent)
    experts, x = parent["experts"], torch.randn(5, 6)
    seen = {}
    for e, expert in enumerate(experts):
        expert.up_proj.register_forward_pre_hook(lambda _, args, e=e: seen.update({e: args[0]}))
    index = torch.tensor([[0, 2], [2, 0], [0, 3], [2, 3], [3, 3]])  # 3 names no expert
    out = experts(x, index, torch.ones(5, 2))
    assert isinstance(experts, UnfusedExperts) and set(seen) == {0, 2}
    assert torch.equal(seen[0], x[[0, 1, 2]]) and torch.equal(seen[2], x[[0, 1, 3]])
    assert torch.equal(out[4], torch.zeros(6))


def _with_half_a_bias(experts: FusedExperts) -> None:
    experts.down_proj_bias = nn.Parameter(torch.zeros(3, 6))


def _with_a_gate_of_its_own(experts: FusedExperts) -> None:
    experts.__class__ = type("FusedExperts", (Clamped,), {})


class Clamped(FusedExperts):
    """As FusedExperts, with something else between the products."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        gate, up = (hidden_states @ self.gate_up_proj[0].T).chunk(2, -1)
        return (self.act_fn(gate.clamp(max=7)) * up) @ self.down_proj[0].T


def _wrong_shape(experts: FusedExperts) -> None:
    experts.gate_up_proj = nn.Parameter(torch.zeros(3, 7, 8))


def _without_activation(experts: FusedExperts) -> None:
    experts.act_fn = None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with_half_a_bias, "other parameters"),
        (_with_a_gate_of_its_own, "no known function between its products"),
        (_wrong_shape, r"parameters of shapes .*\(3, 7, 8\)"),
        (_without_activation, "no known function between its products"),
    ],
)
def test_experts_that_compute_something_else_are_refused(spoil, message: str) -> None:
    experts = FusedExperts()
    spoil(experts)
    with pytest.raises(ValueError, match=rf"'mlp\.experts' \(FusedExperts\) have .*{message}"):
        unfuse_experts(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})}))


def test_a_fused_module_cannot_replace_itself() -> None:
    with pytest.raises(ValueError, match="pass the block that holds it"):
        unfuse_experts(FusedExperts())
