"""Declarations of a step: the transforms it applies, what it decides, and how the stored layers change.

Everything that reads a recipe without running it (the checks of combinations, the order of a mix, ``plan``,
``explain``) folds over these declarations. The defaults of :class:`Effects` declare nothing, so a step overrides only
what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from fnmatch import fnmatch
from typing import Any

import torch

from lowbit.architectures import Kind, ResolvedBlock, ResolvedEdge, needs_bias
from lowbit.modules import AttentionSpec, LinearDescription, LinearFormat, PartDescription, serialize_transforms
from lowbit.numerics import Statistic
from lowbit.transforms import ChannelTransform, Scale, Shift


class Freedom(Enum):
    """A decision that a step can take about a linear, and that a later step can disturb."""

    INPUT_RANGES = "static ranges of inputs"
    CHANNEL_ORDER = "the order of input channels"
    CHANNEL_BASIS = "input channels mixed at run time"
    WEIGHT_RANGES = "a range for each granule of a weight"
    CHANNEL_COPIES = "input channels split and merged at run time"
    CORRECTIONS = "low-rank corrections of the weights"
    ROUNDING = "the direction in which each weight is rounded"
    ATTENTION_RANGES = "static ranges of attention's operands"
    CODES = "codes: the linear is packed"


TRANSFORMING = frozenset(Freedom) - {Freedom.WEIGHT_RANGES, Freedom.ROUNDING, Freedom.CODES}
"""Decisions that a transform of channels disturbs. Weight ranges are shares of the extremes, so a fold moves them along."""


class MixOrder(IntEnum):
    """Where a mix of recipes puts a step: in its recipe's order, after all transforms, or last."""

    AS_GIVEN = 0
    AFTER_TRANSFORMS = 1
    LAST = 2


@dataclass(frozen=True)
class EdgeUse:
    """A transform that a step applies: ``rule`` makes one of ``kind`` at every edge whose name matches ``at``.

    Attributes:
        rule: a rule, or candidates.
        measured: the rule reads the inputs of the edge's consumers, so an edge without consumers gets no transform.
        run_time: also transform inputs that no edge with this kind covers; their linears run the transform and store
            it.
        dtype: dtype of a transform that a linear stores.
    """

    kind: Kind
    at: tuple[str, ...]
    rule: Any
    measured: bool = True
    run_time: bool = False
    dtype: torch.dtype = torch.float32

    def edges(self, resolved: ResolvedBlock) -> Iterator[tuple[ResolvedEdge | None, str, str]]:
        """All edges that match, as ``(edge, its name, why the transform is not applied there or "")``.

        A pattern that matches no edge gives ``(None, the pattern, why)``.
        """
        for pattern in self.at:
            matching = [edge for edge in resolved.edges if fnmatch(edge.name, pattern)]
            if not matching and not self.run_time:
                yield None, pattern, "this architecture has no such edge"
            for edge in matching:
                yield edge, edge.name, self._why_not(edge)

    def legal_edges(self, resolved: ResolvedBlock) -> list[ResolvedEdge]:
        """The edges at which the transform is applied."""
        return [edge for edge, _, why_not in self.edges(resolved) if edge is not None and not why_not]

    def runs_at(self, edge: ResolvedEdge) -> bool:
        """Whether linears run the transform on the inputs of an edge that cannot carry it."""
        return self.run_time and self.kind not in edge.carries

    def run_time_inputs(self, block: BlockDescription) -> dict[str, list[str]]:
        """Name of each input that is transformed at run time -> its readers that are to be quantized."""
        return uncovered_inputs(block.resolved, self.kind, block.layers) if self.run_time else {}

    def _why_not(self, edge: ResolvedEdge) -> str:
        if self.kind not in edge.carries:
            if self.kind is Kind.SHIFT and any(port.norm and not port.has_bias for port in edge.producers):
                return "its norm has no bias to hold it"
            return f"a {self.kind.value} does not commute with what lies between its two sides"
        return "no linear reads it, so there is nothing to measure" if self.measured and not edge.consumers else ""


def uncovered_inputs(resolved: ResolvedBlock, kind: Kind, quantized: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name of each input that no edge with ``kind`` covers -> its readers in ``quantized``, if it has any."""
    covered = {name for edge in resolved.edges if kind in edge.carries for name in edge.inputs}
    readers = {
        shared.name: [path for path in shared.readers if path in quantized]
        for shared in resolved.shared_inputs
        if shared.name not in covered
    }
    return {name: paths for name, paths in readers.items() if paths}


@dataclass(frozen=True)
class LayerDescription:
    """How one linear will be stored, as far as this is known before any weight is read.

    Attributes:
        format: formats of weight and input.
        shape: ``(O, I)``; I counts channels after the transforms that the layer runs on its input.
        biased: whether it has a bias.
        pre, post, side_terms: transforms of input and output that the layer runs, and terms added to its codes.
        ordered: its solver may store an order of its columns, an int32 for each.
        outliers: its solver keeps some weights in half precision; their number is known only when they are chosen.
        bias_dtype: of the bias in the checkpoint; None: that of most weights.
    """

    format: LinearFormat
    shape: tuple[int, int]
    biased: bool
    pre: tuple[PartDescription, ...] = ()
    post: tuple[PartDescription, ...] = ()
    side_terms: tuple[PartDescription, ...] = ()
    ordered: bool = False
    outliers: bool = False
    bias_dtype: torch.dtype | None = None

    @property
    def order_bytes(self) -> int:
        """Bytes of the column order that the solver may store."""
        return 4 * self.shape[1] if self.ordered else 0

    def stored(self, bias: torch.dtype) -> LinearDescription:
        """The description of the packed linear without what its solver may add; a bias without a dtype of its own is in ``bias``."""
        return LinearDescription(
            self.format.weight,
            self.shape,
            (self.bias_dtype or bias) if self.biased else None,
            self.format.act,
            self.pre,
            self.post,
            self.side_terms,
        )

    def running(self, *transforms: ChannelTransform, shape: tuple[int, int] | None = None) -> LayerDescription:
        """This layer with more transforms of its input. ``shape`` is the weight's shape after them; None: unchanged."""
        entries = serialize_transforms.describe("pre", transforms)
        return replace(self, pre=(*self.pre, *entries), shape=shape or self.shape)


@dataclass(frozen=True, eq=False)
class BlockDescription:
    """The linears of one block that are to be quantized, as they will be stored after the steps described so far.

    Attributes:
        resolved: the architecture's table on this block.
        layers: by path.
        biases: paths of all linears that gain a bias their model's class does not give them.
        rotated: whether the residual stream is rotated.
        attention: formats of attention's operands, by path of the attention module; with heads where ranges are stored.
        heads: query heads, key-value heads, channels of a key and of a value.
    """

    resolved: ResolvedBlock
    layers: Mapping[str, LayerDescription]
    biases: frozenset[str] = frozenset()
    rotated: bool = False
    attention: Mapping[str, AttentionSpec] = field(default_factory=dict)
    heads: tuple[int, int, int, int] | None = None

    def changed(self, layers: Mapping[str, LayerDescription]) -> BlockDescription:
        """This block with ``layers`` in place of the descriptions of the same paths."""
        return replace(self, layers={**self.layers, **layers})

    def with_biases(self, paths: frozenset[str]) -> BlockDescription:
        """This block with a bias in each linear of ``paths``."""
        gaining = {path: replace(layer, biased=True) for path, layer in self.layers.items() if path in paths}
        return replace(self.changed(gaining), biases=self.biases | paths)


class Effects:
    """The declarations of a step, or of a part of one. The defaults measure nothing and change nothing."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics of inputs and weights that it reads."""
        return frozenset()

    @property
    def transforms(self) -> tuple[EdgeUse, ...]:
        """The transforms that it applies at edges named by patterns."""
        return ()

    @property
    def kinds(self) -> frozenset[Kind]:
        """All kinds of transform that it applies."""
        return frozenset(use.kind for use in self.transforms)

    @property
    def fixes(self) -> frozenset[Freedom]:
        """Decisions that it takes and later steps must not disturb."""
        return frozenset()

    @property
    def disturbs(self) -> frozenset[Freedom]:
        """Decisions of earlier steps that do not hold after it."""
        return TRANSFORMING if self.kinds else frozenset()

    @property
    def cache_parts(self) -> frozenset[str]:
        """What it finds for the cache of the block's attention: buffers of :class:`~lowbit.modules.CacheCalibration`."""
        return frozenset()

    @property
    def simulates(self) -> bool:
        """Whether it tries formats out by running linears whose weights are rounded to them."""
        return False

    @property
    def mix_order(self) -> MixOrder:
        """Where a mix puts it."""
        return MixOrder.AS_GIVEN

    def describe(self, block: BlockDescription) -> BlockDescription:
        """``block`` as it will be stored after this step. Where this is open, the largest possible result."""
        for use in self.transforms:
            if use.kind is Kind.SHIFT:
                edges = use.legal_edges(block.resolved)
                block = block.with_biases(frozenset(path for edge in edges for path in needs_bias(edge, Kind.SHIFT)))
            for paths in use.run_time_inputs(block).values():
                block = _run_at_inputs(block, use, paths)
        return block


_AT_RUN_TIME = {Kind.SCALE: Scale, Kind.SHIFT: Shift}


def _run_at_inputs(block: BlockDescription, use: EdgeUse, paths: list[str]) -> BlockDescription:
    """``block`` whose linears at ``paths``, which read one input, run a transform of ``use`` on it."""
    if use.kind is Kind.SHIFT:
        block = block.with_biases(frozenset(paths) - {path for path in paths if block.layers[path].biased})
    vector = torch.ones((), dtype=use.dtype)
    layers = {path: block.layers[path] for path in paths}
    return block.changed(
        {p: layer.running(_AT_RUN_TIME[use.kind](vector.expand(layer.shape[1]))) for p, layer in layers.items()}
    )
