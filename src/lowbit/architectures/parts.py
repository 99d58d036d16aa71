"""Parts that most tables share. A table combines them and adds its own entries."""

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
"""Activations with f(s x) == s f(x) for s > 0, which a positive scale passes."""

NORM_EDGES = ("norm_qkv", "norm_mlp")

CENTRED = Residual(fixed="LayerNorm subtracts the mean of its channels, which a rotation of them changes")


def ends(*roles: str) -> tuple[End, ...]:
    return tuple(End(role) for role in roles)


def rotary_heads(config: Any, *, partial: bool = False) -> Heads:
    """Heads of a model with a rotary embedding on queries and keys.

    Args:
        config: the transformers configuration.
        partial: the model turns the part of each head that its config says; most classes turn all of it, whatever that says.
    """
    query = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    rope = getattr(config, "rope_parameters", None) or {}
    rotary = int(dim * rope.get("partial_rotary_factor", 1.0)) if partial else dim
    return Heads(query, getattr(config, "num_key_value_heads", None) or query, dim, rotary)


def plain_heads(config: Any) -> Heads:
    """Heads of a model without a rotary embedding and without grouping."""
    query = config.num_attention_heads
    return Heads(query, query, config.hidden_size // query)


def norm_edge(name: str, norm: str, consumers: tuple[End, ...], judge: str) -> Edge:
    """Norm -> every linear and router that reads it: carries any scale, and a shift if the norm has a bias."""
    return Edge(name, ends(norm), consumers, SCALE_SHIFT, Axis.HIDDEN, judge)


def value_edge(value: End, output: str, judge: str) -> Edge:
    """Values -> output projection: attention averages over tokens, so every transform within a head passes."""
    return Edge("v_o", (value,), ends(output), HEAD_KINDS | SCALE_SHIFT, Axis.VALUE, judge)


def query_key_edges(query: str, key: str, judge: str, heads: Heads, *, fused: str | None = None) -> tuple[Edge, ...]:
    """Queries and keys, which take the dual: the two channels of a rotary pair share a scale; other channels are free.

    `fused`: the role of the fused projection that has `query` and `key` as parts.
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
    """act(gate) * up -> down: linear in `up` only, so a scale does not touch the gate; a permutation moves both."""
    moved_gate = End(gate.role, gate.part, kinds=PERMUTE)
    return Edge(name, (up, moved_gate), ends(down), SCALE_PERMUTE, Axis.INNER, judge)


def plain_mlp_edge(up: str, down: str, activation: str, *, judge: str) -> Edge:
    """up -> activation -> down: a permutation passes every activation, a positive scale only a homogeneous one."""
    homogeneous = activation in HOMOGENEOUS_ACTIVATIONS
    carries = SCALE_PERMUTE if homogeneous else PERMUTE
    return Edge("up_down", ends(up), ends(down), carries, Axis.INNER, judge, positive=True)


@dataclass(frozen=True)
class Mlp:
    """The MLP part of a decoder's table.

    `readers`: the roles that read the norm before the MLP, also routers. `writers`: the roles whose output is added to the
    residual stream.
    """

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
    token_step: TokenStep | str = "its blocks compute more than the step does",
) -> Architecture:
    """The most common decoder: split projections, RMSNorm before attention and MLP, rotary embedding.

    Args:
        config: the transformers configuration.
        name: of the table.
        model_types: that the table serves.
        mlp: the MLP part.
        mlp_norm: path of the norm that feeds the MLP.
        gain_offset: 1.0 if norms store their gain minus one.
        query_key_norms: norms on each head of queries and keys, before the rotary embedding. Their gains then carry the
            query/key edge, because a norm removes the scale of the projection before it.
        output_norms: norms also follow attention and MLP. Their gains act on channels of the residual stream and fold into
            no weight.
        token_step: see `Architecture`.
    """
    residual = (
        Residual(fixed="norms after attention and MLP have a gain for each of its channels, with no weight after them")
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
    """The compiled step of the most common decoder, or the reason why `config` does not allow it."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.hidden_act != "silu":
        return f"the gate is {config.hidden_act}, the step supports only silu"
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return f"rotary frequencies ({rope['rope_type']}) change with the length of the text"
    types = set(getattr(config, "layer_types", None) or ())
    if types - {"full_attention"} or (not types and getattr(config, "sliding_window", None) is not None):
        return "attention sees a sliding window of the text, the step supports only full attention"
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
"""Shared inputs of fused attention followed by a plain MLP."""
