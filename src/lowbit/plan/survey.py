"""A recipe laid over a model: which format every linear gets, and where every transform goes, before any work.

All of it follows from config.json and the headers of the shards: the model is made on the meta device, where shapes are
known and nothing is allocated. A plan and an explanation are two readings of one survey, and a survey uses the same
functions as the walk (rules, resolved edges, buffer layouts), so that what is foretold is what will be done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.architectures import (
    Architecture,
    Kind,
    ResolvedBlock,
    ResolvedEdge,
    block_modules,
    for_config,
    needs_bias,
    resolve,
)
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.modules import (
    LinearDescription,
    LinearFormat,
    PartDescription,
    ResidualRotation,
    serialize_transforms,
    weight_shape,
)
from lowbit.recipes import Recipe, as_recipe
from lowbit.steps import Cluster, Incoherence, Learn, LowRankCorrection, RotateInputs, SearchReassembly
from lowbit.steps.parametrizations import Maker
from lowbit.steps.rotation import residual_step


@dataclass(frozen=True)
class EdgeUse:
    """A transform that a step declares: ``rule`` (a rule or candidates) makes one of ``kind`` at edges matching ``at``.

    ``measured``: it starts from what the edge's consumers read, so an edge without consumers has nothing to start from.
    """

    kind: Kind
    at: tuple[str, ...]
    rule: Any
    measured: bool


@dataclass(frozen=True, eq=False)
class SurveyedBlock:
    """One block on the meta device. ``formats``: of the linears to be quantized, by path in the block; ``gathers``: what those
    describe that put the channels of their input in another order."""

    name: str
    module: nn.Module
    resolved: ResolvedBlock
    formats: dict[str, LinearFormat]
    gathers: dict[str, tuple[PartDescription, ...]] = field(default_factory=dict)

    def shape(self, path: str) -> tuple[int, int]:
        """``(O, I)`` of a linear."""
        return weight_shape(self.module.get_submodule(path))


@dataclass(frozen=True, eq=False)
class Survey:
    """A checked pair of model and recipe. ``linears``: full name -> role of all linears in blocks."""

    source: ModelSource
    recipe: Recipe
    architecture: Architecture
    model: PreTrainedModel
    blocks: tuple[SurveyedBlock, ...]

    @property
    def linears(self) -> dict[str, str]:
        return {f"{block.name}.{path}": role for block in self.blocks for path, role in block.resolved.linears.items()}

    def description(self, block: SurveyedBlock, path: str) -> LinearDescription:
        """The description of the packed linear that will be stored, but for a column order that its solver may add; with
        as many channels copied as a search may choose."""
        form, linear = block.formats[path], block.module.get_submodule(path)
        dtype = torch.float32 if self.source.dtype == torch.float64 else self.source.dtype
        biased = getattr(linear, "bias", None) is not None or path in self.new_biases(block)
        (rows, columns), pre = block.shape(path), block.gathers.get(path, ())
        post: tuple[PartDescription, ...] = ()
        side_terms: tuple[PartDescription, ...] = ()
        for step in self.recipe.steps:
            if isinstance(step, SearchReassembly):
                added, columns = step.described(block.resolved, path, columns)
                pre += added
            elif isinstance(step, RotateInputs):
                pre += step.described(block.resolved, path, columns, block.formats, self.rotated)
            elif isinstance(step, Incoherence):
                of_input, post = step.described(rows, columns)
                pre += of_input
            elif isinstance(step, Learn):
                for maker in step.makers:
                    if isinstance(maker, LowRankCorrection) and not maker.fold:
                        side_terms += maker.described(rows, columns)
        return LinearDescription(
            form.weight, (rows, columns), dtype if biased else None, form.act, pre, post, side_terms
        )

    @property
    def residual(self) -> ResidualRotation | None:
        """The rotation of the residual stream, where the recipe asks for one and the architecture has it."""
        step = residual_step(self.recipe.steps, (block.resolved.residual for block in self.blocks))
        width = self.source.config.get_text_config().hidden_size
        return (
            None if step is None else ResidualRotation(self.architecture.blocks, step.rotation(width, self.recipe.seed))
        )

    @property
    def rotated(self) -> bool:
        """Whether the residual stream is rotated."""
        return self.residual is not None

    @property
    def searched_channels(self) -> bool:
        """Whether a search decides how many channels layers copy, so that less may be stored than is described."""
        return any(isinstance(step, SearchReassembly) and step.ratio for step in self.recipe.steps)

    def new_biases(self, block: SurveyedBlock) -> set[str]:
        """Paths of the linears that a shift gives a bias."""
        shifts = [use for step in self.recipe.steps for use in edge_uses(step) if use.kind is Kind.SHIFT]
        legal = (edge for use in shifts for edge, _, why_not in edges_of(use, block) if edge and not why_not)
        return {path for edge in legal for path in needs_bias(edge, Kind.SHIFT)}

    def order_bytes(self, block: SurveyedBlock, path: str) -> int:
        """Bytes of the column order that the solver may store with a linear: an int32 for each input channel."""
        shape = block.shape(path)
        several = block.formats[path].weight.granularity.param_shape(shape)[1] > 1
        return 4 * shape[1] if several and self.recipe.steps[-1].solver.moves_groups else 0


def survey(model: str | PathLike[str], recipe: Recipe | str | Path | dict[str, Any]) -> Survey:
    """Opens ``model`` without weights and checks ``recipe`` against it.

    Raises:
        ValueError: a recipe that this version cannot carry out; a model that cannot be opened or is quantized already; a rule that matches no layer; a format that a
            layer cannot have, with the layer's name.
    """
    recipe = as_recipe(recipe)
    recipe.check_runs()
    source = open_model(model, allow_quantized=True)
    _refuse_quantized(source)
    architecture, skeleton = for_config(source.config), source.skeleton(unfuse=True)
    blocks = []
    for i, module in enumerate(block_modules(skeleton, architecture)):
        name, resolved = f"{architecture.blocks}.{i}", resolve(architecture, module, source.config)
        block = SurveyedBlock(name, module, resolved, recipe.scheme.formats(resolved, name))
        blocks.append(_with_clusters(block, recipe))
    found = Survey(source, recipe, architecture, skeleton, tuple(blocks))
    recipe.scheme.check_matches(found.linears)
    for block in found.blocks:
        for path in block.formats:
            _check_format(found, block, path)
    return found


def _with_clusters(block: SurveyedBlock, recipe: Recipe) -> SurveyedBlock:
    for step in (step for step in recipe.steps if isinstance(step, Cluster)):
        widths = {path: block.shape(path)[1] for path in block.formats}
        formats, gathers = step.foreseen(block.resolved, block.formats, widths)
        described = {path: serialize_transforms.describe("pre", [order]) for path, order in gathers.items()}
        block = replace(block, formats=formats, gathers=described)
    return block


def _refuse_quantized(source: ModelSource) -> None:
    for config in (source.config, source.config.get_text_config()):
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
            raise ValueError(
                f"{source.name} is already quantized with {str(method)!r} (quantization_config in config.json); its weights "
                "are rounded, and quantizing them again would start from there. Plan the original model instead"
            )


def _check_format(found: Survey, block: SurveyedBlock, path: str) -> None:
    act, shape = block.formats[path].act, block.shape(path)
    try:
        found.description(block, path)
        if act is not None:
            act.spec.granularity.param_shape((1, shape[1]))
    except ValueError as error:
        raise ValueError(
            f"{block.name}.{path} ({shape[0]} x {shape[1]}) cannot have this format: {error}. Give it another one with an "
            f"override for {block.resolved.linears[path]!r}, or skip it"
        ) from error


# Edges


def edge_uses(step: Any) -> Iterator[EdgeUse]:
    """The transforms that a step, or a value in its fields, declares: patterns ``at`` beside something of a ``kind``."""
    values = [getattr(step, field.name) for field in dataclasses.fields(step)]
    if hasattr(step, "at"):
        rule = next(value for value in values if isinstance(getattr(value, "kind", None), Kind))
        yield EdgeUse(rule.kind, step.at, rule, measured=not isinstance(step, Maker))
    for value in values:
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part):
                yield from edge_uses(part)


def edges_of(use: EdgeUse, block: SurveyedBlock) -> Iterator[tuple[ResolvedEdge | None, str, str]]:
    """``(edge, its name or the pattern, why the transform is not applied there or "")``; a pattern may match no edge."""
    for pattern in use.at:
        found = [edge for edge in block.resolved.edges if fnmatch(edge.name, pattern)]
        if not found:
            yield None, pattern, "this architecture has no such edge"
        for edge in found:
            yield edge, edge.name, _why_not(use, edge)


def _why_not(use: EdgeUse, edge: ResolvedEdge) -> str:
    if use.kind not in edge.carries:
        if use.kind is Kind.SHIFT and any(port.norm and not port.has_bias for port in edge.producers):
            return "its norm has no bias to hold it"
        return f"a {use.kind.value} does not commute with what lies between its two sides"
    return "no linear reads it, so there is nothing to measure" if use.measured and not edge.consumers else ""


def edge_notes(found: Survey) -> list[str]:
    """Where the recipe asks for a transform that this model cannot have, one sentence for each edge and reason."""
    blocks_of: dict[tuple[Kind, str, str], set[str]] = {}
    for use in (use for step in found.recipe.steps for use in edge_uses(step)):
        for block in found.blocks:
            for _, name, why_not in edges_of(use, block):
                if why_not:
                    blocks_of.setdefault((use.kind, base_name(name), why_not), set()).add(block.name)
    return [
        f"the {kind.value} at edge {name!r} is not applied ({_blocks(len(blocks), len(found.blocks))}): {why_not}"
        for (kind, name, why_not), blocks in blocks_of.items()
    ]


def _blocks(count: int, total: int) -> str:
    return f"all {total} blocks" if count == total else f"{count} of {total} blocks"


def base_name(name: str) -> str:
    """The name of an edge or a shared input without the number of its expert."""
    head, _, last = name.rpartition(".")
    return head if head and last.isdigit() else name


# Bytes


def rest_of_block(found: Survey, block: SurveyedBlock) -> int:
    """Bytes of what a block stores beside its packed linears, in the checkpoint's dtype."""
    itemsize = found.source.dtype.itemsize
    state = {key: t for key, t in block.module.state_dict().items() if key.rpartition(".")[0] not in block.formats}
    added = sum(block.shape(path)[0] for path in found.new_biases(block) if path not in block.formats)
    return _bytes(state.values(), itemsize) + itemsize * added


def outside_names(found: Survey) -> list[str]:
    """Names of the tensors outside the blocks that are stored: of tied ones, one."""
    prefix, tied = f"{found.architecture.blocks}.", set(found.model.all_tied_weights_keys)
    return [key for key in found.model.state_dict() if not key.startswith(prefix) and key not in tied]


def outside_bytes(found: Survey, itemsize: int) -> int:
    """Bytes of everything outside the blocks, floating tensors at ``itemsize`` bytes an element."""
    state = found.model.state_dict()
    return _bytes((state[name] for name in outside_names(found)), itemsize)


def _bytes(tensors: Iterable[Any], itemsize: int) -> int:
    return sum(t.numel() * (itemsize if t.is_floating_point() else t.element_size()) for t in tensors)
