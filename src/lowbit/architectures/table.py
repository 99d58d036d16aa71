"""The types of a model's table: its linears, their shared inputs, and the edges across which transforms fold.

A table is a frozen value without code. The family's function builds it and decides everything that depends on the
configuration (grouped heads, places of norms, the activation between two linears), so no other code asks for the model.
Paths are relative to one decoder block; `*` in a path stands for the number of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """The kinds of channel transform an edge can carry."""

    SCALE = "scale"
    SHIFT = "shift"
    PERMUTE = "permute"
    ROTATE = "rotate"
    SPLIT = "split"


class Axis(Enum):
    """The free channels of an edge. Axis and heads together determine how ports repeat them."""

    HIDDEN = "hidden"
    """Residual width: every port has each channel once."""
    INNER = "inner"
    """Width between the two MLP linears: every port has each channel once."""
    VALUE = "value"
    """Key-value heads x head dim; the output projection reads a key-value head once for each query head that shares it."""
    ROTARY = "rotary"
    """Key-value heads x rotary frequencies: the two channels that one frequency rotates are one free channel."""
    UNROTATED = "unrotated"
    """Key-value heads x the query and key channels without rotary embedding."""
    HEAD_ROTARY = "head_rotary"
    """Rotary frequencies, shared by all heads: gains of query and key norms."""


ROLE_GROUPS: dict[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "qkv", "o"}),
    "mlp": frozenset(
        {"gate", "up", "gate_up", "down", "fc1", "fc2"}
        | {f"{expert}_{role}" for expert in ("expert", "shared") for role in ("gate", "up", "down")}
    ),
    "behind_norm": frozenset(
        {"q", "k", "v", "qkv", "gate", "up", "gate_up", "fc1"}
        | {f"{expert}_{role}" for expert in ("expert", "shared") for role in ("gate", "up")}
    ),
}
"""Names for groups of roles, which rules can match. Discovered tables have none of these roles, because the functions of
their linears are unknown."""


@dataclass(frozen=True)
class LinearRole:
    """A quantizable linear.

    Args:
        role: its name for users and recipes.
        path: its place in the block.
        parts: the fused projections, in order.
        layout: "concat" stacks the parts whole. "grouped" interleaves them by key-value head (its query heads, its key,
            its value); in plain multi-head attention this interleaves them by head.
    """

    role: str
    path: str
    parts: tuple[str, ...] = ()
    layout: str = "concat"


@dataclass(frozen=True)
class Norm:
    """A normalization with a gain of `weight + gain_offset` (offset 1.0 if the stored weight is centred on zero)."""

    role: str
    path: str
    gain_offset: float = 0.0


@dataclass(frozen=True)
class SharedInput:
    """Linears that read one tensor. They share its statistics and form one stage of true-sequential quantization.

    If the path of every reader has a `*`, each expert has its own input, and all of these form one stage.
    """

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class End:
    """One end of an edge: a linear, router or norm.

    On the axes of attention, the role or part "q" and every consumer have one head for each query head; all others have one
    for each key-value head.

    Args:
        role: of the module.
        part: of a fused weight.
        inverse: takes the dual of the transform: the keys of a query/key edge.
        kinds: the transforms that touch this end: the gate of a gated MLP moves with a permutation but not with a scale.
    """

    role: str
    part: str | None = None
    inverse: bool = False
    kinds: frozenset[Kind] = frozenset(Kind)


@dataclass(frozen=True)
class Edge:
    """Producers and consumers of one activation, and the transforms that commute with everything between them.

    If the path of every end has a `*`, each expert has its own edge.

    Args:
        name: of the edge.
        producers, consumers: its ends.
        carries: the transforms that the mathematics allows; resolving drops a shift if its norm has no bias.
        axis: the free channels.
        judge: path of the module whose output a search compares.
        positive: scales must be > 0 (a ReLU lies in between).
    """

    name: str
    producers: tuple[End, ...]
    consumers: tuple[End, ...]
    carries: frozenset[Kind]
    axis: Axis
    judge: str
    positive: bool = False


@dataclass(frozen=True)
class Heads:
    """Attention heads.

    Args:
        query: number of query heads.
        key_value: number of heads of keys and values.
        dim: width of a head.
        rotary: leading dims of a head with rotary embedding; frequency i rotates dims i and i + rotary/2. 0: none.
    """

    query: int
    key_value: int
    dim: int
    rotary: int = 0


@dataclass(frozen=True)
class TokenStep:
    """Marks a model that computes exactly the compiled step of one token:

        h += o(attention(rotary(q(norm h)), rotary(k(norm h)), v(norm h)))
        h += down(silu(gate(norm h)) * up(norm h))

    and after the blocks the final norm and the head. Norms are RMSNorm. Queries and keys pass the norms `q_norm` and `k_norm`
    first if the table lists them. Attention sees all earlier tokens and divides its scores by the root of the head dim.

    Args:
        rotary: path of the module for cosines and sines, which may depend on positions only.
    """

    rotary: str


@dataclass(frozen=True)
class Residual:
    """The readers and writers of the residual stream, which a rotation of the stream folds into.

    Args:
        edges: names of the edges from the norms that read the stream to the readers of these norms.
        writers: the roles whose output is added to the stream.
        fixed: the reason why the stream cannot be rotated; empty if it can. It can if every norm on it is an RMSNorm, which
            commutes with an orthogonal matrix once its gain is folded into the weights after it.
    """

    edges: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    fixed: str = ""


@dataclass(frozen=True)
class Architecture:
    """The table of one model.

    Args:
        name: of the table.
        model_types: of transformers that it serves.
        blocks: path of the ModuleList of decoder blocks.
        linears, shared_inputs, edges, norms: within one block.
        routers: choose experts. They are never quantized, but read the same input as the experts, so transforms fold into
            them.
        heads: of attention.
        residual: whether and how the stream between the blocks rotates.
        kept: paths of linears that stay as they are: the model reads their weight without calling them, or their class
            computes more than a product.
        apart: the reason why the blocks cannot run one at a time; empty if they can.
        embed: paths of modules with weights before the first block.
        final_norm, after, head: paths of modules after the last block, if the model has them; `after` are rare projections.
        warnings: name features that are not available for this model.
        token_step: the compiled step of one token, or the reason why there is none.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    linears: tuple[LinearRole, ...]
    shared_inputs: tuple[SharedInput, ...]
    edges: tuple[Edge, ...] = ()
    norms: tuple[Norm, ...] = ()
    routers: tuple[LinearRole, ...] = ()
    heads: Heads | None = None
    residual: Residual = Residual(fixed="the norms that read it are unknown")
    kept: tuple[str, ...] = ()
    apart: str = ""
    embed: tuple[str, ...] = ()
    final_norm: str | None = None
    after: tuple[str, ...] = ()
    head: str | None = None
    warnings: tuple[str, ...] = ()
    token_step: TokenStep | str = "the step supports only blocks of RMSNorm, rotary heads and a gated MLP"
