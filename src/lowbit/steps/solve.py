"""Solve: chooses codes. It is the last step for weights, and packed linears replace drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lowbit.architectures import ResolvedBlock
from lowbit.modules import ActSpec, DraftLinear, QuantLinear, serialize_transforms
from lowbit.numerics import (
    Fisher,
    PerChannel,
    PerTensor,
    QTensor,
    Samples,
    Spec,
    Statistic,
    Tokens,
    all_finite,
    serializable,
    usual_fit,
)
from lowbit.scheme import FormatRule
from lowbit.solve import FEW_TOKENS, Adapter, Nearest, Solution, Solver
from lowbit.steps.effects import BlockDescription, Freedom, LayerDescription
from lowbit.steps.latents import latent_weight
from lowbit.steps.state import BlockState, LayerRecord, Stats
from lowbit.steps.step import FLOAT, RunSizes, Step, names_of
from lowbit.transforms import Normalize

_CHECK = Samples(256, stride=2)  # tokens on which each layer's output error is measured for the report


@serializable
@dataclass(frozen=True)
class Solve(Step):
    """Solves every linear with ``solver`` from the statistics of its input, and packs it.

    ``true_sequential``: linears are solved stage by stage ({q, k, v}, {o}, {gate, up}, {down}), each stage with
    statistics gathered after the quantized stages before it. Otherwise all linears see the block as it was.

    Linears of the narrowest input are solved first, and the statistics of an input are dropped behind its last linear: the
    largest matrix is then factored when most of the block is packed and nothing but its own statistics is left.

    ``adapter``: also a low-rank term beside the codes of the linears that it names, which a later stage trains.
    """

    solver: Solver = Nearest()
    true_sequential: bool = False
    adapter: Adapter | None = None

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset(self.solver.needs | (frozenset() if self.adapter is None else self.adapter.needs))

    @property
    def adapts(self) -> bool:
        return self.adapter is not None

    @property
    def _keeps_originals(self) -> bool:
        """Whether a later stage runs the original block once more."""
        return self.true_sequential and any(need.paired for need in self.needs)

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.CODES})

    @property
    def disturbs(self) -> frozenset[Freedom]:
        ranges = {Freedom.INPUT_RANGES, Freedom.ATTENTION_RANGES, Freedom.CORRECTIONS, Freedom.ROUNDING}
        return frozenset(ranges if self.solver.rescales else ())

    def check(self, weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
        for spec in weights:
            self.solver.check(spec, any(step.places_weight(spec) for step in steps))
        simulating = [step for step in steps if step.simulates]
        if simulating and self.solver.rescales:
            raise ValueError(
                f"{names_of(simulating)} tries formats out by rounding weights to them, and {type(self.solver).__name__} finds "
                "the scales that its format lacks only when it solves; leave one of the two out"
            )
        grouped = any(not isinstance(spec.granularity, PerChannel | PerTensor) for spec in weights)
        ordering = [step for step in steps if Freedom.CHANNEL_ORDER in step.fixes]
        if ordering and grouped and self.solver.moves_groups:
            raise ValueError(
                f"{names_of(ordering)} puts input channels in an order, and Solve, with order='act', in another; use order='group' "
                "or static_groups=true"
            )

    def describe(self, block: BlockDescription) -> BlockDescription:
        roles = block.resolved.linears
        return block.changed({path: self._solved(layer, path, roles[path]) for path, layer in block.layers.items()})

    def _adapter(self, path: str, role: str) -> Adapter | None:
        """The adapter, where it names this linear."""
        if self.adapter is None or not self.adapter.targets:
            return self.adapter
        return self.adapter if any(FormatRule(each).matches(path, role) for each in self.adapter.targets) else None

    def _solved(self, layer: LayerDescription, path: str, role: str) -> LayerDescription:
        several = layer.format.weight.granularity.param_shape(layer.shape)[1] > 1
        pre, of_output = self.solver.transforms(layer.shape)
        post = serialize_transforms.describe("post", of_output)
        if layer.post and any(part.type == Normalize.__name__ for part in post):
            raise ValueError(
                f"{type(self.solver).__name__} normalizes the outputs of linears, and a step before it transforms them first: "
                "they would be normalized before that is undone; use normalize=false, or leave that step out"
            )
        adapter = self._adapter(path, role)
        terms = () if adapter is None else (adapter.foreseen(layer.shape),)
        return replace(
            layer.running(*pre),
            post=(*post, *layer.post),
            side_terms=(*serialize_transforms.describe("side", terms), *layer.side_terms),
            ordered=several and self.solver.moves_groups,
            outliers=self.solver.outliers is not None,
        )

    def peak(self, sizes: RunSizes) -> float:
        stages = sizes.block.resolved.stages if self.true_sequential else (tuple(sizes.block.layers),)
        needs, largest, packed = self.needs | {_CHECK}, 0.0, 0.0  # packed: bytes of the block that are free by then
        for stage in stages:
            inputs = _by_input(
                sizes.block.resolved, sizes.shapes, [path for path in stage if path in sizes.block.layers]
            )
            held = {name: sizes.input_bytes(needs, paths[0]) for name, paths in inputs}
            largest = max(largest, sum(held.values()) + sizes.batch_bytes(needs) + sizes.pass_bytes - packed)
            for name, paths in inputs:
                for path in paths:
                    own = self.solver.memory(*sizes.shapes[path])
                    own = own if self.adapter is None else max(own, self.adapter.memory(*sizes.shapes[path]))
                    largest = max(largest, sum(held.values()) + own - packed)
                    kept = self._keeps_originals * FLOAT * prod(sizes.shapes[path])
                    stored = sizes.block.layers[path].stored(torch.float32).nbytes
                    packed += FLOAT * prod(sizes.shapes[path]) - kept - stored
                held[name] = 0
        return largest

    def ticks(self, windows: int, linears: int) -> int:
        return linears + windows * (4 if self.true_sequential else 1)  # the report reads the windows at least

    def run(self, state: BlockState) -> None:
        drafts = list(state.drafts)
        if not self.true_sequential:
            self._solve(state, drafts)
            return
        for stage in state.resolved.stages:
            self._solve(state, [path for path in stage if path in drafts])

    def _solve(self, state: BlockState, paths: list[str]) -> None:
        wanted = {shared.name for shared in state.resolved.shared_inputs if set(shared.readers) & set(paths)}
        needs = self.needs if state.io is None else self.needs | {_CHECK}
        stats = state.collect(needs, wanted)
        shapes = {
            path: (draft.weight.shape[0], draft.weight.shape[1]) for path in paths for draft in [state.draft(path)]
        }
        records: dict[str, LayerRecord] = {}
        for name, readers in _by_input(state.resolved, shapes, paths):
            for path in readers:
                records[path] = self._replace(state, path, state.stats_of(stats, path))
                state.tick("solving")
            stats.pop(name, None)
        state.records.extend(records[path] for path in paths)

    def _replace(self, state: BlockState, path: str, stats: Stats) -> LayerRecord:
        draft, solver, name = state.draft(path), self.solver, state.full_name(path)
        assert draft.format is not None
        notes = self._doubts(state, stats, draft.weight.shape[1])
        if any(need not in stats for need in solver.needs):
            solver = Nearest(usual_fit(draft.format.weight.grid))
        if not all_finite(draft.weight):
            raise ValueError(f"{name}: the weight holds NaN or Inf after the transforms before it")
        try:
            solution = self._solution(solver, draft, path, state, stats)
            parts = solution.q, state.store_dtype(f"{path}.bias"), solution.pre, solution.post, solution.side
            packed = draft.pack(*parts)
            bare = draft.pack(*parts, own_pre=False) if draft.pre else packed
            error = _output_error(draft, bare, stats)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from problem
        if state.context.keeps_solutions:
            state.solutions[path] = solution
        if self._keeps_originals:
            state.originals[path] = draft
        if state.context.keeps_latents:
            state.latents[path] = latent_weight(draft, solution)
        state.block.set_submodule(path, packed)
        return LayerRecord(
            name,
            state.resolved.linears[path],
            packed.bits_per_weight,
            packed.in_features * packed.out_features,
            error,
            _zeroed(draft.weight, solution.q),
            (*notes, *solution.notes),
        )

    def _solution(self, solver: Solver, draft: DraftLinear, path: str, state: BlockState, stats: Stats) -> Solution:
        assert draft.format is not None
        if path in state.context.solved:
            return state.context.solved[path]
        adapter = self._adapter(path, state.resolved.linears[path])
        if adapter is None:
            return solver.solve(draft.target, draft.format.weight, stats, draft.range_shares)
        seed = state.seed + list(state.resolved.linears).index(path)
        return adapter.solve(solver, draft.target, draft.format.weight, stats, draft.range_shares, seed)

    def _doubts(self, state: BlockState, stats: Stats, columns: int) -> tuple[str, ...]:
        """What the report must say of a linear that few calibration tokens reached, or none, such as that of an expert."""
        fisher, sample = stats.get(Fisher()), stats.get(_CHECK)
        reads = state.io is not None and state.context.reads_inputs
        if (reads and sample is None) or (fisher is not None and not fisher.any()):
            return ("saw no calibration token: rounded as if all inputs were alike",)
        if not reads or sample is None or Tokens() in self.solver.needs:  # such a solver says it itself
            return ()
        tokens = _CHECK.stride * len(sample)  # or more, if the sample is full
        return (FEW_TOKENS,) if tokens < columns and not _CHECK.enough(sample) else ()


def _by_input(
    resolved: ResolvedBlock, shapes: Mapping[str, tuple[int, int]], paths: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """``paths`` by the shared input that they read, with its name: the narrowest first.

    Args:
        resolved: the block.
        shapes: ``(O, I)`` of each path.
        paths: linears, in the order in which those of one input stay.
    """
    inputs = [(shared.name, [path for path in paths if path in shared.readers]) for shared in resolved.shared_inputs]
    return sorted(((name, read) for name, read in inputs if read), key=lambda each: shapes[each[1][0]][1])


def _zeroed(w_OI: Tensor, q: QTensor) -> float:
    """The share of granules that became all zero. It compares counts, so a stored column order hardly matters."""
    split = q.spec.granularity.split
    before, after = ((split(w) == 0).all(1).sum().item() for w in (w_OI, q.dequantize()))
    return max(0.0, (after - before) / len(split(w_OI)))


@torch.no_grad()
def _output_error(draft: DraftLinear, packed: QuantLinear, stats: Stats) -> float | None:
    """Relative squared error of the output on sampled tokens, or None without tokens.

    The tokens are those that the draft's weight reads, so ``packed`` must not run the draft's own ``pre`` transforms
    again.
    """
    h_TI = stats.get(_CHECK)
    if h_TI is None:
        return None
    wanted = draft.product(h_TI).double()
    lost = (packed.forward(h_TI).double() - wanted).square().sum()
    return (lost / wanted.square().sum().clamp(min=1e-300)).item()
