"""Applies a table to one block: finds the modules, and turns roles and parts into paths, rows and free channels.

Nothing is skipped silently. Errors are: a linear that the table does not list, a missing norm whose consumers exist, and a
width that contradicts the heads. A role without a module is not an error, because a block of a mixed model has either the
dense or the expert roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from lowbit.architectures.channels import axis_channels, axis_ports, part_rows
from lowbit.architectures.decoder import LINEAR_TYPES
from lowbit.architectures.experts import is_fused
from lowbit.architectures.resolved import Port, ResolvedBlock, ResolvedEdge, ResolvedInput, ResolvedResidual
from lowbit.architectures.table import Architecture, Axis, Edge, End, Kind, LinearRole, Norm, SharedInput
from lowbit.modules import weight_shape


@dataclass(frozen=True, eq=False)
class ModelBlock:
    """One block of a model: its name in the model, its module, and the resolved table."""

    name: str
    module: nn.Module
    resolved: ResolvedBlock


def model_blocks(model: nn.Module, architecture: Architecture, config: Any) -> tuple[ModelBlock, ...]:
    """Every block of ``model`` in order, resolved; ``config`` is the model's configuration."""
    return tuple(
        ModelBlock(f"{architecture.blocks}.{i}", block, resolve(architecture, block, config))
        for i, block in enumerate(block_modules(model, architecture))
    )


def resolve(architecture: Architecture, block: nn.Module, config: Any = None) -> ResolvedBlock:
    """The table of `architecture` on one decoder block.

    Args:
        architecture: the table.
        block: its experts must be unfused; meta tensors are enough.
        config: the model's configuration, only compared with the table's model types.

    Raises:
        ValueError: the table is for another model type, or does not fit the block.
    """
    if config is not None and config.model_type not in architecture.model_types:
        raise ValueError(
            f"The {architecture.name!r} table is for {architecture.model_types}; found {config.model_type!r}."
        )
    located = _Located.search(architecture, block)
    located.require_every_linear()
    inputs, stages = _resolve_inputs(architecture.shared_inputs, located)
    edges = tuple(resolved for edge in architecture.edges for resolved in _resolve_edge(edge, located, inputs))
    roles = {place.path: linear.role for linear in architecture.linears for place in located.places[linear.role]}
    routers = {place.path: router.role for router in architecture.routers for place in located.places[router.role]}
    linears = {path: roles[path] for stage in stages for path in stage}
    missing = sorted(set(roles) - set(linears))
    if missing:
        raise ValueError(f"The {architecture.name!r} table gives no shared input to {missing}; add one.")
    residual = _resolve_residual(edges, located, inputs)
    return ResolvedBlock(linears, inputs, stages, edges, routers, located.other_matrices(), residual)


@dataclass(frozen=True)
class _Place:
    """The place of a role: its path, and the number of the expert if the table's path has a `*`."""

    path: str
    expert: str | None


@dataclass(frozen=True)
class _Located:
    """Every role of a table with its places in one block."""

    architecture: Architecture
    modules: dict[str, nn.Module]
    places: dict[str, tuple[_Place, ...]]
    entries: dict[str, LinearRole | Norm]

    @staticmethod
    def search(architecture: Architecture, block: nn.Module) -> _Located:
        modules = dict(block.named_modules())
        entries: dict[str, LinearRole | Norm] = {}
        for entry in (*architecture.linears, *architecture.routers, *architecture.norms):
            assert entry.role not in entries, f"role {entry.role!r} is listed twice in {architecture.name!r}"
            entries[entry.role] = entry
        places = {role: tuple(_match(entry.path, modules)) for role, entry in entries.items()}
        return _Located(architecture, modules, places, entries)

    def require_every_linear(self) -> None:
        kept = {place.path for pattern in self.architecture.kept for place in _match(pattern, self.modules)}
        unknown = [
            p for p, m in self.modules.items() if isinstance(m, LINEAR_TYPES) and p not in {*self.expert_of, *kept}
        ]
        if unknown:
            raise ValueError(f"The {self.architecture.name!r} table does not list {unknown}; add their roles to it.")
        fused = [path for path, module in self.modules.items() if is_fused(module)]
        if fused:
            raise ValueError(f"The experts at {fused} are fused; call unfuse_experts on the block first.")

    def other_matrices(self) -> tuple[str, ...]:
        """Parameters with two or more dimensions larger than one that no role covers."""
        parameters = self.modules[""].named_parameters()
        return tuple(
            name
            for name, p in parameters
            if sum(size > 1 for size in p.shape) > 1 and name.rpartition(".")[0] not in self.expert_of
        )

    @cached_property
    def expert_of(self) -> dict[str, str | None]:
        """Path of every listed module -> the number of its expert, or None."""
        return {place.path: place.expert for places in self.places.values() for place in places}


def _match(pattern: str, modules: Iterable[str]) -> Iterable[_Place]:
    regex = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    for path in modules:
        if match := regex.fullmatch(path):
            yield _Place(path, ".".join(match.groups()) or None)


def _experts(ends: Iterable[str], located: _Located) -> list[str | None]:
    """The experts that each get a copy of an entry, if every path has a `*`; else [None], one entry for all."""
    roles = list(ends)
    if not all("*" in located.entries[role].path for role in roles):
        return [None]
    return list(dict.fromkeys(place.expert for role in roles for place in located.places[role]))


def _places(role: str, expert: str | None, located: _Located) -> tuple[_Place, ...]:
    return tuple(p for p in located.places[role] if expert is None or p.expert == expert)


def _numbered(name: str, expert: str | None) -> str:
    return name if expert is None else f"{name}.{expert}"


def _resolve_inputs(
    shared_inputs: tuple[SharedInput, ...], located: _Located
) -> tuple[tuple[ResolvedInput, ...], tuple[tuple[str, ...], ...]]:
    inputs: list[ResolvedInput] = []
    stages: list[tuple[str, ...]] = []
    for shared in shared_inputs:
        stage: list[str] = []
        for expert in _experts(shared.readers, located):
            readers = tuple(p.path for role in shared.readers for p in _places(role, expert, located))
            if readers:
                inputs.append(ResolvedInput(_numbered(shared.name, expert), readers))
                stage.extend(readers)
        if stage:
            stages.append(tuple(stage))
    return tuple(inputs), tuple(stages)


def _resolve_edge(edge: Edge, located: _Located, inputs: tuple[ResolvedInput, ...]) -> Iterable[ResolvedEdge]:
    for expert in _experts((end.role for end in (*edge.producers, *edge.consumers)), located):
        outs = [
            _port(end, "out", edge.axis, place, located)
            for end in edge.producers
            for place in _places(end.role, expert, located)
        ]
        ins = [
            _port(end, "in", edge.axis, place, located)
            for end in edge.consumers
            for place in _places(end.role, expert, located)
        ]
        if not ins and (edge.consumers or not outs):
            continue
        if not outs:
            paths = [located.entries[end.role].path for end in edge.producers]
            raise ValueError(
                f"Edge {edge.name!r} of {located.architecture.name!r} has no producer at {paths} in this block."
            )
        if any(port.norm and getattr(located.modules[port.module], "weight", None) is None for port in outs):
            continue  # a norm without a gain has nothing to fold into
        yield _assemble(edge, expert, (*outs, *ins), located, inputs)


def _resolve_residual(
    edges: tuple[ResolvedEdge, ...], located: _Located, inputs: tuple[ResolvedInput, ...]
) -> ResolvedResidual:
    residual = located.architecture.residual
    if residual.fixed:
        return ResolvedResidual(fixed=residual.fixed)
    here = tuple(edge for edge in edges if edge.name in residual.edges)
    missing = sorted(set(residual.edges) - {edge.name for edge in here})
    if missing:
        return ResolvedResidual(fixed=f"a block has no edge {', '.join(missing)} to fold the gains of its norms across")
    readers = {port.module for edge in here for port in edge.consumers}
    read = frozenset(shared.name for shared in inputs if not readers.isdisjoint(shared.readers))
    writers = tuple(
        _port(End(role), "out", Axis.HIDDEN, place, located)
        for role in residual.writers
        for place in located.places[role]
    )
    return ResolvedResidual(here, read, writers)


def _assemble(
    edge: Edge, expert: str | None, ports: tuple[Port, ...], located: _Located, inputs: tuple[ResolvedInput, ...]
) -> ResolvedEdge:
    name = _numbered(edge.name, expert)
    channels, within = axis_channels(edge.axis, _width(ports[0], located), located.architecture.heads)
    for port in ports:
        expected, width = channels if port.expand is None else len(port.expand), _width(port, located)
        if width != expected:
            raise ValueError(f"Edge {name!r} expects {expected} channels at {port.module!r}; found {width}.")
    carries = edge.carries
    if any(Kind.SHIFT in port.kinds and not _can_hold_shift(port, located) for port in ports):
        carries = carries - {Kind.SHIFT}
    judge = edge.judge.replace("*", expert or "*")
    return ResolvedEdge(
        name, channels, carries, ports, within, edge.positive, judge, _inputs_of(ports, located, inputs)
    )


def _inputs_of(ports: tuple[Port, ...], located: _Located, inputs: tuple[ResolvedInput, ...]) -> tuple[str, ...]:
    """The input that sees every token of the consumers; without one, the experts' inputs, which together see them all."""
    consumers = {port.module for port in ports if port.side == "in"}
    read = [shared for shared in inputs if not consumers.isdisjoint(shared.readers)]
    whole = [shared.name for shared in read if located.expert_of[shared.readers[0]] is None]
    return tuple(whole[:1] or [shared.name for shared in read])


def _can_hold_shift(port: Port, located: _Located) -> bool:
    return port.has_bias or isinstance(located.modules[port.module], LINEAR_TYPES)


def _width(port: Port, located: _Located) -> int:
    """Number of the port's channels: all its rows or columns, or the rows that `rows` selects."""
    module = located.modules[port.module]
    rows, columns = (*module.get_parameter("weight").shape, 1) if port.norm else weight_shape(module)
    width = columns if port.side == "in" else rows
    if port.rows is None:
        return width
    if int(port.rows.max()) >= width:
        raise ValueError(
            f"{port.module!r} has {width} rows; the table's heads need at least {int(port.rows.max()) + 1}."
        )
    return len(port.rows)


def _port(end: End, side: str, axis: Axis, place: _Place, located: _Located) -> Port:
    module, entry, heads = located.modules[place.path], located.entries[end.role], located.architecture.heads
    shares = side == "in" or "q" in (end.part, end.role)
    rows, expand = axis_ports(axis, heads, shares=shares)
    if isinstance(entry, LinearRole) and end.part is not None:
        fused = part_rows(entry, end.part, weight_shape(module)[0], heads)
        assert fused is not None
        rows = fused if rows is None else fused[rows]
    return Port(
        module=place.path,
        side=side,
        has_bias=getattr(module, "bias", None) is not None,
        kinds=end.kinds,
        norm=isinstance(entry, Norm),
        gain_offset=entry.gain_offset if isinstance(entry, Norm) else 0.0,
        rows=rows,
        expand=expand,
        inverse=end.inverse,
    )


def block_modules(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """The decoder blocks of `model`, in order."""
    blocks = model.get_submodule(architecture.blocks)
    assert isinstance(blocks, nn.ModuleList), f"{architecture.blocks!r} is a {type(blocks).__name__}, not the blocks"
    return blocks
