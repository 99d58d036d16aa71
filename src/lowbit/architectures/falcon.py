"""LayerNorm, grouped or single key-value heads in one interleaved projection, plain MLP, three placements of the norms.

In sequence: one norm before attention and one before the MLP. In parallel with one norm: attention and MLP read the same
tensor, so they share an input and every transform of that norm folds into both. In parallel with two norms: one for each.
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
    value_edge,
)
from lowbit.architectures.table import Architecture, Edge, End, Heads, LinearRole, Norm, SharedInput

_ONE_NORM_INPUTS = (
    SharedInput("attention_in", ("qkv", "fc1")),
    SharedInput("attention_out", ("o",)),
    SharedInput("mlp_hidden", ("fc2",)),
)


def build(config: Any) -> Architecture:
    heads = _heads(config)
    attention_norm, mlp_norm = _norms(config)
    return Architecture(
        name="falcon",
        model_types=("falcon",),
        blocks="transformer.h",
        linears=(
            *fused_attention("self_attention.query_key_value", "self_attention.dense", "grouped"),
            LinearRole("fc1", "mlp.dense_h_to_4h"),
            LinearRole("fc2", "mlp.dense_4h_to_h"),
        ),
        shared_inputs=_ONE_NORM_INPUTS if mlp_norm is None else FUSED_INPUTS,
        norms=(attention_norm,) if mlp_norm is None else (attention_norm, mlp_norm),
        edges=(
            *_norm_edges(one_norm=mlp_norm is None),
            *query_key_edges("q", "k", "self_attention", heads, fused="qkv"),
            value_edge(End("qkv", "v"), "o", judge="self_attention.dense"),
            plain_mlp_edge("fc1", "fc2", config.activation, judge="mlp.dense_4h_to_h"),
        ),
        heads=heads,
        residual=CENTRED,
        embed=("transformer.word_embeddings",),
        final_norm="transformer.ln_f",
        head="lm_head",
    )


def _heads(config: Any) -> Heads:
    query, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        key_value = config.num_kv_heads
    else:
        key_value = 1 if config.multi_query else query
    return Heads(query, key_value, dim, rotary=0 if config.alibi else dim)


def _norms(config: Any) -> tuple[Norm, Norm | None]:
    """The norms of attention and of the MLP; None if the MLP reads attention's norm."""
    in_parallel = config.new_decoder_architecture or config.parallel_attn
    if not in_parallel:
        return Norm("attention_norm", "input_layernorm"), Norm("mlp_norm", "post_attention_layernorm")
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        return Norm("attention_norm", "ln_attn"), Norm("mlp_norm", "ln_mlp")
    return Norm("attention_norm", "input_layernorm"), None


def _norm_edges(*, one_norm: bool) -> tuple[Edge, ...]:
    if one_norm:
        return (norm_edge("norm_qkv", "attention_norm", ends("qkv", "fc1"), judge="self_attention"),)
    return (
        norm_edge("norm_qkv", "attention_norm", ends("qkv"), judge="self_attention"),
        norm_edge("norm_mlp", "mlp_norm", ends("fc1"), judge="mlp"),
    )


TABLES = {"falcon": build}
