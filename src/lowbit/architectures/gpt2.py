"""LayerNorm, learned positions, one stacked projection for queries, keys and values, linears stored [in, out]."""

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
    return Architecture(
        name="gpt2",
        model_types=("gpt2",),
        blocks="transformer.h",
        linears=(
            *fused_attention("attn.c_attn", "attn.c_proj", "concat"),
            LinearRole("fc1", "mlp.c_fc"),
            LinearRole("fc2", "mlp.c_proj"),
        ),
        shared_inputs=FUSED_INPUTS,
        norms=(Norm("attention_norm", "ln_1"), Norm("mlp_norm", "ln_2")),
        edges=(
            norm_edge("norm_qkv", "attention_norm", ends("qkv"), judge="attn"),
            *query_key_edges("q", "k", "attn", heads, fused="qkv"),
            value_edge(End("qkv", "v"), "o", judge="attn.c_proj"),
            norm_edge("norm_mlp", "mlp_norm", ends("fc1"), judge="mlp"),
            plain_mlp_edge("fc1", "fc2", config.activation_function, judge="mlp.c_proj"),
        ),
        heads=heads,
        residual=CENTRED,
        embed=("transformer.wte", "transformer.wpe"),
        final_norm="transformer.ln_f",
        head="lm_head",
    )


TABLES = {"gpt2": build}
