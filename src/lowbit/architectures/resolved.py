"""A table resolved on one block: paths, rows and free channels instead of roles and parts.

Everything a fold, a search or a report needs is here as plain values; no one reads the table again. Shape suffixes: C
free channel of an edge, P channel of a port (a row of a producer, a column of a consumer).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lowbit.architectures.table import Kind


@dataclass(frozen=True, eq=False)
class Port:
    """One place where a transform folds: rows of a producer (`side` "out") or columns of a consumer ("in").

    `weight` and `bias` are names in the block's state_dict, `has_bias` whether the bias exists. `norm`: `weight` is a
    gain of `weight + gain_offset` rather than a matrix. `rows`: [P] int64 or None, the rows of a fused weight that
    belong to this port (None: all). `expand`: [P] int64 or None, the free channel of each of them (None: each free
    channel once, in order). `inverse`: takes the dual of the transform.
    """

    module: str
    side: str
    has_bias: bool
    kinds: frozenset[Kind] = frozenset(Kind)
    norm: bool = False
    gain_offset: float = 0.0
    rows: Tensor | None = None
    expand: Tensor | None = None
    inverse: bool = False

    @property
    def weight(self) -> str:
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        return f"{self.module}.bias"

    def copies(self, channels: int) -> int:
        """How many times this port holds each free channel."""
        return 1 if self.expand is None else len(self.expand) // channels

    @cached_property
    def order(self) -> Tensor | None:
        """[P] rows or columns with all free channels once, then all of them again, and so on; None: as they are."""
        if self.expand is None:
            return self.rows
        copies = int(self.expand.bincount()[0])
        order = self.expand.argsort(stable=True).view(-1, copies).T.flatten()
        return order if self.rows is None else self.rows[order]

    def reduce(self, stat_P: Tensor, how: str = "amax") -> Tensor:
        """A statistic of the port's channels reduced to the free channels. `how`: "amax", "amin", "mean" or "sum"."""
        if self.expand is None:
            return stat_P
        size = int(self.expand.max()) + 1
        index = self.expand.to(stat_P.device)
        return stat_P.new_zeros(size).scatter_reduce(0, index, stat_P, reduce=how, include_self=False)


@dataclass(frozen=True, eq=False)
class ResolvedEdge:
    """An edge of one block.

    `channels`: length of a transform's parameter vector. `within`: a permutation or rotation mixes only inside
    consecutive runs of this many free channels (None: anywhere). `positive`: scales must be > 0. `judge`: the module
    whose output a search compares. `inputs`: the shared inputs that the consumers read, where the edge's activation
    statistics come from; several where experts each see some of the tokens; empty on a query/key edge.
    """

    name: str
    channels: int
    carries: frozenset[Kind]
    ports: tuple[Port, ...]
    within: int | None
    positive: bool
    judge: str
    inputs: tuple[str, ...] = ()

    @property
    def input(self) -> str | None:
        """The shared input that sees every token the consumers see, or None where only several together do."""
        return self.inputs[0] if len(self.inputs) == 1 else None

    @property
    def consumers(self) -> tuple[Port, ...]:
        return tuple(port for port in self.ports if port.side == "in")

    @property
    def producers(self) -> tuple[Port, ...]:
        return tuple(port for port in self.ports if port.side == "out")

    def reduce_max(self, stat: Tensor) -> Tensor:
        """Statistics of the consumers' input channels [P] reduced to the free channels [channels] by maximum."""
        return self._consumer().reduce(stat, "amax")

    def reduce_min(self, stat: Tensor) -> Tensor:
        """As `reduce_max`, by minimum."""
        return self._consumer().reduce(stat, "amin")

    def reduce_mean(self, stat: Tensor) -> Tensor:
        """As `reduce_max`, by mean."""
        return self._consumer().reduce(stat, "mean")

    def reduce_sum(self, stat: Tensor) -> Tensor:
        """As `reduce_max`, by sum."""
        return self._consumer().reduce(stat, "sum")

    def spread(self, free_C: Tensor) -> Tensor:
        """Values of the free channels [channels] at the consumers' input channels [P], the opposite of a reduction."""
        expand = self._consumer().expand
        return free_C if expand is None else free_C[expand.to(free_C.device)]

    def _consumer(self) -> Port:
        if not self.consumers:
            raise ValueError(f"Edge {self.name!r} has no consumer linear, so its channels have no input statistics.")
        return self.consumers[0]


@dataclass(frozen=True)
class ResolvedInput:
    """Linears (paths, in table order) that read one tensor and so share its statistics."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ResolvedResidual:
    """The residual stream of one block: the edges from the norms that read it, the shared inputs that are the stream behind
    one of these norms, and the linears that write to it. `fixed`: why it cannot be rotated; empty where it can.
    """

    edges: tuple[ResolvedEdge, ...] = ()
    inputs: frozenset[str] = frozenset()
    writers: tuple[Port, ...] = ()
    fixed: str = ""


@dataclass(frozen=True, eq=False)
class ResolvedBlock:
    """One block: linears path -> role, shared inputs and stages in execution order, edges, routers path -> role.

    `stages` groups the linears for true-sequential quantization: each is calibrated with the earlier ones quantized.
    `other_matrices` names the parameters of two or more dimensions that no role covers (convolutions, say): they keep
    their precision, and a report must say so. `residual`: how the stream between the blocks rotates.
    """

    linears: dict[str, str]
    shared_inputs: tuple[ResolvedInput, ...]
    stages: tuple[tuple[str, ...], ...]
    edges: tuple[ResolvedEdge, ...]
    routers: dict[str, str]
    other_matrices: tuple[str, ...] = ()
    residual: ResolvedResidual = ResolvedResidual(fixed="there is none")

    def edge(self, name: str) -> ResolvedEdge:
        """The edge of that name, or ValueError with the names there are."""
        for edge in self.edges:
            if edge.name == name:
                return edge
        raise ValueError(f"No edge {name!r} in this block; it has {[edge.name for edge in self.edges]}.")
