"""A table resolved on one block: paths, rows and free channels instead of roles and parts.

Folds, searches and reports read these plain values and not the table. Shape suffixes: C free channel of an edge, P channel
of a port (a row of a producer, a column of a consumer).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lowbit.architectures.table import Kind


@dataclass(frozen=True, eq=False)
class Port:
    """One place where a transform folds: rows of a producer (`side` "out") or columns of a consumer ("in").

    Args:
        module: path of the module; `weight` and `bias` are its names in the block's state_dict.
        side: "out" or "in".
        has_bias: whether the bias exists.
        kinds: transforms that touch this port.
        norm: `weight` is a gain of `weight + gain_offset`, not a matrix.
        gain_offset: see `norm`.
        rows: [P] int64, the rows of a fused weight that belong to this port; None: all.
        expand: [P] int64, the free channel of each of them; None: each free channel once, in order.
        inverse: takes the dual of the transform.
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
        """The number of times that this port holds each free channel."""
        return 1 if self.expand is None else len(self.expand) // channels

    @cached_property
    def order(self) -> Tensor | None:
        """[P] rows or columns with all free channels once, then all again, and so on; None: as stored."""
        if self.expand is None:
            return self.rows
        copies = int(self.expand.bincount()[0])
        order = self.expand.argsort(stable=True).view(-1, copies).T.flatten()
        return order if self.rows is None else self.rows[order]

    def reduce(self, stat_P: Tensor, how: str = "amax") -> Tensor:
        """A statistic [P] of the port's channels, reduced to the free channels. `how`: "amax", "amin", "mean" or "sum"."""
        if self.expand is None:
            return stat_P
        size = int(self.expand.max()) + 1
        index = self.expand.to(stat_P.device)
        return stat_P.new_zeros(size).scatter_reduce(0, index, stat_P, reduce=how, include_self=False)


@dataclass(frozen=True, eq=False)
class ResolvedEdge:
    """An edge of one block.

    Args:
        name: of the edge.
        channels: length of a transform's parameter vector.
        carries: the kinds of transform that it carries.
        ports: all producers and consumers.
        within: permutations and rotations mix only inside consecutive runs of this length; None: anywhere.
        positive: scales must be > 0.
        judge: path of the module whose output a search compares.
        inputs: the shared inputs that the consumers read, which give the edge's activation statistics. Several if each
            expert sees some of the tokens; empty on a query/key edge.
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
        """The shared input that sees every token of the consumers; None if only several together do."""
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
        """Values of the free channels [channels] repeated at the consumers' input channels [P]."""
        expand = self._consumer().expand
        return free_C if expand is None else free_C[expand.to(free_C.device)]

    def _consumer(self) -> Port:
        if not self.consumers:
            raise ValueError(f"Edge {self.name!r} has no consumer linear, so its channels have no input statistics.")
        return self.consumers[0]


@dataclass(frozen=True)
class ResolvedInput:
    """Linears (paths, in table order) that read one tensor and share its statistics."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ResolvedResidual:
    """The residual stream of one block.

    Args:
        edges: the edges from the norms that read it.
        inputs: the shared inputs directly after one of these norms.
        writers: the linears that write to it.
        fixed: the reason why it cannot be rotated; empty if it can.
    """

    edges: tuple[ResolvedEdge, ...] = ()
    inputs: frozenset[str] = frozenset()
    writers: tuple[Port, ...] = ()
    fixed: str = ""


@dataclass(frozen=True, eq=False)
class ResolvedBlock:
    """One block.

    Args:
        linears: path -> role.
        shared_inputs: in execution order.
        stages: groups of linears for true-sequential quantization, in execution order: each is calibrated with the earlier
            ones quantized.
        edges: of the block.
        routers: path -> role.
        other_matrices: parameters of two or more dimensions without a role (such as convolutions). They keep their
            precision, and a report must say so.
        residual: the stream between the blocks.
    """

    linears: dict[str, str]
    shared_inputs: tuple[ResolvedInput, ...]
    stages: tuple[tuple[str, ...], ...]
    edges: tuple[ResolvedEdge, ...]
    routers: dict[str, str]
    other_matrices: tuple[str, ...] = ()
    residual: ResolvedResidual = ResolvedResidual(fixed="there is none")

    def edge(self, name: str) -> ResolvedEdge:
        """The edge of this name; raises ValueError with the known names if there is none."""
        for edge in self.edges:
            if edge.name == name:
                return edge
        raise ValueError(f"No edge {name!r} in this block; it has {[edge.name for edge in self.edges]}.")
