"""The pieces most tables are made of. A table calls these and adds what is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.architectures.table import (
    Architecture,
    Axis,
    Edge,
    End,
    Heads,
    Kind,
    LinearRole,
    Norm,
    Residual,
    SharedInput,
    TokenStep,
)

SCALE_SHIFT = frozenset({Kind.SCALE, Kind.SHIFT})
HEAD_KINDS = frozenset({Kind.SCALE, Kind.PERMUTE, Kind.ROTATE})
PERMUTE = frozenset({Kind.PERMUTE})
SCALE_PERMUTE = frozenset({Kind.SCALE, Kind.PERMUTE})

HOMOGENEOUS_ACTIVATIONS = frozenset({"relu", "leaky_relu"})
"""f(s x) == s f(x) for s > 0, so a positive scale passes through."""

NORM_EDGES = ("norm_qkv", "norm_mlp")

CENTRED = Residual(fixed="LayerNorm subtracts the mean of its channels, which a rotation of them changes")


def ends(*roles: str) -> tuple[End, ...]:
    return tuple(End(role) for role in roles)


def rotary_heads(config: Any) -> Heads:
    """Heads of a model with a rotary embedding on queries and keys, over part of the head where the config says so."""
    query = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    rope = getattr(config, "rope_parameters", None) or {}
    rotary = int(dim * rope.get("partial_rotary_factor", 1.0))
    return Heads(query, getattr(config, "num_key_value_heads", None) or query, dim, rotary)


def plain_heads(config: Any) -> Heads:
    """Heads of a model without a rotary embedding and without grouping."""
    query = config.num_attention_heads
    return Heads(query, query, config.hidden_size // query)


def norm_edge(name: str, norm: str, consumers: tuple[End, ...], judge: str) -> Edge:
    """Norm -> every linear and router that reads it: any scale, and a shift where the norm has a bias."""
    return Edge(name, ends(norm), consumers, SCALE_SHIFT, Axis.HIDDEN, judge)


def value_edge(value: End, output: str, judge: str) -> Edge:
    """Values -> output projection: attention averages over tokens, so whatever stays within a head passes."""
    return Edge("v_o", (value,), ends(output), HEAD_KINDS | SCALE_SHIFT, Axis.VALUE, judge)


def query_key_edges(query: str, key: str, judge: str, heads: Heads, *, fused: str | None = None) -> tuple[Edge, ...]:
    """Queries against keys, which take the dual: rotary pairs share a scale; the rest of a head is free.

    fused: the role of the fused projection of which `query` and `key` are parts.
    """
    producers = (
        (End(query), End(key, inverse=True)) if fused is None else (End(fused, query), End(fused, key, inverse=True))
    )
    edges = []
    if heads.rotary:
        edges.append(Edge("q_k", producers, (), frozenset({Kind.SCALE}), Axis.ROTARY, judge))
    if heads.rotary < heads.dim:
        name = "q_k_unrotated" if heads.rotary else "q_k"
        edges.append(Edge(name, producers, (), HEAD_KINDS, Axis.UNROTATED, judge))
    return tuple(edges)


def gated_edge(gate: End, up: End, down: str, *, name: str = "up_down", judge: str) -> Edge:
    """act(gate) * up -> down: linear in `up` alone, so a scale leaves the gate; a permutation moves both."""
    moved_gate = End(gate.role, gate.part, kinds=PERMUTE)
    return Edge(name, (up, moved_gate), ends(down), SCALE_PERMUTE, Axis.INNER, judge)


def plain_mlp_edge(up: str, down: str, activation: str, *, judge: str) -> Edge:
    """up -> activation -> down: a permutation passes any activation, a positive scale only a homogeneous one."""
    homogeneous = activation in HOMOGENEOUS_ACTIVATIONS
    carries = SCALE_PERMUTE if homogeneous else PERMUTE
    return Edge("up_down", ends(up), ends(down), carries, Axis.INNER, judge, positive=True)


@dataclass(frozen=True)
class Mlp:
    """The MLP half of a decoder's table; `readers` are the roles that read the norm before it, routers included, and
    `writers` those whose output is added to the residual stream."""

    linears: tuple[LinearRole, ...]
    shared_inputs: tuple[SharedInput, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    edges: tuple[Edge, ...]
    routers: tuple[LinearRole, ...] = ()


GATED_MLP = Mlp(
    linears=tuple(LinearRole(role, f"mlp.{role}_proj") for role in ("gate", "up", "down")),
    shared_inputs=(SharedInput("mlp_in", ("gate", "up")), SharedInput("mlp_hidden", ("down",))),
    readers=("gate", "up"),
    writers=("down",),
    edges=(gated_edge(End("gate"), End("up"), "down", judge="mlp.down_proj"),),
)


def decoder(
    config: Any,
    *,
    name: str,
    model_types: tuple[str, ...],
    mlp: Mlp = GATED_MLP,
    mlp_norm: str = "post_attention_layernorm",
    gain_offset: float = 0.0,
    query_key_norms: bool = False,
    output_norms: bool = False,
    token_step: TokenStep | str = "its blocks do more than the step knows",
) -> Architecture:
    """The commonest decoder: split projections, RMSNorm before attention and MLP, rotary embedding.

    mlp_norm: the norm that feeds the MLP. gain_offset: 1.0 where norms store their gain minus one. query_key_norms:
    norms on each head of queries and keys, before the rotary embedding; their gains then carry the query/key edge,
    because a norm forgets the scale of the projection before it. output_norms: norms behind attention and MLP too, whose
    gains are of channels of the residual stream and fold into nothing. token_step: see `Architecture`.
    """
    residual = (
        Residual(
            fixed="norms behind attention and MLP have a gain for each of its channels, with no weight behind them"
        )
        if output_norms
        else Residual(NORM_EDGES, ("o", *mlp.writers))
    )
    heads = rotary_heads(config)
    norms = (Norm("attention_norm", "input_layernorm", gain_offset), Norm("mlp_norm", mlp_norm, gain_offset))
    if query_key_norms:
        norms += (Norm("q_norm", "self_attn.q_norm", gain_offset), Norm("k_norm", "self_attn.k_norm", gain_offset))
        gains = (End("q_norm"), End("k_norm", inverse=True))
        query_key = (Edge("q_k", gains, (), frozenset({Kind.SCALE}), Axis.HEAD_ROTARY, "self_attn"),)
    else:
        query_key = query_key_edges("q", "k", "self_attn", heads)
    return Architecture(
        name=name,
        model_types=model_types,
        blocks="model.layers",
        linears=(*(LinearRole(role, f"self_attn.{role}_proj") for role in ("q", "k", "v", "o")), *mlp.linears),
        shared_inputs=(
            SharedInput("attention_in", ("q", "k", "v")),
            SharedInput("attention_out", ("o",)),
            *mlp.shared_inputs,
        ),
        norms=norms,
        routers=mlp.routers,
        edges=(
            norm_edge("norm_qkv", "attention_norm", ends("q", "k", "v"), judge="self_attn"),
            *query_key,
            value_edge(End("v"), "o", judge="self_attn.o_proj"),
            norm_edge("norm_mlp", "mlp_norm", ends(*mlp.readers), judge="mlp"),
            *mlp.edges,
        ),
        heads=heads,
        residual=residual,
        embed=("model.embed_tokens",),
        final_norm="model.norm",
        head="lm_head",
        token_step=token_step,
    )


def plain_token_step(config: Any) -> TokenStep | str:
    """The compiled step of the commonest decoder, or what in `config` it does not know."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.hidden_act != "silu":
        return f"the gate is {config.hidden_act}, it knows silu"
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return f"rotary frequencies ({rope['rope_type']}) change with the length of the text"
    types = set(getattr(config, "layer_types", None) or ())
    if types - {"full_attention"} or (not types and getattr(config, "sliding_window", None) is not None):
        return "attention sees a sliding window of the text, it knows all of it"
    return TokenStep(rotary="model.rotary_emb")


def fused_attention(path: str, output: str, layout: str) -> tuple[LinearRole, ...]:
    """The two linears of an attention whose queries, keys and values are one projection."""
    return LinearRole("qkv", path, ("q", "k", "v"), layout), LinearRole("o", output)


FUSED_INPUTS = (
    SharedInput("attention_in", ("qkv",)),
    SharedInput("attention_out", ("o",)),
    SharedInput("mlp_in", ("fc1",)),
    SharedInput("mlp_hidden", ("fc2",)),
)
"""Fused attention, then a plain MLP, one after the other."""
