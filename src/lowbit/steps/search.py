"""Search: tries candidates and keeps the one with the least error."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.architectures import Kind, Port, ResolvedEdge
from lowbit.modules import DraftLinear
from lowbit.numerics import (
    AbsSum,
    Clipped,
    Gram,
    PerChannel,
    PerGroup,
    Range,
    Statistic,
    extremes,
    mean_abs,
    serializable,
)
from lowbit.steps.effects import EdgeUse, Freedom
from lowbit.steps.judging import condensed, least_error
from lowbit.steps.listen import Place, listen
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
    """

    candidates: Candidates
    at: tuple[str, ...]
    windows: int | None = None
    by: Literal["judge", "linears"] = "judge"
    in_turn: bool = False

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
            for draft in before:
                stack.enter_context(draft.simulated())
            read = {port.module for edge in edges for port in edge.consumers} if static else set()
            inputs = {shared.name for shared in state.resolved.shared_inputs if read & set(shared.readers)}
            inputs |= {name for edge in edges for name in edge.inputs}
            stats = state.collect(self.needs | ({Range()} if static else frozenset()), inputs)
            places = {place: None for edge in edges for place in self._judges(state.drafts, edge)}
            calls = listen(state, places, self.windows)
        winners = []
        for edge in edges:
            tried = self.candidates(state, edge, stats)
            judging = [call for place in self._judges(state.drafts, edge) for call in calls if call.place == place]
            if not tried or not judging:
                state.note("saw no token: nothing was searched at this edge", at=edge.name)
                continue
            trial = partial(self._simulated, state, edge, stats)
            winners.append((edge, least_error(state, condensed(state, judging, len(tried)), tried, trial)))
        for edge, transform in winners:
            state.commit(edge, transform, self.candidates.kind)

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
        with ExitStack() as stack:
            for port in (port for port in edge.consumers if port.module in state.drafts):
                bounds, draft = state.stats_of(stats, port.module).get(Range()), state.draft(port.module)
                stack.enter_context(draft.simulated(at_port(transform, port), bounds))
            yield


def _stage(state: BlockState, edge: ResolvedEdge) -> int:
    """The index of the stage that computes the edge's first consumer. Routers belong to no stage."""
    paths = {port.module for port in edge.consumers}
    return next(i for i, stage in enumerate(state.resolved.stages) if paths & set(stage))


def at_port(transform: ChannelTransform, port: Port) -> ChannelTransform:
    """``transform``, a scale of the free channels, with the channels of the consumer ``port``."""
    assert isinstance(transform, Scale)
    return transform if port.expand is None else Scale(transform.s[port.expand])


@serializable
@dataclass(frozen=True)
class SearchClip(Step):
    """Chooses the symmetric clip of every granule that hurts its own product least, except in the roles in ``skip``.

    Thresholds are ``c = max|w| * (1 - i / steps)`` for ``i = 0 .. max_shrink * steps - 1`` (AWQ's clip search). A
    granule's loss is ``d^T H_g d`` with its rounding error d and its block H_g of the Gram matrix: the squared error of
    its partial product over all calibration tokens. The reference samples 512 tokens.

    Args:
        steps, max_shrink: of the thresholds.
        skip: roles that keep their range.
        apart: both ends shrink apart, by ``1 - i / steps`` and ``1 - j / steps`` of their own, and every pair is tried
            (BitDistiller, arXiv:2402.10631).
    """

    steps: int = 20
    max_shrink: float = 0.5
    skip: tuple[str, ...] = ("q", "k", "qkv")
    apart: bool = False

    @property
    def simulates(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Gram()})

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.WEIGHT_RANGES})

    def ticks(self, windows: int, linears: int) -> int:
        return windows

    @torch.no_grad()
    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        for path, draft in state.drafts.items():
            assert draft.format is not None
            role, gram = state.resolved.linears[path], state.stats_of(stats, path).get(Gram())
            if role in self.skip or gram is None:
                continue
            spec = draft.format.weight
            if not isinstance(spec.granularity, PerGroup | PerChannel):
                state.note(f"clipping is searched per channel or per group, not {spec.granularity}", at=path)
                continue
            draft.range_shares = self._clip(draft.weight, spec, gram)

    def _clip(self, w_OI: Tensor, spec, gram: Tensor) -> Clipped:
        size = w_OI.shape[1] if isinstance(spec.granularity, PerChannel) else spec.granularity.size
        lows, highs = [], []
        for start in range(0, w_OI.shape[1], size):
            columns = slice(start, min(start + size, w_OI.shape[1]))
            low, high = self._clip_granules(w_OI[:, columns], spec.grid, gram[columns, columns])
            lows.append(low)
            highs.append(high)
        return Clipped(torch.stack(lows, 1).view(-1, 1), torch.stack(highs, 1).view(-1, 1))

    def _clip_granules(self, w_GK: Tensor, grid, gram_KK: Tensor) -> tuple[Tensor, Tensor]:
        w_GK = w_GK.contiguous()
        lo, hi = extremes(w_GK)
        best = torch.full_like(lo, float("inf"))
        best_lo, best_hi = lo.clone(), hi.clone()
        for low, high in self._ends(lo, hi):
            d = grid.fake(w_GK, grid.from_range(low, high)) - w_GK
            loss = ((d @ gram_KK) * d).sum(1, keepdim=True)
            better = loss < best
            best = torch.where(better, loss, best)
            best_lo, best_hi = torch.where(better, low, best_lo), torch.where(better, high, best_hi)
        return _share(best_lo, lo), _share(best_hi, hi)

    def _ends(self, lo_G1: Tensor, hi_G1: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The ranges to try; the first one clips nothing."""
        shares = [1 - i / self.steps for i in range(max(1, int(self.max_shrink * self.steps)))]
        if self.apart:
            yield from ((lo_G1 * low, hi_G1 * high) for high in shares for low in shares)
            return
        absmax = torch.maximum(lo_G1.abs(), hi_G1.abs())
        yield from ((torch.maximum(lo_G1, -absmax * share), torch.minimum(hi_G1, absmax * share)) for share in shares)


def _share(chosen: Tensor, end: Tensor) -> Tensor:
    return torch.where(end != 0, chosen / torch.where(end != 0, end, 1.0), 1.0)[:, 0]
