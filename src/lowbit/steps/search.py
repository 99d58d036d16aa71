"""Search: tries candidates and keeps the one with the least error."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch

from lowbit.architectures import Kind, Port, ResolvedEdge
from lowbit.modules import DraftLinear, SharedInput
from lowbit.numerics import (
    AbsSum,
    Range,
    Statistic,
    mean_abs,
    serializable,
)
from lowbit.steps.effects import EdgeUse
from lowbit.steps.judging import condensed, least_error
from lowbit.steps.listen import Call, Place, listen, recording
from lowbit.steps.rules import Smooth, guard_dead
from lowbit.steps.state import BlockState, Stats
from lowbit.steps.step import FLOAT, RunSizes, Step
from lowbit.transforms import ChannelTransform, Scale


@runtime_checkable
class Candidates(Protocol):
    """Transforms to try at one edge; none if its activation saw no token.

    The identity comes first, so the best is never worse than no transform.
    """

    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[Statistic]]

    @property
    def count(self) -> int:
        """The usual number of candidates for one edge."""
        ...

    def __call__(
        self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]
    ) -> Sequence[ChannelTransform]: ...


@serializable
@dataclass(frozen=True)
class MeanAbsPower:
    """``s = mean|x|**r`` with r = 0, 1/grid, .. (grid-1)/grid, divided by ``sqrt(max s * min s)`` (AWQ, arXiv:2306.00978)."""

    grid: int = 20
    kind: ClassVar[Kind] = Kind.SCALE
    needs: ClassVar[frozenset[Statistic]] = frozenset({AbsSum()})

    @property
    def count(self) -> int:
        return self.grid

    def __call__(self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]) -> Sequence[Scale]:
        total = state.edge_stat(edge, stats, AbsSum())
        if total is None:
            return ()
        mean = edge.reduce_mean(mean_abs(total))
        powers = (mean.pow(i / self.grid).clamp(min=1e-4) for i in range(self.grid))
        return [Scale(guard_dead(s / (s.max() * s.min()).sqrt(), mean)) for s in powers]


@serializable
@dataclass(frozen=True)
class SmoothPowers:
    """The identity, then SmoothQuant's scales (arXiv:2211.10438, equation 4) with alpha = 0, 1/grid, .. 1.

    ``s = max|x|**alpha / max|w|**(1 - alpha)``. The authors search one alpha for the whole model; here every edge has
    its own.
    """

    grid: int = 20
    kind: ClassVar[Kind] = Kind.SCALE
    needs: ClassVar[frozenset[Statistic]] = Smooth.needs

    def __post_init__(self):
        if self.grid < 1:
            raise ValueError(f"a grid of alphas has at least one step, found {self.grid}")

    @property
    def count(self) -> int:
        return self.grid + 2

    def __call__(self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]) -> Sequence[Scale]:
        scales = [Smooth(i / self.grid)(state, edge, stats) for i in range(self.grid + 1)]
        if scales[0] is None:
            return ()
        return [Scale(torch.ones_like(scales[0].s)), *(scale for scale in scales if scale is not None)]


@serializable
@dataclass(frozen=True)
class Thresholds:
    """``s = max(1, max|x| / t)`` for a threshold t (Outlier Suppression+, arXiv:2304.09145).

    Only channels beyond t are scaled.

    t falls from the largest magnitude of all channels, which scales none, to ``smallest`` in equal steps: ``grid`` of
    them, or more if a step would be wider than ``widest`` (section 4.2, and the authors' code, whose ``smallest`` is
    1.0 for OPT and BLOOM and 0.1 for LLaMA). It ends at a tenth of the largest magnitude if that is less than
    ``smallest``.
    """

    grid: int = 100
    smallest: float = 0.1
    widest: float = 0.5
    kind: ClassVar[Kind] = Kind.SCALE
    needs: ClassVar[frozenset[Statistic]] = frozenset({Range()})

    def __post_init__(self):
        if self.grid < 1 or self.smallest <= 0 or self.widest <= 0:
            raise ValueError(f"thresholds need grid >= 1, smallest > 0 and widest > 0, found {self}")

    @property
    def count(self) -> int:
        return self.grid + 1

    def __call__(self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]) -> Sequence[Scale]:
        bounds = state.edge_stat(edge, stats, Range())
        if bounds is None:
            return ()
        lo, hi = edge.reduce_min(bounds[0]).float(), edge.reduce_max(bounds[1]).float()
        magnitude = torch.maximum(-lo, hi).clamp(min=0)
        largest = float(magnitude.max())
        if largest == 0:
            return [Scale(torch.ones_like(magnitude))]
        number = max(self.grid, int(largest / self.widest))
        last = min(self.smallest, largest / 10)
        thresholds = (largest - i * (largest - last) / number for i in range(number + 1))
        return [Scale((magnitude / t).clamp(min=1)) for t in thresholds]


_WEIGHT_COPIES = 3  # of the weights of an edge's consumers, while candidates are tried


@serializable
@dataclass(frozen=True)
class Search(Step):
    """Tries ``candidates`` at every edge in ``at`` and folds the one with the least output error.

    The error is the squared difference of the output of the edge's judge module. The edge's consumers run quantized,
    activations included; static activations use the range of all calibration windows.

    Args:
        candidates: makes the transforms to try.
        at: patterns of edge names.
        windows: calibration windows on which candidates are judged; None: all.
        by: ``"judge"``, or ``"linears"`` for the error of the quantized consumers' own outputs.
        in_turn: search edges in the order of computation and fold each at once; linears before an edge run as they will
            be quantized. Otherwise every edge is searched on the unchanged block and the winners are folded at the end,
            as in AWQ's reference.
        certain: the sums of all windows decide for each candidate. Otherwise candidates whose lag chance cannot explain are given
            up after a part of the windows (:mod:`lowbit.steps.race`); the choice is nearly always the same.
    """

    candidates: Candidates
    at: tuple[str, ...]
    windows: int | None = None
    by: Literal["judge", "linears"] = "judge"
    in_turn: bool = False
    certain: bool = False

    def __post_init__(self):
        if self.by not in ("judge", "linears"):
            raise ValueError(f"a search judges by 'judge' or 'linears', found {self.by!r}")

    @property
    def simulates(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.candidates.needs

    @property
    def transforms(self) -> tuple[EdgeUse, ...]:
        return (EdgeUse(self.candidates.kind, self.at, self.candidates),)

    def memory(self, sizes: RunSizes) -> float:
        """Bytes of the judges' calls over the calibration windows, and of copies of one edge's consumers."""
        edges, quantized = self.transforms[0].legal_edges(sizes.block.resolved), sizes.block.layers
        judges = {place.module for edge in edges for place in self._judges(quantized, edge)}
        consumers = [{port.module for port in edge.consumers} & quantized.keys() for edge in edges]
        largest = max((sum(prod(sizes.shapes[path]) for path in paths) for paths in consumers), default=0)
        return sizes.judged_bytes(judges, self.windows) + _WEIGHT_COPIES * largest * FLOAT

    def ticks(self, windows: int, linears: int) -> int:
        return windows * (len(self.at) if self.in_turn else 1) + self.candidates.count * len(self.at)

    @torch.no_grad()
    def run(self, state: BlockState) -> None:
        edges = [edge for edge in state.edges(self.at, self.candidates.kind) if edge.consumers]
        if not self.in_turn:
            self._search(state, edges)
            return
        for edge in sorted(edges, key=lambda edge: _stage(state, edge)):
            drafts = state.drafts
            before = (path for stage in state.resolved.stages[: _stage(state, edge)] for path in stage)
            self._search(state, [edge], [drafts[path] for path in before if path in drafts])

    def _search(self, state: BlockState, edges: list[ResolvedEdge], before: Iterable[DraftLinear] = ()) -> None:
        """Finds the best transform of each edge, then folds them all.

        Linears in ``before`` are simulated while inputs are recorded.
        """
        static = any(form.act is not None and form.act.static for form in state.formats.values())
        with ExitStack() as stack:
            once = SharedInput()
            for draft in before:
                stack.enter_context(draft.simulated(inputs=once))
            read = {port.module for edge in edges for port in edge.consumers} if static else set()
            inputs = {shared.name for shared in state.resolved.shared_inputs if read & set(shared.readers)}
            inputs |= {name for edge in edges for name in edge.inputs}
            needs = self.needs | ({Range()} if static else frozenset())
            stats, calls = self._recorded(state, needs, inputs, edges)
        winners = []
        for edge in edges:
            tried = self.candidates(state, edge, stats)
            judging = [call for place in self._judges(state.drafts, edge) for call in calls if call.place == place]
            if not tried or not judging:
                state.note("saw no token: nothing was searched at this edge", at=edge.name)
                continue
            trial = partial(self._simulated, state, edge, stats)
            pieces = condensed(state, judging, len(tried), self.certain)
            winners.append((edge, least_error(state, pieces, tried, trial, self.certain)))
        for edge, transform in winners:
            state.commit(edge, transform, self.candidates.kind)

    def _recorded(
        self, state: BlockState, needs: frozenset[Statistic], inputs: set[str], edges: list[ResolvedEdge]
    ) -> tuple[dict[str, Stats], list[Call]]:
        """Statistics of all windows, and the judges' calls: from one pass where that is less work."""
        assert state.io is not None
        places = [place for edge in edges for place in self._judges(state.drafts, edge)]
        few = self.windows is not None and 2 * self.windows < len(state.io)
        if few or not any(need.of_input for need in needs):
            return state.collect(needs, inputs), listen(state, places, self.windows)
        with recording(state, places, self.windows) as recorder:
            stats = state.collect(needs, inputs, around=recorder.window)
        return stats, recorder.calls

    def _judges(self, quantized: Container[str], edge: ResolvedEdge) -> list[Place]:
        if self.by == "judge":
            return [Place(edge.judge)]
        return [Place(port.module) for port in edge.consumers if port.module in quantized]

    @contextmanager
    def _simulated(
        self,
        state: BlockState,
        edge: ResolvedEdge,
        stats: Mapping[str, Stats],
        transform: ChannelTransform,
    ) -> Iterator[None]:
        """While open, the edge's consumers run quantized behind the ``transform``."""
        read: dict[str, SharedInput] = {}
        inputs = {path: shared.name for shared in state.resolved.shared_inputs for path in shared.readers}
        with ExitStack() as stack:
            for port in (port for port in edge.consumers if port.module in state.drafts):
                bounds, draft = state.stats_of(stats, port.module).get(Range()), state.draft(port.module)
                once = read.setdefault(inputs[port.module], SharedInput()) if port.expand is None else None
                stack.enter_context(draft.simulated(at_port(transform, port), bounds, inputs=once))
            yield


def _stage(state: BlockState, edge: ResolvedEdge) -> int:
    """The index of the stage that computes the edge's first consumer. Routers belong to no stage."""
    paths = {port.module for port in edge.consumers}
    return next(i for i, stage in enumerate(state.resolved.stages) if paths & set(stage))


def at_port(transform: ChannelTransform, port: Port) -> ChannelTransform:
    """``transform``, a scale of the free channels, with the channels of the consumer ``port``."""
    assert isinstance(transform, Scale)
    return transform if port.expand is None else Scale(transform.s[port.expand])
