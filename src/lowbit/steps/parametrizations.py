"""Parametrizations: pure maps from a block's weights to new weights, with parameters that gradients can reach.

The same map is used while learning and at commit: ``forward(weights)`` for a loss, ``commit(state)`` folds with the
very same ``fold``. A recipe names them by their makers (frozen values: :class:`Scales`, :class:`Shifts`,
:class:`ClipShares`, ..); a maker builds the module for one block and drops the edges where its kind is not legal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.architectures import Kind, ResolvedEdge, add_bias, fold, needs_bias
from lowbit.numerics import Affine, Clipped, Fixed, Statistic, serializable
from lowbit.steps.effects import EdgeUse, Effects, Freedom
from lowbit.steps.rules import Midpoint, Smooth, TransformRule
from lowbit.steps.simulate import fake_weight
from lowbit.steps.state import BlockState, Stats, stored_as_OI
from lowbit.transforms import Scale, Shift

Weights = dict[str, Tensor]
SMALLEST_SCALE = 1e-2  # OmniQuant's truncation: a smaller learned scale overflows its inverse in half precision


class Parametrization(nn.Module):
    """Contract: ``forward`` maps weights by name to weights by name and changes nothing; ``commit`` makes it permanent."""

    def forward(self, weights: Weights) -> Weights:
        raise NotImplementedError

    def activations(self) -> dict[str, Affine]:
        """Parameters of static activations by linear, where this map has any to learn."""
        return {}

    def beside(self, path: str) -> Callable[[Tensor], Tensor] | None:
        """What linear ``path`` adds to its quantized product, of its input before that is quantized; None: nothing."""
        return None

    def constrain(self) -> None:
        """Brings parameters back into their legal region after a gradient step."""

    def commit(self, state: BlockState) -> None:
        raise NotImplementedError


class Maker(Effects):
    """Builds a parametrization for one block, and declares what learning it does. Subclasses are frozen dataclasses with a
    field ``lr``, the learning rate."""

    lr: float

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        """The parametrization of one block; ``stats``: what ``needs`` asks for, by shared input."""
        raise NotImplementedError


class _EdgeTransforms(Parametrization):
    """One vector for each edge; ``of`` makes the transform (Scale or Shift) of it."""

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
    """Edges in ``at`` that carry the rule's kind, with what the rule gives there."""
    for edge in state.edges(at, rule.kind):
        start = rule(state, edge, stats)
        if start is None:
            state.note(f"edge {edge.name!r} saw no token: no {rule.kind.value} is learned there")
        else:
            yield edge, start


@serializable
@dataclass(frozen=True)
class Scales(Maker):
    """A scale at every edge in ``at``, starting from ``init``; edges without consumers (query and key) start from 1."""

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
    """A shift at every edge in ``at`` that can carry one, starting from ``init``."""

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
        found = list(_at_edges(state, stats, self.at, self.init))
        for edge, _ in found:
            add_bias(state.block, needs_bias(edge, Kind.SHIFT))
        starts = [start.d for _, start in found]  # pyright: ignore[reportAttributeAccessIssue]
        return _EdgeTransforms(Kind.SHIFT, Shift, [edge for edge, _ in found], starts)


class _Clip(Parametrization):
    """Two logits a granule of every linear; the range is ``[sigmoid(lower) * min, sigmoid(upper) * max]``."""

    def __init__(self, state: BlockState, init: float):
        super().__init__()
        self.state, self.paths = state, list(state.formats)
        sizes = [_granules(state, path) for path in self.paths]
        self.lower = nn.ParameterList(nn.Parameter(torch.full((size, 1), init)) for size in sizes)
        self.upper = nn.ParameterList(nn.Parameter(torch.full((size, 1), init)) for size in sizes)

    def shares(self, i: int) -> Clipped:
        return Clipped(self.lower[i].sigmoid(), self.upper[i].sigmoid())

    def forward(self, weights: Weights) -> Weights:
        changed = {}
        for i, path in enumerate(self.paths):
            linear, name = self.state.linear(path), f"{path}.weight"
            w_OI = stored_as_OI(linear, weights[name])
            fake = fake_weight(w_OI, self.state.formats[path].weight, self.shares(i))
            changed[name] = stored_as_OI(linear, fake)
        return {**weights, **changed}

    def commit(self, state: BlockState) -> None:
        for i, path in enumerate(self.paths):
            shares = self.shares(i)
            state.clip[path] = Clipped(shares.lo_share_G1.detach(), shares.hi_share_G1.detach())


class _Rounded(Parametrization):
    """Every linear as it would be quantized now, with the clip that earlier steps chose: what learning sees last."""

    def __init__(self, state: BlockState):
        super().__init__()
        self.state = state

    def forward(self, weights: Weights) -> Weights:
        changed = {}
        for path, form in self.state.formats.items():
            linear, name = self.state.linear(path), f"{path}.weight"
            fake = fake_weight(stored_as_OI(linear, weights[name]), form.weight, self.state.clip.get(path))
            changed[name] = stored_as_OI(linear, fake)
        return {**weights, **changed}

    def commit(self, state: BlockState) -> None:
        pass


def rounded(state: BlockState) -> Parametrization:
    """The quantization of all linears without anything to learn."""
    return _Rounded(state)


def quantizes(parametrization: Parametrization) -> bool:
    """Whether this map quantizes the weights itself."""
    return isinstance(parametrization, _Clip | _Rounding)


@serializable
@dataclass(frozen=True)
class ClipShares(Maker):
    """Learned weight clipping: both ends of every granule's range (OmniQuant, arXiv:2308.13137, section 3.2).

    ``init`` is the logit at the start: 4.0 is a share of 0.982.
    """

    init: float = 4.0
    lr: float = 1e-2

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.WEIGHT_RANGES})

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        return _Clip(state, self.init)


def _granules(state: BlockState, path: str) -> int:
    w_OI, grain = state.weight_OI(path), state.formats[path].weight.granularity
    rows, columns = grain.param_shape(tuple(w_OI.shape))
    return rows * columns


class _Rounding(Parametrization):
    """An offset V in steps of the grid, added before rounding, and two shares of the range for each granule."""

    def __init__(self, state: BlockState):
        super().__init__()
        self.state, self.paths = state, list(state.formats)
        shapes = [tuple(state.weight_OI(path).shape) for path in self.paths]
        sizes = [_granules(state, path) for path in self.paths]
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.lower = nn.ParameterList(nn.Parameter(torch.ones(size, 1)) for size in sizes)
        self.upper = nn.ParameterList(nn.Parameter(torch.ones(size, 1)) for size in sizes)

    def _placed(self, i: int, w_OI: Tensor) -> tuple[Tensor, Affine]:
        """Granules of the weight moved by V steps, and the grid's parameters, of the values they are stored as."""
        spec = self.state.formats[self.paths[i]].weight
        split = spec.granularity.split
        w_GK = split(w_OI)
        found = Clipped(self.lower[i], self.upper[i])(w_GK, spec.grid)  # pyright: ignore[reportArgumentType]
        stored = spec.as_stored(Affine(*(None if p is None else p.detach() for p in found)))  # pyright: ignore[reportArgumentType]
        scale = found.scale + (stored.scale - found.scale).detach()  # pyright: ignore[reportAttributeAccessIssue]
        return w_GK + split(self.offsets[i]) * scale.detach(), found._replace(scale=scale)

    def forward(self, weights: Weights) -> Weights:
        changed = {}
        for i, path in enumerate(self.paths):
            linear, name = self.state.linear(path), f"{path}.weight"
            spec, w_OI = self.state.formats[path].weight, stored_as_OI(linear, weights[name])
            moved_GK, params = self._placed(i, w_OI)
            fake_GK = spec.grid.fake(moved_GK, params)  # pyright: ignore[reportAttributeAccessIssue]
            changed[name] = stored_as_OI(linear, spec.granularity.join(fake_GK, tuple(w_OI.shape)))
        return {**weights, **changed}

    @torch.no_grad()
    def constrain(self) -> None:
        for offset in self.offsets:
            offset.clamp_(-0.5, 0.5)
        for share in (*self.lower, *self.upper):
            share.clamp_(SMALLEST_SCALE, 1)

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        for i, path in enumerate(self.paths):
            w_OI, grain = state.weight_OI(path), state.formats[path].weight.granularity
            moved_GK, params = self._placed(i, w_OI)
            state.clip[path] = Fixed(params)
            state.nudge[path] = grain.join(moved_GK, tuple(w_OI.shape)) - w_OI


@serializable
@dataclass(frozen=True)
class Rounding(Maker):
    """Learned rounding (SignRound, arXiv:2309.05516, section 3): every weight may be moved by up to half a step before it
    is rounded, and both ends of every range may shrink. Meant for ``Learn(descent="sign")``; authors: lr is 1 over the steps.
    """

    lr: float = 5e-3

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.WEIGHT_RANGES, Freedom.ROUNDING})

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        for path, form in state.formats.items():
            if form.weight.stats is not None:
                raise ValueError(f"{state.full_name(path)}: learned rounding needs scales that are stored as they are")
        return _Rounding(state)


class _AllWeights(Parametrization):
    """A difference to be added to each parameter of the block: zero at the start."""

    def __init__(self, block: nn.Module):
        super().__init__()
        named = {name: p for name, p in block.named_parameters() if p.is_floating_point()}
        self.names = list(named)
        self.deltas = nn.ParameterList(nn.Parameter(torch.zeros_like(p)) for p in named.values())

    def forward(self, weights: Weights) -> Weights:
        moved = {name: weights[name] + delta for name, delta in zip(self.names, self.deltas, strict=True)}
        return {**weights, **moved}

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        parameters, packed = state.weights(), {f"{path}.weight" for path in state.formats}
        for name, delta in zip(self.names, self.deltas, strict=True):
            value = parameters[name] + delta
            # What is not packed is stored as it is, so later steps have to see it rounded.
            parameters[name].copy_(value if name in packed else value.to(state.store_dtype).to(value.dtype))


@serializable
@dataclass(frozen=True)
class AllWeights(Maker):
    """Every parameter of the block: weights, biases and norms (layer-by-layer distillation, ZeroQuant, arXiv:2206.01861).

    What the report says of a single linear is then its distance from what was learned, not from the original.
    """

    lr: float = 5e-6

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        return _AllWeights(state.block)
