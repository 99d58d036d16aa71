"""Solve: chooses codes. It is the last step for weights, and packed linears replace drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.modules import ActSpec, DraftLinear, QuantLinear
from lowbit.numerics import (
    Fisher,
    PerChannel,
    PerTensor,
    QTensor,
    Samples,
    Spec,
    Statistic,
    Tokens,
    serializable,
    usual_fit,
)
from lowbit.solve import FEW_TOKENS, Nearest, Solver
from lowbit.steps.effects import BlockDescription, Freedom, LayerDescription
from lowbit.steps.state import BlockState, LayerRecord, Stats
from lowbit.steps.step import RunSizes, Step, names_of

_CHECK = Samples(256, stride=2)  # tokens on which each layer's output error is measured for the report


@serializable
@dataclass(frozen=True)
class Solve(Step):
    """Solves every linear with ``solver`` from the statistics of its input, and packs it.

    ``true_sequential``: linears are solved stage by stage ({q, k, v}, {o}, {gate, up}, {down}), each stage with
    statistics gathered after the quantized stages before it. Otherwise all linears see the block as it was.
    """

    solver: Solver = Nearest()
    true_sequential: bool = False

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset(self.solver.needs)

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.CODES})

    def check(self, weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
        for spec in weights:
            self.solver.check(spec, any(step.places_weight(spec) for step in steps))
        grouped = any(not isinstance(spec.granularity, PerChannel | PerTensor) for spec in weights)
        ordering = [step for step in steps if Freedom.CHANNEL_ORDER in step.fixes]
        if ordering and grouped and self.solver.moves_groups:
            raise ValueError(
                f"{names_of(ordering)} puts input channels in an order, and Solve, with order='act', in another; use order='group' "
                "or static_groups=true"
            )

    def describe(self, block: BlockDescription) -> BlockDescription:
        return block.changed({path: self._solved(layer) for path, layer in block.layers.items()})

    def _solved(self, layer: LayerDescription) -> LayerDescription:
        several = layer.format.weight.granularity.param_shape(layer.shape)[1] > 1
        return replace(layer, ordered=several and self.solver.moves_groups, outliers=self.solver.outliers is not None)

    def memory(self, sizes: RunSizes) -> float:
        solving = max((self.solver.memory(*sizes.shapes[path]) for path in sizes.block.layers), default=0)
        return sizes.statistics_bytes({_CHECK}) + solving

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
        for path in paths:
            self._replace(state, path, state.stats_of(stats, path))
            state.tick("solving")

    def _replace(self, state: BlockState, path: str, stats: Stats) -> None:
        draft, solver, name = state.draft(path), self.solver, state.full_name(path)
        assert draft.format is not None
        notes = self._doubts(state, stats, draft.weight.shape[1])
        if any(need not in stats for need in solver.needs):
            solver = Nearest(usual_fit(draft.format.weight.grid))
        if not torch.isfinite(draft.weight).all():
            raise ValueError(f"{name}: the weight holds NaN or Inf after the transforms before it")
        try:
            solution = solver.solve(draft.target, draft.format.weight, stats, draft.range_shares)
            parts = solution.q, state.store_dtype(f"{path}.bias"), solution.pre, solution.post, solution.side
            packed = draft.pack(*parts)
            error = _output_error(draft, draft.pack(*parts, own_pre=False), stats)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from problem
        if any(need.paired for need in self.needs):
            state.originals[path] = draft
        state.block.set_submodule(path, packed)
        state.records.append(
            LayerRecord(
                name,
                state.resolved.linears[path],
                packed.bits_per_weight,
                packed.in_features * packed.out_features,
                error,
                _zeroed(draft.weight, solution.q),
                (*notes, *solution.notes),
            )
        )

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


def _zeroed(w_OI: Tensor, q: QTensor) -> float:
    """The share of granules that became all zero. It compares counts, so a stored column order hardly matters."""
    split = q.spec.granularity.split
    before, after = ((split(w) == 0).all(1).sum().item() for w in (w_OI, q.dequantize()))
    return max(0.0, (after - before) / len(q.params[0]))


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
