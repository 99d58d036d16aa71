"""LayerNorm, rotary embedding on part of each head, queries, keys and values interleaved by head, plain MLP.

Attention and MLP have their own norms, in parallel and in sequence, so one table serves both.
"""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import (
    CENTRED,
    FUSED_INPUTS,
    ends,
    fused_attention,
    norm_edge,
    plain_mlp_edge,
    query_key_edges,
    rotary_heads,
    value_edge,
)
from lowbit.architectures.table import Architecture, End, LinearRole, Norm


def build(config: Any) -> Architecture:
    heads = rotary_heads(config, partial=True)
    return Architecture(
        name="gpt_neox",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        linears=(
            *fused_attention("attention.query_key_value", "attention.dense", "grouped"),
            LinearRole("fc1", "mlp.dense_h_to_4h"),
            LinearRole("fc2", "mlp.dense_4h_to_h"),
        ),
        shared_inputs=FUSED_INPUTS,
        norms=(Norm("attention_norm", "input_layernorm"), Norm("mlp_norm", "post_attention_layernorm")),
        edges=(
            norm_edge("norm_qkv", "attention_norm", ends("qkv"), judge="attention"),
            *query_key_edges("q", "k", "attention", heads, fused="qkv"),
            value_edge(End("qkv", "v"), "o", judge="attention.dense"),
            norm_edge("norm_mlp", "mlp_norm", ends("fc1"), judge="mlp"),
            plain_mlp_edge("fc1", "fc2", config.hidden_act, judge="mlp.dense_4h_to_h"),
        ),
        heads=heads,
        residual=CENTRED,
        embed=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head",
    )


TABLES = {"gpt_neox": build}
