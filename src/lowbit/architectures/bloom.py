"""LayerNorm, ALiBi (no rotary embedding), queries, keys and values interleaved by head, plain MLP with GELU.

With `apply_residual_connection_post_layernorm` the norms' outputs are also the residual stream and have no edge.
"""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import (
    CENTRED,
    FUSED_INPUTS,
    ends,
    fused_attention,
    norm_edge,
    plain_heads,
    plain_mlp_edge,
    query_key_edges,
    value_edge,
)
from lowbit.architectures.table import Architecture, End, LinearRole, Norm


def build(config: Any) -> Architecture:
    heads = plain_heads(config)
    norm_edges = (
        norm_edge("norm_qkv", "attention_norm", ends("qkv"), judge="self_attention"),
        norm_edge("norm_mlp", "mlp_norm", ends("fc1"), judge="mlp"),
    )
    return Architecture(
        name="bloom",
        model_types=("bloom",),
        blocks="transformer.h",
        linears=(
            *fused_attention("self_attention.query_key_value", "self_attention.dense", "grouped"),
            LinearRole("fc1", "mlp.dense_h_to_4h"),
            LinearRole("fc2", "mlp.dense_4h_to_h"),
        ),
        shared_inputs=FUSED_INPUTS,
        norms=(Norm("attention_norm", "input_layernorm"), Norm("mlp_norm", "post_attention_layernorm")),
        edges=(
            *(() if config.apply_residual_connection_post_layernorm else norm_edges),
            *query_key_edges("q", "k", "self_attention", heads, fused="qkv"),
            value_edge(End("qkv", "v"), "o", judge="self_attention.dense"),
            plain_mlp_edge("fc1", "fc2", "gelu", judge="mlp.dense_4h_to_h"),
        ),
        heads=heads,
        residual=CENTRED,
        embed=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        final_norm="transformer.ln_f",
        head="lm_head",
    )


TABLES = {"bloom": build}
