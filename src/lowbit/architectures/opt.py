"""LayerNorm with bias, learned positions (so queries and keys are free per channel), MLP of two linears with ReLU.

With `do_layer_norm_before` false the norm's output is the residual stream itself, so the norms have no edge.
"""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import (
    CENTRED,
    ends,
    norm_edge,
    plain_heads,
    plain_mlp_edge,
    query_key_edges,
    value_edge,
)
from lowbit.architectures.table import Architecture, End, LinearRole, Norm, SharedInput


def build(config: Any) -> Architecture:
    heads = plain_heads(config)
    projected = config.word_embed_proj_dim != config.hidden_size
    has_final_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
    norm_edges = (
        norm_edge("norm_qkv", "attention_norm", ends("q", "k", "v"), judge="self_attn"),
        norm_edge("norm_mlp", "mlp_norm", ends("fc1"), judge="fc1"),
    )
    return Architecture(
        name="opt",
        model_types=("opt",),
        blocks="model.decoder.layers",
        linears=(
            *(LinearRole(role, f"self_attn.{role}_proj") for role in ("q", "k", "v")),
            LinearRole("o", "self_attn.out_proj"),
            LinearRole("fc1", "fc1"),
            LinearRole("fc2", "fc2"),
        ),
        shared_inputs=(
            SharedInput("attention_in", ("q", "k", "v")),
            SharedInput("attention_out", ("o",)),
            SharedInput("mlp_in", ("fc1",)),
            SharedInput("mlp_hidden", ("fc2",)),
        ),
        norms=(Norm("attention_norm", "self_attn_layer_norm"), Norm("mlp_norm", "final_layer_norm")),
        edges=(
            *(norm_edges if config.do_layer_norm_before else ()),
            *query_key_edges("q", "k", "self_attn", heads),
            value_edge(End("v"), "o", judge="self_attn.out_proj"),
            plain_mlp_edge("fc1", "fc2", config.activation_function, judge="fc2"),
        ),
        heads=heads,
        residual=CENTRED,
        embed=(
            "model.decoder.embed_tokens",
            "model.decoder.embed_positions",
            *(("model.decoder.project_in",) if projected else ()),
        ),
        final_norm="model.decoder.final_layer_norm" if has_final_norm else None,
        after=("model.decoder.project_out",) if projected else (),
        head="lm_head",
    )


TABLES = {"opt": build}
