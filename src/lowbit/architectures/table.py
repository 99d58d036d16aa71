"""What a model's table says: where its linears are, which share an input, and across which edges transforms fold.

A table is a frozen value and holds no code. Everything that depends on the configuration (grouped heads, a norm's
place, the activation between two linears) is decided once, when the family's function builds the table, so nothing
downstream asks which model it is looking at. Paths are relative to one decoder block; `*` in a path stands for the
index of an expert.
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
    """What the free channels of an edge are; with the heads it fixes how ports repeat them."""

    HIDDEN = "hidden"
    """Residual width: every port has each channel once."""
    INNER = "inner"
    """Width between the two MLP linears: every port has each channel once."""
    VALUE = "value"
    """Key-value heads x head dim; the output projection reads each key-value head once a query head that shares it."""
    ROTARY = "rotary"
    """Key-value heads x rotary frequencies: the two channels that one frequency turns are one free channel."""
    UNROTATED = "unrotated"
    """Key-value heads x the query and key channels that no rotary embedding turns."""
    HEAD_ROTARY = "head_rotary"
    """Rotary frequencies, shared by all heads: the gains of query and key norms."""


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
"""Names for several roles at once, whatever roles a model has: rules match by them. A model whose table was discovered has
none of these roles, as what its linears are is not known."""


@dataclass(frozen=True)
class LinearRole:
    """A quantizable linear: `role` is the name users and recipes give it, `path` its place in the block.

    `parts` names the fused projections in the order of `layout`: "concat" stacks them whole, "grouped" interleaves them
    by key-value head (its query heads, its key, its value), which is also the per-head interleaving of plain
    multi-head attention.
    """

    role: str
    path: str
    parts: tuple[str, ...] = ()
    layout: str = "concat"


@dataclass(frozen=True)
class Norm:
    """A normalization with a gain of `weight + gain_offset` (offset 1.0 where the stored weight is centred on zero)."""

    role: str
    path: str
    gain_offset: float = 0.0


@dataclass(frozen=True)
class SharedInput:
    """Linears that read one tensor: they share its statistics, and each is one stage of true-sequential quantization.

    Where every reader's path has a `*`, there is one such input for each expert, and all of them form one stage.
    """

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class End:
    """One side of an edge: a linear, router or norm by role, with the part of a fused weight where it is one.

    On the axes of attention, the role or part named "q" has one head for each query head, as has every consumer; all
    others have one for each key-value head. `inverse` marks the keys of a query/key edge, which take the dual of what the queries take. `kinds` restricts the
    transforms that touch this end: the gate of a gated MLP moves with a permutation but not with a scale.
    """

    role: str
    part: str | None = None
    inverse: bool = False
    kinds: frozenset[Kind] = frozenset(Kind)


@dataclass(frozen=True)
class Edge:
    """Producers and consumers of one activation, and what commutes with everything between them.

    `positive`: scales must be > 0 (a ReLU in between). `judge`: the module whose output a search compares. `carries`
    is what the mathematics allows; resolving drops a shift whose norm has no bias to hold it. Where every end's path
    has a `*`, there is one edge for each expert.
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
    """Attention heads: `query` heads of width `dim`, `key_value` of them for keys and values, `rotary` dims rotated.

    Rotary dims are the leading ones of a head, with frequency i turning dims i and i + rotary/2. 0: no rotary
    embedding on queries and keys.
    """

    query: int
    key_value: int
    dim: int
    rotary: int = 0


@dataclass(frozen=True)
class TokenStep:
    """Says that a model is exactly what the compiled step of one token computes:

        h += o(attention(turn(q(norm h)), turn(k(norm h)), v(norm h)))
        h += down(silu(gate(norm h)) * up(norm h))

    and after the blocks the final norm and the head. Norms are RMSNorm; queries and keys pass the norms `q_norm` and `k_norm`
    first where the table lists them; attention sees all earlier tokens, its scores divided by the root of the head dim.

    `rotary`: the path of the module that gives cosines and sines of positions, which depend on nothing else.
    """

    rotary: str


@dataclass(frozen=True)
class Residual:
    """Where the residual stream is read and written, so that all of the model may move to another orthogonal basis.

    `edges` names those from the norms that read the stream to all that reads these norms, `writers` the roles whose output
    is added to it. `fixed`: why the stream cannot be rotated; empty where it can: every norm on it is an RMSNorm, which an
    orthogonal matrix commutes with once its gain is in the weights behind it.
    """

    edges: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    fixed: str = ""


@dataclass(frozen=True)
class Architecture:
    """The table of one model: module paths of the whole model, then roles, inputs and edges within a block.

    `blocks` is the path of the ModuleList of decoder blocks; `embed` the modules with weights before the first block;
    `final_norm`, `after` (rare projections) and `head` those after the last, where the model has them. `routers` choose
    experts and are never quantized, but read what the experts read, so transforms fold into them. `residual` says whether
    and how the stream between the blocks rotates. `warnings` names what is not available for this model. `token_step`:
    whether one token has a compiled step, or why not.
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
    residual: Residual = Residual(fixed="nothing is known of the norms that read it")
    embed: tuple[str, ...] = ()
    final_norm: str | None = None
    after: tuple[str, ...] = ()
    head: str | None = None
    warnings: tuple[str, ...] = ()
    token_step: TokenStep | str = "only blocks of RMSNorm, rotary heads and a gated MLP are described to it"
