"""Set: what has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.numerics import Range, Statistic, extremes, tagged
from lowbit.steps.rules import Rule
from lowbit.steps.state import BlockState, Stats

_MASSIVE = 10.0  # times all other tokens: first tokens that do what no other does, not the luck of one window


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
    """Fixes the range of every static activation from the calibration set, as the block is now (after any transform).

    skip_first: so many tokens at the start of each calibration window are left out. Where first tokens are massive, a range
    that holds them leaves no levels for the others; without them it clips them at run time. Inputs whose first tokens are
    over ten times all others are noted, whether they are left out or not.
    """

    skip_first: int = 0

    def __post_init__(self):
        if self.skip_first < 0:
            raise ValueError(f"skip_first is a number of tokens, found {self.skip_first}")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Range(), self._rest})

    @property
    def _rest(self) -> Range:
        return Range(skip_first=max(1, self.skip_first))

    def ticks(self, windows: int, linears: int) -> int:
        return windows

    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        for path, form in state.formats.items():
            if form.act is None or not form.act.static:
                continue
            known = state.stats_of(stats, path)
            self._note_massive(state, path, known)
            bounds = known.get(self._rest if self.skip_first else Range())
            if bounds is None:
                state.note(
                    f"{path} saw no token{self._but_first}: its static activation range is unknown, [-1, 1] is stored"
                )
                bounds = torch.tensor([[-1.0], [1.0]])
            spec, inputs = form.act.spec, state.weight_OI(path).shape[1]
            lo, hi = extremes(spec.granularity.split(bounds.expand(2, inputs)))
            columns = spec.granularity.param_shape((1, inputs))[1]
            state.act_params[path] = spec.as_stored(spec.grid.from_range(lo, hi), columns)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    def _note_massive(self, state: BlockState, path: str, known: Stats) -> None:
        if Range() not in known or self._rest not in known:
            return
        largest, rest = (known[need].abs().max().item() for need in (Range(), self._rest))
        if largest <= _MASSIVE * rest:
            return
        several = self._rest.skip_first > 1
        what = (
            f"the first {self._rest.skip_first} tokens of a window reach"
            if several
            else "the first token of a window reaches"
        )
        state.note(
            f"{path}: {what} {largest:.3g}, all others {rest:.3g}; "
            + (
                f"the static range leaves {'them' if several else 'it'} out and clips {'them' if several else 'it'} at run time"
                if self.skip_first
                else "it alone sets the static range, out of which skip_first=1 keeps it"
            )
        )

    @property
    def _but_first(self) -> str:
        return f" but the first {self.skip_first} of each window" if self.skip_first else ""
