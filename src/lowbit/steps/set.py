"""Set: what has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.numerics import Range, Statistic, extremes, tagged
from lowbit.steps.rules import Rule
from lowbit.steps.state import BlockState


@tagged
@dataclass(frozen=True)
class Set:
    """Applies a rule at every edge whose name matches ``at`` (patterns as in file names), where it is legal.

    ``run_time``: also at every input that no edge with the rule's kind leads to; the linears that read it then apply the
    transform themselves, which costs them its bits.
    """

    rule: Rule
    at: tuple[str, ...]
    run_time: bool = False

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.rule.needs

    def ticks(self, windows: int, linears: int) -> int:
        return windows if self.needs else 0

    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        loose = list(state.loose_ends(self.rule.kind)) if self.run_time else []
        for edge in (*state.edges(self.at, self.rule.kind, note=not self.run_time), *loose):
            transform = self.rule(state, edge, stats)
            if transform is None:
                state.note(f"edge {edge.name!r} saw no token: its {self.rule.kind.value} is not applied")
            else:
                state.commit(edge, transform, self.rule.kind)


@tagged
@dataclass(frozen=True)
class SetActivationRange:
    """Fixes the range of every static activation from the calibration set, as the block is now (after any transform)."""

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Range()})

    def ticks(self, windows: int, linears: int) -> int:
        return windows

    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        for path, form in state.formats.items():
            if form.act is None or not form.act.static:
                continue
            bounds = state.stats_of(stats, path).get(Range())
            if bounds is None:
                state.note(f"{path} saw no token: its static activation range is unknown, [-1, 1] is stored")
                bounds = torch.tensor([[-1.0], [1.0]])
            spec, inputs = form.act.spec, state.weight_OI(path).shape[1]
            lo, hi = extremes(spec.granularity.split(bounds.expand(2, inputs)))
            columns = spec.granularity.param_shape((1, inputs))[1]
            state.act_params[path] = spec.as_stored(spec.grid.from_range(lo, hi), columns)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
