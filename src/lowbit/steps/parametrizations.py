"""Parametrizations: pure, trainable maps from a block's weights to new weights and attributes of drafts.

Learning and commit share one map: a loss uses ``forward(weights)``, and ``commit(state)`` folds with the same ``fold``.
Drafts do the rounding. A recipe names makers (frozen values: :class:`Scales`, :class:`Shifts`, :class:`ClipShares`,
..). A maker builds the module for one block and leaves out edges that cannot carry its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.architectures import Kind, ResolvedEdge, add_bias, fold, needs_bias
from lowbit.modules import DraftLinear
from lowbit.numerics import Clipped, Fixed, MinMax, Params, Statistic, extremes, serializable, straight_through
from lowbit.steps.effects import EdgeUse, Effects, Freedom
from lowbit.steps.rules import Midpoint, Smooth, TransformRule
from lowbit.steps.state import BlockState, Stats
from lowbit.steps.step import RunSizes
from lowbit.transforms import Scale, Shift

Weights = dict[str, Tensor]
SMALLEST_SCALE = 1e-2  # OmniQuant's truncation: a smaller learned scale overflows its inverse in half precision


class Parametrization(nn.Module):
    """A trainable map of one block's weights and drafts.

    ``forward`` maps weights by name to weights by name, and ``chosen`` gives other attributes of drafts. Neither
    changes the block. ``commit`` makes both permanent.
    """

    def forward(self, weights: Weights) -> Weights:
        return weights

    def chosen(self, path: str, w_OI: Tensor) -> dict[str, Any]:
        """Attributes that this map sets on the draft at ``path``, by name. ``w_OI`` is its weight after ``forward``."""
        return {}

    def simulated(self, state: BlockState) -> AbstractContextManager[None]:
        """While open, the block computes with what this map chooses beside weights and attributes of drafts."""
        return nullcontext()

    def constrain(self) -> None:
        """Clamps parameters to their legal region after a gradient step."""

    def commit(self, state: BlockState) -> None:
        """Writes the result into the block and its drafts."""
        raise NotImplementedError


class Maker(Effects):
    """Builds a parametrization for one block, and declares its effects.

    Subclasses are frozen dataclasses with a learning rate ``lr``.
    """

    lr: float

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        """The parametrization of one block. ``stats`` holds the statistics in ``needs``, by shared input."""
        raise NotImplementedError

    def memory(self, sizes: RunSizes, batch: int) -> float:
        """Bytes that a pass of ``batch`` windows with it takes beside copies of the weights and activations of linears."""
        return 0


class _EdgeTransforms(Parametrization):
    """One vector for each edge; ``of`` (Scale or Shift) makes the transform from it."""

    def __init__(self, kind: Kind, of: type, edges: list[ResolvedEdge], starts: list[Tensor]):
        super().__init__()
        self.kind, self.of, self.edges = kind, of, edges
        self.vectors = nn.ParameterList(nn.Parameter(start.float().clone()) for start in starts)

    def forward(self, weights: Weights) -> Weights:
        for edge, vector in zip(self.edges, self.vectors, strict=True):
            weights = {**weights, **fold(edge, self.of(vector), weights)}
        return weights

    @torch.no_grad()
    def constrain(self) -> None:
        if self.kind is not Kind.SCALE:
            return
        for edge, vector in zip(self.edges, self.vectors, strict=True):
            small = vector.abs() < SMALLEST_SCALE
            sign = torch.ones_like(vector) if edge.positive else torch.where(vector < 0, -1.0, 1.0)
            vector.copy_(torch.where(small | (edge.positive & (vector < 0)), SMALLEST_SCALE * sign, vector))

    def commit(self, state: BlockState) -> None:
        for edge, vector in zip(self.edges, self.vectors, strict=True):
            state.commit(edge, self.of(vector.detach()), self.kind)


def _at_edges(state: BlockState, stats: dict[str, Stats], at: tuple[str, ...], rule: TransformRule):
    """Edges in ``at`` that carry the rule's kind, each with the rule's transform."""
    for edge in state.edges(at, rule.kind):
        start = rule(state, edge, stats)
        if start is None:
            state.note(f"saw no token: no {rule.kind.value} is learned at this edge", at=edge.name)
        else:
            yield edge, start


@serializable
@dataclass(frozen=True)
class Scales(Maker):
    """A learned scale at every edge in ``at``.

    It starts from ``init``, and from 1 at edges without consumers (query and key).
    """

    at: tuple[str, ...]
    init: TransformRule = Smooth(0.5)
    lr: float = 5e-3

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.init.needs

    @property
    def transforms(self) -> tuple[EdgeUse, ...]:
        return (EdgeUse(Kind.SCALE, self.at, self.init, measured=False),)

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        edges, starts = [], []
        for edge in state.edges(self.at, Kind.SCALE):
            start = self.init(state, edge, stats) if edge.consumers else Scale(torch.ones(edge.channels))
            if start is not None:
                edges.append(edge)
                starts.append(start.s)  # pyright: ignore[reportAttributeAccessIssue]
        module = _EdgeTransforms(Kind.SCALE, Scale, edges, starts)
        module.constrain()
        return module


@serializable
@dataclass(frozen=True)
class Shifts(Maker):
    """A learned shift at every edge in ``at`` that can carry one. It starts from ``init``."""

    at: tuple[str, ...]
    init: TransformRule = Midpoint()
    lr: float = 5e-3

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.init.needs

    @property
    def transforms(self) -> tuple[EdgeUse, ...]:
        return (EdgeUse(Kind.SHIFT, self.at, self.init),)

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        edges = list(_at_edges(state, stats, self.at, self.init))
        for edge, _ in edges:
            add_bias(state.block, needs_bias(edge, Kind.SHIFT))
        starts = [start.d for _, start in edges]  # pyright: ignore[reportAttributeAccessIssue]
        return _EdgeTransforms(Kind.SHIFT, Shift, [edge for edge, _ in edges], starts)


class _Clip(Parametrization):
    """Two logits for each granule of every linear. The range is ``[sigmoid(lower) * min, sigmoid(upper) * max]``."""

    def __init__(self, state: BlockState, init: float):
        super().__init__()
        drafts = state.drafts
        self.paths, sizes = list(drafts), [_granules(draft) for draft in drafts.values()]
        self.lower = nn.ParameterList(nn.Parameter(torch.full((size, 1), init)) for size in sizes)
        self.upper = nn.ParameterList(nn.Parameter(torch.full((size, 1), init)) for size in sizes)

    def chosen(self, path: str, w_OI: Tensor) -> dict[str, Any]:
        i = self.paths.index(path)
        return {"range_shares": Clipped(self.lower[i].sigmoid(), self.upper[i].sigmoid())}

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        for path in self.paths:
            draft = state.draft(path)
            draft.range_shares = self.chosen(path, draft.weight)["range_shares"]


@serializable
@dataclass(frozen=True)
class ClipShares(Maker):
    """Learned weight clipping at both ends of every granule's range (OmniQuant, arXiv:2308.13137, section 3.2).

    ``init`` is the logit at the start. 4.0 gives a share of 0.982.
    """

    init: float = 4.0
    lr: float = 1e-2

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.WEIGHT_RANGES})

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        return _Clip(state, self.init)


def _granules(draft: DraftLinear) -> int:
    assert draft.format is not None
    rows, columns = draft.format.weight.granularity.param_shape(tuple(draft.weight.shape))
    return rows * columns


class _Rounding(Parametrization):
    """An offset V in grid steps, added before rounding, and two shares of the range for each granule."""

    def __init__(self, state: BlockState):
        super().__init__()
        drafts = state.drafts
        self.paths, self.specs = list(drafts), {p: form.weight for p, form in state.formats.items() if p in drafts}
        sizes = [_granules(draft) for draft in drafts.values()]
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(tuple(d.weight.shape))) for d in drafts.values())
        self.lower = nn.ParameterList(nn.Parameter(torch.ones(size, 1)) for size in sizes)
        self.upper = nn.ParameterList(nn.Parameter(torch.ones(size, 1)) for size in sizes)
        self._ends: dict[str, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def _extremes(self, path: str, w_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Of each granule; found once for a weight that no other map moves, as every step then has the same tensor."""
        known, ends = self._ends.get(path, (None, None))
        if known is not w_OI or ends is None:
            ends = extremes(self.specs[path].granularity.split(w_OI))
            if not w_OI.requires_grad:
                self._ends[path] = w_OI, ends
        return ends

    def chosen(self, path: str, w_OI: Tensor) -> dict[str, Any]:
        """The grid's parameters as they are stored, and V times the grid's step."""
        i, spec = self.paths.index(path), self.specs[path]
        grain, (lo_G1, hi_G1) = spec.granularity, self._extremes(path, w_OI)
        placed = spec.grid.from_range(lo_G1 * self.lower[i], hi_G1 * self.upper[i])  # pyright: ignore[reportAttributeAccessIssue]
        raw: Params = placed._make(None if p is None else p.detach() for p in placed)
        stored = spec.as_stored(raw, grain.param_shape(tuple(w_OI.shape))[1])
        offset_GK = grain.split(self.offsets[i]) * stored.scale  # pyright: ignore[reportAttributeAccessIssue]
        scale = straight_through(stored.scale, placed.scale)  # pyright: ignore[reportAttributeAccessIssue]
        offset_OI = grain.join(offset_GK, tuple(w_OI.shape))
        return {"range_shares": Fixed(placed._replace(scale=scale)), "rounding_offset": offset_OI}

    @torch.no_grad()
    def constrain(self) -> None:
        for offset in self.offsets:
            offset.clamp_(-0.5, 0.5)
        for share in (*self.lower, *self.upper):
            share.clamp_(SMALLEST_SCALE, 1)

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        for path in self.paths:
            draft = state.draft(path)
            for name, value in self.chosen(path, draft.weight).items():
                setattr(draft, name, value)


@serializable
@dataclass(frozen=True)
class Rounding(Maker):
    """Learned rounding (SignRound, arXiv:2309.05516, section 3), for ``Learn(descent="sign")``.

    Each weight moves by up to half a step before it is rounded, and both ends of every range may shrink. The authors'
    ``lr`` is 1 / steps.
    """

    lr: float = 5e-3

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.WEIGHT_RANGES, Freedom.ROUNDING})

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        for path in state.drafts:
            if not state.formats[path].weight.settles:
                raise ValueError(f"{state.full_name(path)}: learned rounding needs scales that are stored as they are")
        return _Rounding(state)


class _StepSizes(Parametrization):
    """All scales of every granule, in units of their start; zero points stay."""

    def __init__(self, state: BlockState):
        super().__init__()
        self.starts: dict[str, Params] = {}
        self.names: dict[str, list[str]] = {}
        for path, draft in state.drafts.items():
            assert draft.format is not None
            spec, fit = draft.format.weight, draft.range_shares or MinMax()
            self.starts[path] = fit(spec.granularity.split(draft.weight.detach()), spec.grid)  # pyright: ignore[reportArgumentType]
            self.names[path] = [field.name for field in spec.grid.fields if field.floored]
        sizes = [getattr(self.starts[path], name) for path, names in self.names.items() for name in names]
        self.shares = nn.ParameterList(nn.Parameter(torch.ones_like(size)) for size in sizes)

    def chosen(self, path: str, w_OI: Tensor) -> dict[str, Any]:
        first = sum(len(names) for names in list(self.names.values())[: list(self.names).index(path)])
        start = self.starts[path]
        moved = {name: getattr(start, name) * self.shares[first + i] for i, name in enumerate(self.names[path])}
        return {"range_shares": Fixed(start._replace(**moved))}

    @torch.no_grad()
    def constrain(self) -> None:
        for share in self.shares:
            share.clamp_(min=SMALLEST_SCALE)

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        for path in self.names:
            draft = state.draft(path)
            draft.range_shares = self.chosen(path, draft.weight)["range_shares"]


@serializable
@dataclass(frozen=True)
class StepSizes(Maker):
    """A learned step of every granule (LSQ, arXiv:1902.08153; EfficientQAT, arXiv:2407.11062), for grids that a range places.

    It starts at the range that a step before chose, or at the extremes. ``lr`` is in units of the start. EfficientQAT's code learns
    zero points too, at a rate at which none comes to another code in its number of steps; here they stay.
    """

    lr: float = 2.5e-3

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.WEIGHT_RANGES})

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        return _StepSizes(state)


class Differences(Parametrization):
    """A difference for each parameter of the block that ``wanted`` selects, zero at the start."""

    def __init__(self, block: nn.Module, wanted: Callable[[Tensor], bool]):
        super().__init__()
        named = {name: p for name, p in block.named_parameters() if wanted(p)}
        self.names = list(named)
        self.deltas = nn.ParameterList(nn.Parameter(torch.zeros_like(p)) for p in named.values())

    def forward(self, weights: Weights) -> Weights:
        moved = {name: weights[name] + delta for name, delta in zip(self.names, self.deltas, strict=True)}
        return {**weights, **moved}

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        state.write(self({name: state.block.get_parameter(name) for name in self.names}))


@serializable
@dataclass(frozen=True)
class AllWeights(Maker):
    """Every parameter of the block: weights, biases, norms (layer-by-layer distillation, ZeroQuant, arXiv:2206.01861).

    The report's errors of single linears are then distances from the learned weights, not from the original ones.
    """

    lr: float = 5e-6

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        return Differences(state.block, Tensor.is_floating_point)
