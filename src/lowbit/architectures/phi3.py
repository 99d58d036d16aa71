"""The llama shape with queries, keys and values stacked in one projection, and gate and up stacked in another."""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import (
    NORM_EDGES,
    ends,
    fused_attention,
    gated_edge,
    norm_edge,
    query_key_edges,
    rotary_heads,
    value_edge,
)
from lowbit.architectures.table import Architecture, End, LinearRole, Norm, Residual, SharedInput


def build(config: Any) -> Architecture:
    heads = rotary_heads(config, partial=True)
    return Architecture(
        name="phi3",
        model_types=("phi3",),
        blocks="model.layers",
        linears=(
            *fused_attention("self_attn.qkv_proj", "self_attn.o_proj", "concat"),
            LinearRole("gate_up", "mlp.gate_up_proj", ("gate", "up")),
            LinearRole("down", "mlp.down_proj"),
        ),
        shared_inputs=(
            SharedInput("attention_in", ("qkv",)),
            SharedInput("attention_out", ("o",)),
            SharedInput("mlp_in", ("gate_up",)),
            SharedInput("mlp_hidden", ("down",)),
        ),
        norms=(Norm("attention_norm", "input_layernorm"), Norm("mlp_norm", "post_attention_layernorm")),
        edges=(
            norm_edge("norm_qkv", "attention_norm", ends("qkv"), judge="self_attn"),
            *query_key_edges("q", "k", "self_attn", heads, fused="qkv"),
            value_edge(End("qkv", "v"), "o", judge="self_attn.o_proj"),
            norm_edge("norm_mlp", "mlp_norm", ends("gate_up"), judge="mlp"),
            gated_edge(End("gate_up", "gate"), End("gate_up", "up"), "down", judge="mlp.down_proj"),
        ),
        heads=heads,
        residual=Residual(NORM_EDGES, ("o", "down")),
        embed=("model.embed_tokens",),
        final_norm="model.norm",
        head="lm_head",
        token_step="its projections are fused",
    )


TABLES = {"phi3": build}
