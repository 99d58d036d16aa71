"""Every matrix of the model in one row: its format, or why it stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from lowbit.modules import ActSpec
from lowbit.numerics import (
    Block,
    Float,
    Grid,
    Int,
    Minimum,
    NoParams,
    Normal,
    OutlierVictim,
    PerChannel,
    PerCluster,
    PerGroup,
    PerInput,
    PerTensor,
    PerToken,
    RowBands,
    Sign,
    SignedScale,
    Spec,
    Table,
    TwoSided,
    Unsigned,
    sizes_that_divide,
)
from lowbit.plan.model_plan import BlockPlan, ModelPlan, outside_names
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class PlannedLayer:
    """One matrix of the model.

    Attributes:
        name: full name.
        role: the name that rules use.
        shape: ``(out, in)`` of a linear, else the tensor's shape.
        weight, activation: formats in words; None: unchanged.
        bits_per_weight: all bits stored for it, without a bias, over its number of weights. A column order that its
            solver may add is included. 0 if it is stored with another layer.
        reason: why it is not quantized; empty if it is.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    weight: str | None
    activation: str | None
    bits_per_weight: float
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}


def planned_layers(plan: ModelPlan) -> tuple[PlannedLayer, ...]:
    """All matrices in the model's order: before the blocks, the blocks, after the blocks."""
    names = outside_names(plan)
    outside = [_outside(plan, name) for name in names] + [
        _tied(plan, *pair) for pair in plan.model.all_tied_weights_keys.items()
    ]
    first = [row for row in outside if row and row.role == "embedding"]
    last = [row for row in outside if row and row.role != "embedding"]
    return (*first, *(row for block in plan.blocks for row in _of_block(plan, block)), *last)


def _outside(plan: ModelPlan, name: str) -> PlannedLayer | None:
    shape, module = tuple(plan.model.state_dict()[name].shape), name.rpartition(".")[0]
    if len(shape) < 2:
        return None
    if module in plan.architecture.embed:
        role, reason = "embedding", "embedding: looked up, not multiplied"
    elif module == plan.architecture.head:
        role, reason = "head", "head: not in a block"
    else:
        role, reason = "other", "not in a block"
    packed = plan.outside.stored.get(module)
    if packed is not None:
        if name.rpartition(".")[2] != "weight":
            return None
        bits = packed.stored_bits / prod(shape)
        return PlannedLayer(module, role, shape, weight_text(packed.spec), None, bits)
    return PlannedLayer(module, role, shape, None, None, _as_is(plan, name), reason)


def _tied(plan: ModelPlan, name: str, other: str) -> PlannedLayer:
    module, shape = name.rpartition(".")[0], tuple(plan.model.state_dict()[name].shape)
    role = "head" if module == plan.architecture.head else "other"
    reason = f"{role}: tied to {other.rpartition('.')[0]}, which is stored once for both"
    return PlannedLayer(module, role, shape, None, None, 0.0, reason)


def _as_is(plan: ModelPlan, tensor: str) -> float:
    return 8.0 * plan.kept.dtype_of(tensor).itemsize


def _of_block(plan: ModelPlan, block: BlockPlan) -> Iterator[PlannedLayer]:
    for path, role in block.resolved.linears.items():
        name, shape = f"{block.name}.{path}", block.shapes[path]
        layer = block.layers.get(path)
        if layer is None:
            bits, reason = _as_is(plan, f"{name}.weight"), _why_not(plan.recipe.scheme, name, role)
            yield PlannedLayer(name, role, shape, None, None, bits, reason)
            continue
        bits = plan.description(layer).stored_bits + 8 * layer.order_bytes
        act = None if layer.format.act is None else activation_text(layer.format.act)
        yield PlannedLayer(name, role, shape, weight_text(layer.format.weight), act, bits / prod(shape))
    for path, role in block.resolved.routers.items():
        shape = tuple(block.module.get_submodule(path).get_parameter("weight").shape)
        reason = "router: a small error here sends a token to other experts"
        bits = _as_is(plan, f"{block.name}.{path}.weight")
        yield PlannedLayer(f"{block.name}.{path}", role, shape, None, None, bits, reason)
    for parameter in block.resolved.other_matrices:
        shape = tuple(block.module.get_parameter(parameter).shape)
        reason = "the architecture's table gives it no role"
        name = f"{block.name}.{parameter}"
        yield PlannedLayer(name, "other", shape, None, None, _as_is(plan, name), reason)


def _why_not(scheme: Scheme, name: str, role: str) -> str:
    for rule in reversed(scheme.rules):
        if rule.matches(name, role):
            return f"skipped by rule {rule.match!r}" if rule.skip else f"rule {rule.match!r} gives no weight format"
    return "no rule matches it"


# Words


def weight_text(spec: Spec) -> str:
    """A weight's format in words: ``int4 asymmetric, groups of 64``."""
    if spec.grid.kind is NoParams:  # nothing is stored for a granule
        return grid_text(spec.grid)
    text = f"{grid_text(spec.grid)}, {_granularity_text(spec.granularity)}"
    return text if spec.stats is None else f"{text}, scales as ({weight_text(spec.stats)})"


def activation_text(act: ActSpec) -> str:
    """An activation's format in words: ``int8 symmetric, per token, dynamic``."""
    when = "static" if act.static else "dynamic"
    text = f"{grid_text(act.spec.grid)}, {_granularity_text(act.spec.granularity)}, {when}"
    return f"{text}, channels of {act.threshold:g} and over in floating point" if act.threshold else text


def grid_text(grid: Grid) -> str:
    """A grid in words: ``int4 asymmetric``."""
    if isinstance(grid, Int):
        zero = " with real zero points" if not grid.symmetric and grid.zero == "real" else ""
        return f"int{grid.bits} {'symmetric' if grid.symmetric else 'asymmetric'}{zero}"
    if isinstance(grid, Minimum | SignedScale | Unsigned):
        kind = {Minimum: "with a minimum", SignedScale: "with signed scales", Unsigned: "from zero"}[type(grid)]
        return f"int{grid.bits} {kind}"
    if isinstance(grid, Float):
        return f"float{grid.bits} ({grid.name}{', shared exponents' if grid.shared_exponent else ''})"
    if isinstance(grid, Sign):
        return "signs"
    if isinstance(grid, Normal):
        return f"normal{grid.bits}"
    if isinstance(grid, OutlierVictim):
        return f"{grid.normal}{grid.bits} in outlier-victim pairs"
    if isinstance(grid, TwoSided):
        return f"table of {len(grid.values)} values, two scales"
    return f"table of {len(grid.values)} values" if isinstance(grid, Table) else str(grid)


def _granularity_text(granularity: Any) -> str:
    match granularity:
        case PerGroup(size):
            return f"groups of {size}"
        case Block(rows, cols):
            return f"blocks of {rows} x {cols}"
        case RowBands(count):
            return f"{count} bands of rows"
        case PerCluster(sizes):
            return f"{len(sizes)} clusters of channels"
        case PerChannel():
            return "per channel"
        case PerToken():
            return "per token"
        case PerInput():
            return "per input channel"
        case PerTensor():
            return "per tensor"
    return str(granularity)


_GGUF_BLOCK = 32
"""Inputs that have a scale of their own in GGUF: a group of whole blocks is held as several, and the last one may have fewer."""
_GGUF_MAY = "of other file formats at most GGUF holds it"


def ragged_groups(plan: ModelPlan) -> list[str]:
    """One sentence for each group size and width where groups do not divide the inputs."""
    where: dict[tuple[int, int], list[str]] = {}
    for block, path, layer in plan.layers:
        inputs, grain = block.shapes[path][1], layer.format.weight.granularity
        size = grain.size if isinstance(grain, PerGroup) else grain.cols if isinstance(grain, Block) else inputs
        if inputs % size:
            where.setdefault((size, inputs), []).append(block.resolved.linears[path])
    return [
        f"group size {size} does not divide the {inputs} inputs of {', '.join(dict.fromkeys(roles))} ({len(roles)} layers): "
        + (f"the last group of each row holds {inputs % size}" if size < inputs else "each row is one group")
        + f" (sizes that divide: {sizes_that_divide(inputs)}). "
        + f"lowbit runs that; {'no other file format holds it' if (size % _GGUF_BLOCK or inputs % _GGUF_BLOCK) else _GGUF_MAY}"
        for (size, inputs), roles in where.items()
    ]
