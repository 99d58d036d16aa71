"""Every table is proved on a tiny random model, and wrong folds are shown to change the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowbit.architectures import (
    Architecture,
    Kind,
    Port,
    ResolvedBlock,
    ResolvedEdge,
    block_modules,
    discover,
    fold,
    for_config,
    model_types,
    needs_bias,
    resolve,
    unfuse_experts,
)
from lowbit.architectures.check import (
    SENSITIVITY,
    TOLERANCE,
    change_of_logits,
    check_architecture,
    drafted,
    logits,
    random_transform,
    randomize,
)
from lowbit.architectures.table import Edge, LinearRole, SharedInput
from lowbit.transforms import ChannelTransform, Permute, Rotate, Scale, Shift, Split

TOKENS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = TOKENS | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = PLAIN | {"intermediate_size": 20, "num_key_value_heads": 2, "max_position_embeddings": 32}
OPT = PLAIN | {"ffn_dim": 20, "word_embed_proj_dim": 24, "max_position_embeddings": 32}
NEOX = PLAIN | {"intermediate_size": 20, "max_position_embeddings": 32}
GPT2 = TOKENS | {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 20, "n_positions": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
SHARED = GROUPED | EXPERTS | {"shared_expert_intermediate_size": 14}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama grouped": ("llama", GROUPED | {"head_dim": 8}),
    "llama tied embeddings, all biases": (
        "llama",
        GROUPED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama single key-value head": ("llama", GROUPED | {"num_key_value_heads": 1}),
    "mistral": ("mistral", GROUPED),
    "granite": ("granite", GROUPED | {"residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "smollm3": ("smollm3", GROUPED | {"no_rope_layers": [1, 0]}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "gemma": ("gemma", GROUPED | {"head_dim": 8}),
    "gemma2": ("gemma2", GROUPED | {"head_dim": 8}),
    "gemma3": ("gemma3_text", GROUPED | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", GROUPED),
    "phi3 partial rotary": ("phi3", GROUPED | {"hidden_size": 32, "partial_rotary_factor": 0.5}),
    "opt": ("opt", OPT),
    "opt norm after, projected embeddings": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 12}),
    "opt without biases and norm weights": (
        "opt",
        OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "opt gelu": ("opt", OPT | {"activation_function": "gelu"}),
    "bloom": ("bloom", PLAIN),
    "bloom residual after norm": ("bloom", PLAIN | {"apply_residual_connection_post_layernorm": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 relu": ("gpt2", GPT2 | {"activation_function": "relu"}),
    "gpt_neox parallel": ("gpt_neox", NEOX | {"rotary_pct": 0.34}),
    "gpt_neox sequential, no attention bias": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
    ),
    "falcon one norm, multi-query": ("falcon", PLAIN),
    "falcon sequential, multi-head, alibi, biases": (
        "falcon",
        PLAIN | {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    ),
    "falcon new, two norms": ("falcon", PLAIN | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon new, one norm": (
        "falcon",
        PLAIN | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", SHARED),
    "qwen2_moe with a dense block": ("qwen2_moe", SHARED | {"mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 8}),
}
SEEDS = {"qwen2_moe with a dense block": 1}
"""Seeds with which every expert sees a token, where seed 0 is not one."""


def _model(case: str) -> PreTrainedModel:
    model_type, options = CASES[case]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))


@pytest.mark.parametrize("case", CASES)
def test_every_legal_transform_at_every_edge_leaves_the_logits_unchanged(case: str) -> None:
    model = _model(case)
    architecture = for_config(model.config)
    proved = check_architecture(model, architecture, seed=SEEDS.get(case, 0))
    named = {label.split(" ")[0].split(".")[1] for label in proved}
    assert {"q_k", "v_o"} <= named and named & {"up_down", "expert_up_down"}
    assert not architecture.warnings


def test_every_table_has_a_case() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(model_types())


@cache
def _prepared(case: str) -> tuple[PreTrainedModel, Architecture, torch.Tensor, torch.Tensor]:
    """A randomized float64 model of that case with its table, tokens and logits."""
    model = _model(case)
    unfuse_experts(model)
    randomize(model.double().eval(), seed=0)
    tokens = torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(0))
    table, before = for_config(model.config), logits(model, tokens)
    for block in block_modules(model, table):
        drafted(table, block, model.config)
    return model, table, tokens, before


def _resolved(case: str, number: int = 0, architecture: Architecture | None = None) -> ResolvedBlock:
    model, table, _, _ = _prepared(case)
    return resolve(architecture or table, block_modules(model, table)[number], model.config)


def _change(case: str, edge: ResolvedEdge, transform: ChannelTransform) -> float:
    model, table, tokens, before = _prepared(case)
    return change_of_logits(model, tokens, before, block_modules(model, table)[0], edge, transform)


def _with_ports(edge: ResolvedEdge, change: Callable[[Port], Port | None], **fields: Any) -> ResolvedEdge:
    ports = [change(port) for port in edge.ports]
    return dataclasses.replace(edge, ports=tuple(port for port in ports if port is not None), **fields)


def _assert_only_the_right_fold_is_exact(case: str, right: ResolvedEdge, wrong: ResolvedEdge, kind: Kind) -> None:
    assert _change(case, right, random_transform(right, kind, 0)) <= TOLERANCE
    assert _change(case, wrong, random_transform(wrong, kind, 0)) > 1e-3


@pytest.mark.parametrize("kind", [Kind.SCALE, Kind.SHIFT, Kind.PERMUTE])
def test_repeating_value_heads_by_tiling_changes_the_logits(kind: Kind) -> None:
    edge = _resolved("llama grouped").edge("v_o")

    def tiled(port: Port) -> Port:
        return port if port.expand is None else dataclasses.replace(port, expand=torch.arange(edge.channels).repeat(2))

    _assert_only_the_right_fold_is_exact("llama grouped", edge, _with_ports(edge, tiled), kind)


def test_free_query_key_scales_under_a_rotary_embedding_change_the_logits() -> None:
    edge = _resolved("llama grouped").edge("q_k")
    query = torch.arange(16).view(2, 1, 8).expand(2, 2, 8).flatten()

    def free(port: Port) -> Port:
        return dataclasses.replace(port, expand=None if port.inverse else query)

    _assert_only_the_right_fold_is_exact("llama grouped", edge, _with_ports(edge, free, channels=16), Kind.SCALE)


def test_interleaved_rotary_pairs_change_the_logits() -> None:
    edge = _resolved("llama grouped").edge("q_k")

    def interleaved(port: Port) -> Port:
        assert port.expand is not None
        heads = port.expand.view(-1, 2, 4)
        return dataclasses.replace(port, expand=heads.transpose(1, 2).flatten())

    _assert_only_the_right_fold_is_exact("llama grouped", edge, _with_ports(edge, interleaved), Kind.SCALE)


def test_scaling_keys_like_queries_changes_the_logits() -> None:
    edge = _resolved("opt").edge("q_k")
    wrong = _with_ports(edge, lambda port: dataclasses.replace(port, inverse=False))
    _assert_only_the_right_fold_is_exact("opt", edge, wrong, Kind.SCALE)


def test_scaling_the_gate_instead_of_up_changes_the_logits() -> None:
    edge = _resolved("llama grouped").edge("up_down")

    def swapped(port: Port) -> Port:
        module = {"mlp.up_proj": "mlp.gate_proj", "mlp.gate_proj": "mlp.up_proj"}.get(port.module, port.module)
        return dataclasses.replace(port, module=module)

    _assert_only_the_right_fold_is_exact("llama grouped", edge, _with_ports(edge, swapped), Kind.SCALE)


def test_permuting_up_without_the_gate_changes_the_logits() -> None:
    edge = _resolved("llama grouped").edge("up_down")
    wrong = _with_ports(edge, lambda port: None if port.module == "mlp.gate_proj" else port)
    _assert_only_the_right_fold_is_exact("llama grouped", edge, wrong, Kind.PERMUTE)


@pytest.mark.parametrize(
    ("case", "name", "forgotten"),
    [
        ("mixtral", "norm_mlp", "mlp.gate"),
        ("mixtral", "norm_mlp", "mlp.experts.1.up_proj"),
        ("qwen2_moe", "norm_mlp", "mlp.gate"),
        ("qwen2_moe", "norm_mlp", "mlp.shared_expert_gate"),
        ("falcon one norm, multi-query", "norm_qkv", "mlp.dense_h_to_4h"),
        ("llama grouped", "norm_qkv", "self_attn.k_proj"),
    ],
)
def test_forgetting_a_reader_of_a_norm_changes_the_logits(case: str, name: str, forgotten: str) -> None:
    edge = _resolved(case).edge(name)
    assert forgotten in {port.module for port in edge.consumers}
    wrong = _with_ports(edge, lambda port: None if port.module == forgotten else port)
    _assert_only_the_right_fold_is_exact(case, edge, wrong, Kind.SCALE)


@pytest.mark.parametrize(
    ("case", "layout"), [("phi3", "grouped"), ("gpt2", "grouped"), ("bloom", "concat"), ("gpt_neox parallel", "concat")]
)
@pytest.mark.parametrize("name", ["v_o", "q_k"])
def test_the_other_layout_of_a_fused_projection_changes_the_logits(case: str, layout: str, name: str) -> None:
    table = _prepared(case)[1]
    linears = tuple(dataclasses.replace(r, layout=layout) if r.role == "qkv" else r for r in table.linears)
    wrong = _resolved(case, architecture=dataclasses.replace(table, linears=linears)).edge(name)
    _assert_only_the_right_fold_is_exact(case, _resolved(case).edge(name), wrong, Kind.SCALE)


def test_swapping_the_halves_of_a_fused_gate_and_up_changes_the_logits() -> None:
    table = _prepared("phi3")[1]
    linears = tuple(dataclasses.replace(r, parts=("up", "gate")) if r.role == "gate_up" else r for r in table.linears)
    wrong = _resolved("phi3", architecture=dataclasses.replace(table, linears=linears)).edge("up_down")
    _assert_only_the_right_fold_is_exact("phi3", _resolved("phi3").edge("up_down"), wrong, Kind.SCALE)


@pytest.mark.parametrize("name", ["norm_qkv", "norm_mlp"])
def test_forgetting_the_offset_of_a_norm_gain_changes_the_logits(name: str) -> None:
    edge = _resolved("gemma2").edge(name)
    wrong = _with_ports(edge, lambda port: dataclasses.replace(port, gain_offset=0.0))
    _assert_only_the_right_fold_is_exact("gemma2", edge, wrong, Kind.SCALE)


def test_the_norm_after_attention_does_not_feed_the_mlp_of_gemma2() -> None:
    edge = _resolved("gemma2").edge("norm_mlp")

    def misplaced(port: Port) -> Port:
        return dataclasses.replace(port, module="post_attention_layernorm") if port.norm else port

    _assert_only_the_right_fold_is_exact("gemma2", edge, _with_ports(edge, misplaced), Kind.SCALE)


def test_scaling_projections_in_front_of_query_and_key_norms_changes_the_logits() -> None:
    wrong = dataclasses.replace(_resolved("llama grouped").edge("q_k"), name="projections")
    _assert_only_the_right_fold_is_exact("qwen3", _resolved("qwen3").edge("q_k"), wrong, Kind.SCALE)


def test_a_negative_scale_through_relu_changes_the_logits_and_is_refused() -> None:
    edge = _resolved("opt").edge("up_down")
    negative = -random_transform(edge, Kind.SCALE, 0).s
    assert _change("opt", dataclasses.replace(edge, positive=False), Scale(negative)) > 1e-3
    with pytest.raises(ValueError, match="must be positive"):
        _change("opt", edge, Scale(negative))


def test_a_scale_through_gelu_changes_the_logits_and_is_refused() -> None:
    edge = _resolved("bloom").edge("up_down")
    scale = random_transform(edge, Kind.SCALE, 0)
    assert _change("bloom", dataclasses.replace(edge, carries=frozenset(Kind)), scale) > 1e-3
    with pytest.raises(ValueError, match="does not carry a scale"):
        _change("bloom", edge, scale)


@pytest.mark.parametrize(
    ("case", "norm_edges"), [("opt norm after, projected embeddings", "opt"), ("bloom residual after norm", "bloom")]
)
def test_norms_that_are_the_residual_stream_offer_no_edge(case: str, norm_edges: str) -> None:
    assert {"norm_qkv", "norm_mlp"}.isdisjoint(edge.name for edge in _resolved(case).edges)
    edge = _resolved(norm_edges).edge("norm_mlp")
    assert _change(case, edge, random_transform(edge, Kind.SCALE, 0)) > 1e-3


def test_a_check_fails_on_a_wrong_table_and_names_the_edge() -> None:
    model = _model("bloom")
    table = for_config(model.config)
    edges = tuple(dataclasses.replace(e, carries=e.carries | {Kind.SCALE}) for e in table.edges)
    with pytest.raises(AssertionError, match=r"0\.up_down scale: logits changed"):
        check_architecture(model, dataclasses.replace(table, edges=edges))


def test_a_check_fails_on_a_wrong_shared_input_and_a_wrong_order_of_stages() -> None:
    model = _model("opt")
    table = for_config(model.config)
    merged = (SharedInput("attention_in", ("q", "k", "v", "o")), *table.shared_inputs[2:])
    with pytest.raises(AssertionError, match="attention_in: its readers read different tensors"):
        check_architecture(model, dataclasses.replace(table, shared_inputs=merged))
    with pytest.raises(AssertionError, match="run in the order"):
        check_architecture(model, dataclasses.replace(table, shared_inputs=table.shared_inputs[::-1]))


def test_a_check_fails_where_an_edge_is_dead() -> None:
    model = _model("llama grouped")
    table = for_config(model.config)
    dead = Edge("dead", *(table.edges[0].producers, ()), frozenset({Kind.SCALE}), table.edges[0].axis, "self_attn")
    with pytest.raises(AssertionError, match="dead scale: logits changed"):
        check_architecture(model, dataclasses.replace(table, edges=(dead,)))
    assert SENSITIVITY > TOLERANCE


# What resolving returns


def test_llama_resolves_to_roles_inputs_and_stages_in_execution_order() -> None:
    block = _resolved("llama grouped")
    assert block.linears == {
        **{f"self_attn.{role}_proj": role for role in "qkvo"},
        **{f"mlp.{role}_proj": role for role in ("gate", "up", "down")},
    }
    readers = [shared.readers for shared in block.shared_inputs]
    assert readers == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert list(block.stages) == readers and not block.routers
    inputs = {edge.name: edge.input for edge in block.edges}
    assert inputs == {
        "norm_qkv": "attention_in",
        "q_k": None,
        "v_o": "attention_out",
        "norm_mlp": "mlp_in",
        "up_down": "mlp_hidden",
    }


def test_experts_have_their_own_inputs_and_share_stages() -> None:
    block = _resolved("mixtral")
    assert block.routers == {"mlp.gate": "router"}
    assert [len(stage) for stage in block.stages] == [3, 1, 8, 4]
    assert block.linears["mlp.experts.2.up_proj"] == "expert_up"
    assert block.edge("norm_mlp").inputs == tuple(f"expert_in.{e}" for e in range(4))
    assert block.edge("norm_mlp").input is None
    assert block.edge("expert_up_down.3").input == "expert_hidden.3"
    assert block.edge("expert_up_down.3").judge == "mlp.experts.3.down_proj"


def test_a_shared_expert_gives_the_norm_statistics_of_every_token() -> None:
    assert _resolved("qwen2_moe").edge("norm_mlp").input == "shared_in"


def test_parallel_attention_and_mlp_share_one_input_and_one_stage() -> None:
    first, *_ = _resolved("falcon one norm, multi-query").shared_inputs
    assert first.readers == ("self_attention.query_key_value", "mlp.dense_h_to_4h")


def test_only_norms_with_a_bias_carry_a_shift() -> None:
    assert Kind.SHIFT in _resolved("opt").edge("norm_qkv").carries
    assert Kind.SHIFT not in _resolved("llama grouped").edge("norm_qkv").carries


def test_norms_without_weights_offer_no_edge() -> None:
    assert {edge.name for edge in _resolved("opt without biases and norm weights").edges} == {"q_k", "v_o", "up_down"}


def test_statistics_reduce_over_the_query_heads_that_share_a_value_head() -> None:
    edge = _resolved("llama grouped").edge("v_o")
    stat_KND = torch.arange(32.0).view(2, 2, 8)
    assert (edge.channels, edge.within) == (16, 8)
    assert torch.equal(edge.reduce_max(stat_KND.flatten()), stat_KND.amax(1).flatten())
    assert torch.equal(edge.reduce_min(stat_KND.flatten()), stat_KND.amin(1).flatten())
    assert torch.equal(edge.reduce_mean(stat_KND.flatten()), stat_KND.mean(1).flatten())
    free = torch.arange(16.0)
    assert torch.equal(edge.spread(free), free.view(2, 1, 8).expand(2, 2, 8).flatten())
    with pytest.raises(ValueError, match="no consumer linear"):
        _resolved("llama grouped").edge("q_k").reduce_max(free)


def test_an_unknown_edge_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"No edge 'up'.*'up_down'"):
        _resolved("opt").edge("up")


# Folding


def _weights(case: str) -> dict[str, torch.Tensor]:
    model, table, _, _ = _prepared(case)
    return block_modules(model, table)[0].state_dict()


def test_folding_changes_neither_the_dictionary_nor_its_tensors_and_returns_only_what_changed() -> None:
    edge, weights = _resolved("phi3").edge("v_o"), _weights("phi3")
    before = {name: tensor.clone() for name, tensor in weights.items()}
    changed = fold(edge, random_transform(edge, Kind.ROTATE, 0), weights)
    assert set(changed) == {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight"}
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    value_rows = slice(36, 48)
    assert torch.equal(changed["self_attn.qkv_proj.weight"][:36], before["self_attn.qkv_proj.weight"][:36])
    assert not torch.equal(
        changed["self_attn.qkv_proj.weight"][value_rows], before["self_attn.qkv_proj.weight"][value_rows]
    )


@pytest.mark.parametrize(
    ("case", "name", "make"),
    [
        ("gemma2", "norm_qkv", Scale),
        ("phi3", "v_o", Scale),
        ("gpt2", "v_o", Shift),
        ("gpt_neox parallel", "q_k", Scale),
    ],
)
def test_folds_are_differentiable_in_the_transform(case: str, name: str, make: type) -> None:
    edge, weights = _resolved(case).edge(name), _weights(case)
    parameter = torch.linspace(0.5, 2.0, edge.channels, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda p: tuple(fold(edge, make(p), weights).values()), (parameter,), fast_mode=True
    )


def test_a_fold_computes_in_the_wider_dtype() -> None:
    edge = _resolved("llama grouped").edge("v_o")
    half = {name: tensor.bfloat16() for name, tensor in _weights("llama grouped").items()}
    changed = fold(edge, Scale(torch.full((16,), 3.0)), half)
    assert {tensor.dtype for tensor in changed.values()} == {torch.float32}
    order = torch.arange(15, -1, -1).view(2, 8).flip(0).flatten()
    assert {t.dtype for t in fold(edge, Permute(order), half).values()} == {torch.bfloat16}


def test_a_shift_says_which_linears_must_gain_a_bias() -> None:
    edge = _resolved("gpt_neox sequential, no attention bias").edge("v_o")
    assert needs_bias(edge, Kind.SHIFT) == ("attention.query_key_value", "attention.dense")
    assert needs_bias(edge, Kind.SCALE) == ()
    shifted = fold(_resolved("opt").edge("v_o"), Shift(torch.ones(24)), _weights("opt"))
    assert set(shifted) == {"self_attn.v_proj.bias", "self_attn.out_proj.bias"}
    assert needs_bias(_resolved("opt").edge("v_o"), Kind.SHIFT) == ()
    with pytest.raises(ValueError, match="see needs_bias"):
        fold(edge, Shift(torch.ones(edge.channels)), _weights("gpt_neox sequential, no attention bias"))


@pytest.mark.parametrize(
    ("name", "transform", "message"),
    [
        ("norm_qkv", Permute(torch.arange(24)), "does not carry a permute; it carries"),
        ("v_o", Scale(torch.ones(32)), "16 free channels"),
        ("v_o", Scale(torch.zeros(16)), "must be nonzero"),
        ("v_o", Permute(torch.arange(16).flip(0)), "inside runs of 8"),
        ("v_o", Permute(torch.zeros(16, dtype=torch.int64)), "not a permutation"),
        ("v_o", Rotate(torch.eye(16)), "runs of 8 of 16"),
        ("v_o", Rotate(torch.eye(8).expand(3, 8, 8)), "runs of 8 of 16"),
        ("v_o", Split(torch.ones(16, dtype=torch.int64)), "changes the width"),
    ],
)
def test_illegal_transforms_are_refused_by_name(name: str, transform: ChannelTransform, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold(_resolved("llama grouped").edge(name), transform, _weights("llama grouped"))


def test_missing_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"self_attn\.v_proj\.weight"):
        fold(_resolved("llama grouped").edge("v_o"), Scale(torch.ones(16)), {})


# What resolving refuses


def _without(entries: tuple, role: str) -> tuple:
    return tuple(entry for entry in entries if entry.role != role)


def test_a_linear_that_the_table_does_not_list_is_named() -> None:
    table = _prepared("llama grouped")[1]
    with pytest.raises(ValueError, match=r"does not list \['mlp\.down_proj'\]"):
        _resolved("llama grouped", architecture=dataclasses.replace(table, linears=_without(table.linears, "down")))


def test_a_linear_without_a_shared_input_is_named() -> None:
    table = _prepared("llama grouped")[1]
    with pytest.raises(ValueError, match=r"no shared input to \['mlp\.down_proj'\]"):
        _resolved("llama grouped", architecture=dataclasses.replace(table, shared_inputs=table.shared_inputs[:-1]))


def test_a_missing_norm_is_an_error_and_not_a_missing_edge() -> None:
    table = _prepared("llama grouped")[1]
    norms = (dataclasses.replace(table.norms[0], path="no_such_norm"), *table.norms[1:])
    with pytest.raises(ValueError, match=r"'norm_qkv'.*no producer at \['no_such_norm'\]"):
        _resolved("llama grouped", architecture=dataclasses.replace(table, norms=norms))


def test_heads_that_contradict_the_weights_are_an_error() -> None:
    table = _prepared("llama grouped")[1]
    assert table.heads is not None
    heads = dataclasses.replace(table.heads, key_value=4)
    with pytest.raises(ValueError, match=r"expects 32 channels at 'self_attn\.\w_proj'; found 16"):
        _resolved("llama grouped", architecture=dataclasses.replace(table, heads=heads))


@pytest.mark.parametrize("case", ["phi3", "bloom", "falcon new, one norm"])
def test_heads_that_contradict_a_fused_projection_are_an_error(case: str) -> None:
    table = _prepared(case)[1]
    assert table.heads is not None
    heads = dataclasses.replace(table.heads, key_value=1)
    with pytest.raises(ValueError, match=r"rows, but its parts \('q', 'k', 'v'\) need"):
        _resolved(case, architecture=dataclasses.replace(table, heads=heads))


def test_rotary_heads_that_contradict_the_weights_are_an_error() -> None:
    table = _prepared("llama grouped")[1]
    assert table.heads is not None
    heads = dataclasses.replace(table.heads, dim=16)
    with pytest.raises(ValueError, match=r"'self_attn\.q_proj' has 32 rows; the table's heads need at least 56"):
        _resolved("llama grouped", architecture=dataclasses.replace(table, heads=heads))


def test_fused_experts_are_refused_until_unfused() -> None:
    model = _model("mixtral")
    block = block_modules(model, for_config(model.config))[0]
    with pytest.raises(ValueError, match="call unfuse_experts"):
        resolve(for_config(model.config), block)


def test_a_table_for_another_model_type_is_refused() -> None:
    model, _, _, _ = _prepared("opt")
    llama = _prepared("llama grouped")[1]
    with pytest.raises(ValueError, match="found 'opt'"):
        resolve(llama, block_modules(model, _prepared("opt")[1])[0], model.config)


def test_matrices_that_no_role_covers_are_named() -> None:
    model, table, _, _ = _prepared("bloom residual after norm")
    block = block_modules(model, table)[1]
    block.register_module("conv", torch.nn.Conv1d(2, 2, 1))
    assert resolve(table, block).other_matrices == ("conv.weight",)
    assert _resolved("bloom residual after norm").other_matrices == ()


# Models without a table


def test_an_unknown_model_is_discovered_with_warnings_and_without_edges() -> None:
    config = AutoConfig.for_model("stablelm", **GROUPED)
    table = for_config(config)
    assert table.blocks == "model.layers" and table.head == "lm_head" and table.embed == ("model.embed_tokens",)
    assert len(table.warnings) == 2 and all("'stablelm'" in warning for warning in table.warnings)
    assert {linear.path for linear in table.linears} == {
        *(f"self_attn.{role}_proj" for role in "qkvo"),
        *(f"mlp.{role}_proj" for role in ("gate", "up", "down")),
    }
    block = resolve(table, AutoModelForCausalLM.from_config(config).get_submodule("model.layers.1"), config)
    assert not block.edges and [len(stage) for stage in block.stages] == [1] * 7


def test_discovery_finds_what_the_tables_list() -> None:
    for case in ("gpt2", "opt norm after, projected embeddings", "qwen2_moe with a dense block", "gpt_neox parallel"):
        model, table, _, _ = _prepared(case)
        found = discover(model)
        assert found.blocks == table.blocks
        for number in range(2):
            known, guessed = _resolved(case, number), _resolved(case, number, found)
            assert set(guessed.linears) == set(known.linears)


def test_discovery_sets_linears_beside_experts_apart_as_routers() -> None:
    config = AutoConfig.for_model("qwen2_moe", **SHARED)
    model = AutoModelForCausalLM.from_config(config)
    unfuse_experts(model)
    assert [router.path for router in discover(model).routers] == ["mlp.shared_expert_gate"]
    assert LinearRole("mlp.experts.*.up_proj", "mlp.experts.*.up_proj") in discover(model).linears


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of Sequential are not known"):
        discover(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="has no architecture table"):
        for_config(SimpleNamespace(model_type="unheard of"))
