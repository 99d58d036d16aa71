"""ModelPlan: a recipe laid over a model and checked, once, before any weight is read.

A plan follows from config.json and the shard headers. The model is made on the meta device, with shapes and no memory.
The walk, Fisher information, ``plan``, ``explain`` and allocation all read this one object: blocks with the
architecture's table on them, the format of every linear, and how each will be stored after the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.architectures import (
    Architecture,
    Kind,
    ModelBlock,
    ResolvedBlock,
    attention_modules,
    check_attention,
    for_config,
    model_blocks,
)
from lowbit.caches import PackedCache, PackedLayer
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.modules import (
    LinearDescription,
    LinearFormat,
    OperandRanges,
    ResidualRotation,
    StoredRotation,
    weight_shape,
)
from lowbit.plan.kept import KeepDtype, Kept
from lowbit.plan.outside import OutsidePlan, plan_outside
from lowbit.recipes import Recipe, as_recipe
from lowbit.steps import BlockDescription, LayerDescription
from lowbit.steps.rotation import residual_rotation
from lowbit.transforms import Seeded

MIN_REACH = 0.9
"""Share of the weights in the blocks' matrices that must be in linears for a model to count as quantized."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """One block.

    Attributes:
        name: path in the model.
        module: the block on the meta device.
        resolved: the architecture's table on it.
        formats: formats of the linears to be quantized, by path in the block, as the recipe's rules give them.
        shapes: ``(O, I)`` of all its linears, by path.
        description: how the linears will be stored after the recipe's steps.
    """

    name: str
    module: nn.Module
    resolved: ResolvedBlock
    formats: dict[str, LinearFormat]
    shapes: dict[str, tuple[int, int]]
    description: BlockDescription

    @property
    def weights(self) -> int:
        """Weights in its linears."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def others(self) -> dict[str, int]:
        """Weights in its other matrices, by name: parameters of two or more dimensions, routers left out."""
        return {name: self.module.get_parameter(name).numel() for name in self.resolved.other_matrices}

    @property
    def unknown(self) -> dict[str, int]:
        """Those of :attr:`others` that are not of convolutions, which stay as they are."""
        owners = {name: self.module.get_submodule(name.rpartition(".")[0]) for name in self.others}
        return {n: size for n, size in self.others.items() if not isinstance(owners[n], nn.modules.conv._ConvNd)}

    @property
    def layers(self) -> Mapping[str, LayerDescription]:
        """How each linear to be quantized will be stored, by path."""
        return self.description.layers


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """A checked pair of a model and a recipe.

    Attributes:
        source: the original model; only its config and headers have been read.
        architecture: its table.
        model: its skeleton on the meta device, experts unfused.
        blocks: in order.
        rotation: of the residual stream, without the matrix of a learned one; None: not rotated.
        kept: dtypes of what is not quantized.
    """

    source: ModelSource
    recipe: Recipe
    architecture: Architecture
    model: PreTrainedModel
    blocks: tuple[BlockPlan, ...]
    rotation: Seeded | StoredRotation | None
    kept: Kept

    @cached_property
    def linears(self) -> dict[str, str]:
        """All linears in blocks: full name -> role."""
        return {f"{block.name}.{path}": role for block in self.blocks for path, role in block.resolved.linears.items()}

    @property
    def layers(self) -> Iterator[tuple[BlockPlan, str, LayerDescription]]:
        """Every linear to be quantized: its block, its path in the block, and how it will be stored."""
        for block in self.blocks:
            for path, layer in block.layers.items():
                yield block, path, layer

    @property
    def matrices(self) -> int:
        """Weights in all matrices of the blocks."""
        return sum(block.weights + sum(block.others.values()) for block in self.blocks)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Why no recipe can make a good result of this model."""
        linears = sum(block.weights for block in self.blocks)
        unknown = {name: size for block in self.blocks for name, size in block.unknown.items()}
        reach = linears / max(1, linears + sum(sum(block.unknown.values()) for block in self.blocks))
        if reach >= MIN_REACH:
            return ()
        largest = ", ".join(sorted(unknown, key=lambda name: -unknown[name])[:3])
        return (
            f"only {reach:.0%} of the blocks' weights are in linears; the others keep their precision, the largest of them "
            f"{largest}",
        )

    @property
    def bias_dtype(self) -> torch.dtype:
        """The dtype in which packed linears store biases."""
        return _bias_dtype(self.kept.dtype)

    def description(self, layer: LayerDescription) -> LinearDescription:
        """The description of a packed linear, without what its solver may add."""
        return layer.stored(self.bias_dtype)

    @cached_property
    def outside(self) -> OutsidePlan:
        """What is packed outside of the blocks."""
        return plan_outside(self.model, self.architecture, self.recipe.scheme, self.bias_dtype)

    @property
    def residual(self) -> ResidualRotation | None:
        """The rotation of the residual stream, as a checkpoint describes it."""
        return None if self.rotation is None else ResidualRotation(self.architecture.blocks, self.rotation)


def plan_model(
    model: str | PathLike[str] | PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    keep_dtype: KeepDtype = "auto",
    trust_remote_code: bool = False,
) -> ModelPlan:
    """Opens ``model`` without its weights and lays ``recipe`` over it.

    Raises:
        ValueError: as :func:`open_model` and :func:`lay_over`, and if this version cannot carry out the recipe.
    """
    recipe = as_recipe(recipe)
    return lay_over(open_model(model, trust_remote_code=trust_remote_code), recipe, keep_dtype)


def lay_over(source: ModelSource, recipe: Recipe, keep_dtype: KeepDtype = "auto") -> ModelPlan:
    """The plan of ``recipe`` on an opened model; ``keep_dtype`` as of :class:`Kept`.

    Raises:
        ValueError: a rule that matches no layer; a format that a layer cannot have, with the layer's name; quantized
            attention in a model whose attention code does not support it; formats of a cache that the model does not have.
    """
    return replan(source, for_config(source.config), source.skeleton(unfuse=True), recipe, keep_dtype)


def replan(
    source: ModelSource,
    architecture: Architecture,
    model: PreTrainedModel,
    recipe: Recipe,
    keep_dtype: KeepDtype = "auto",
) -> ModelPlan:
    """:func:`lay_over` for a model whose table and skeleton (experts unfused) exist already."""
    kept = Kept(source, keep_dtype)
    resolved = model_blocks(model, architecture, source.config)
    recipe.scheme.check_matches(
        {f"{block.name}.{path}": role for block in resolved for path, role in block.resolved.linears.items()}
    )
    text_config = source.config.get_text_config()
    streams = (block.resolved.residual for block in resolved)
    rotation = residual_rotation(recipe.steps, streams, text_config.hidden_size, recipe.seed)
    heads = _heads(text_config)
    blocks = tuple(_block_plan(kept, block, recipe, heads, rotation is not None) for block in resolved)
    plan = ModelPlan(source, recipe, architecture, model, blocks, rotation, kept)
    for block, path, layer in plan.layers:
        with _naming(block, path):
            plan.description(layer)
    _ = plan.outside  # refuses what the model's embedding or head cannot have
    if recipe.scheme.attention is not None:
        check_attention(model)
    if recipe.scheme.cache:
        cache = PackedCache(
            source.config, recipe.scheme.kv, recipe.scheme.kv_overrides
        )  # refuses what the model cannot have
        _check_calibrated(plan, cache)
    return plan


def _check_calibrated(plan: ModelPlan, cache: PackedCache) -> None:
    """Checks that attention can be listened to where the format of the cache needs it. Raises ValueError."""
    needy = {i for i, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer) and layer.spec.calibrated}
    if not needy:
        return
    what = "observed; choose a method for caches that needs no data"
    check_attention(plan.model, what)
    paths = (block.module.get_submodule(path) for block in plan.blocks for path in attention_modules(block.resolved))
    if missing := sorted(needy - {getattr(module, "layer_idx", None) for module in paths}):
        raise ValueError(
            f"{type(plan.model).__name__}: no module is known to attend in layers {missing[:5]}, so its queries, keys and values "
            f"cannot be {what}"
        )


def _block_plan(
    kept: Kept, block: ModelBlock, recipe: Recipe, heads: tuple[int, int, int, int], rotated: bool
) -> BlockPlan:
    linears = {path: block.module.get_submodule(path) for path in block.resolved.linears}
    shapes = {path: weight_shape(linear) for path, linear in linears.items()}
    formats = recipe.scheme.formats(block.resolved, block.name)
    layers = {
        path: LayerDescription(
            form,
            shapes[path],
            biased := linears[path]._parameters.get("bias") is not None,
            bias_dtype=_bias_dtype(kept.dtype_of(f"{block.name}.{path}.bias")) if biased else None,
        )
        for path, form in formats.items()
    }
    attention = {}
    if recipe.scheme.attention is not None:
        attention = dict.fromkeys(attention_modules(block.resolved), recipe.scheme.attention)
        if not attention:
            raise ValueError(f"{block.name} has no module that is known to attend; leave attention_bits out")
    description = BlockDescription(block.resolved, layers, rotated=rotated, attention=attention, heads=heads)
    plan = BlockPlan(block.name, block.module, block.resolved, formats, shapes, description)
    for path, layer in layers.items():
        with _naming(plan, path):
            layer.stored(torch.float32)
    for step in recipe.steps:
        description = step.describe(description)
    return replace(plan, description=description)


def _bias_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


@contextmanager
def _naming(block: BlockPlan, path: str) -> Iterator[None]:
    """While open, adds the layer's name to a ValueError about its format."""
    try:
        yield
    except ValueError as error:
        rows, columns = block.shapes[path]
        raise ValueError(
            f"{block.name}.{path} ({rows} x {columns}) cannot have its format: {error}. Give it another one with an override "
            f"for {block.resolved.linears[path]!r}, or skip it"
        ) from error


def _heads(config: Any) -> tuple[int, int, int, int]:
    """Query heads, key-value heads, channels of a key and of a value; ones where the model does not attend."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return 1, 1, 1, 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width, width


# Transforms at edges


def edge_notes(plan: ModelPlan) -> list[str]:
    """Transforms that the recipe asks for and this model cannot have: one sentence for each edge and reason."""
    blocks_of: dict[tuple[Kind, str, str], set[str]] = {}
    for use in (use for step in plan.recipe.steps for use in step.transforms):
        for block in plan.blocks:
            for edge, name, why_not in use.edges(block.resolved):
                if why_not and not (edge and use.runs_at(edge)):
                    blocks_of.setdefault((use.kind, base_name(name), why_not), set()).add(block.name)
    return [
        f"the {kind.value} at edge {name!r} is not applied ({_count(len(blocks), len(plan.blocks))}): {why_not}"
        for (kind, name, why_not), blocks in blocks_of.items()
    ]


def _count(blocks: int, total: int) -> str:
    return f"all {total} blocks" if blocks == total else f"{blocks} of {total} blocks"


def base_name(name: str) -> str:
    """The name of an edge or a shared input without its expert's number."""
    head, _, last = name.rpartition(".")
    return head if head and last.isdigit() else name


# Bytes


def layer_bytes(plan: ModelPlan, layer: LayerDescription) -> int:
    """Bytes of all tensors of a packed linear, including a column order."""
    return plan.description(layer).nbytes + layer.order_bytes


def rest_of_block(plan: ModelPlan, block: BlockPlan) -> int:
    """Bytes that a block stores apart from its packed linears.

    These are other tensors in the dtypes that they are kept in, and attention ranges.
    """
    state = {
        f"{block.name}.{key}": t
        for key, t in block.module.state_dict().items()
        if key.rpartition(".")[0] not in block.layers
    }
    added = sum(block.shapes[path][0] for path in block.description.biases if path not in block.layers)
    ranges = (OperandRanges(spec, "meta") for spec in block.description.attention.values() if spec.heads is not None)
    stored = sum(buffer.nbytes for module in ranges for buffer in module.buffers())
    if block is plan.blocks[0] and isinstance(plan.rotation, StoredRotation):
        stored += 4 * plan.rotation.size**2
    return _stored_bytes(plan, state) + plan.kept.dtype.itemsize * added + stored


def outside_names(plan: ModelPlan) -> list[str]:
    """Names of the stored tensors outside the blocks. Tied tensors are named once."""
    prefix, tied = f"{plan.architecture.blocks}.", set(plan.model.all_tied_weights_keys)
    return [key for key in plan.model.state_dict() if not key.startswith(prefix) and key not in tied]


def outside_bytes(plan: ModelPlan, itemsize: int | None = None) -> int:
    """Bytes of all tensors outside the blocks, as stored or with ``itemsize`` bytes for each element of floating tensors."""
    state = plan.model.state_dict()
    tensors = {name: state[name] for name in outside_names(plan)}
    if itemsize is not None:
        return _bytes(tensors.values(), itemsize)
    packed = plan.outside.stored
    others = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in packed}
    return _stored_bytes(plan, others) + sum(layer.nbytes for layer in packed.values())


def _stored_bytes(plan: ModelPlan, tensors: Mapping[str, Any]) -> int:
    """Bytes of tensors of the model, by name, in the dtypes that the result stores them in."""
    return sum(_bytes((t,), plan.kept.dtype_of(name).itemsize) for name, t in tensors.items())


def _bytes(tensors: Iterable[Any], itemsize: int) -> int:
    return sum(t.numel() * (itemsize if t.is_floating_point() else t.element_size()) for t in tensors)
