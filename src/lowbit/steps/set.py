"""Set and SetActivationRange: decisions in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.modules import ActSpec, fake_quantize_activation, static_params
from lowbit.numerics import LaterRange, MovingRange, Range, Samples, Statistic, serializable
from lowbit.steps.effects import EdgeUse, Freedom, MixOrder
from lowbit.steps.rules import TransformRule
from lowbit.steps.state import BlockState, Stats
from lowbit.steps.step import Step

_MASSIVE = 10.0  # times all other tokens: more than chance in one window


@serializable
@dataclass(frozen=True)
class Set(Step):
    """Applies a rule at every edge that can carry its transform and whose name matches ``at``.

    Args:
        rule: makes the transform.
        at: patterns of edge names, as of file names.
        run_time: also apply the rule to every input that no edge with its kind covers. The linears that read it run the
            transform and store it.
    """

    rule: TransformRule
    at: tuple[str, ...]
    run_time: bool = False

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.rule.needs

    @property
    def transforms(self) -> tuple[EdgeUse, ...]:
        return (EdgeUse(self.rule.kind, self.at, self.rule, bool(self.rule.needs), self.run_time, self.rule.dtype),)

    def ticks(self, windows: int, linears: int) -> int:
        return windows if self.needs else 0

    def run(self, state: BlockState) -> None:
        loose = list(state.loose_ends(self.rule.kind)) if self.run_time else []
        edges = [*state.edges(self.at, self.rule.kind, note=not self.run_time), *loose]
        if not edges:  # a pass over the windows would find nothing of use
            return
        stats = state.collect(self.needs, {name for edge in edges for name in edge.inputs})
        for edge in edges:
            transform = self.rule(state, edge, stats)
            if transform is None:
                state.note(f"saw no token: no {self.rule.kind.value} is applied at this edge", at=edge.name)
            else:
                state.commit(edge, transform, self.rule.kind)


@serializable
@dataclass(frozen=True)
class SetActivationRange(Step):
    """Fixes the range of every static activation from the calibration text, in the current block.

    Inputs whose first tokens are over ten times all others are noted.

    Args:
        skip_first: tokens at the start of each calibration window that are left out of the range and clipped at run
            time. A range that holds massive first tokens leaves no levels for the others.
        decay: None for the extremes of all tokens, or the decay of a moving average of each window's extremes, channel
            by channel (:class:`~lowbit.numerics.MovingRange`). The extremes of these averages make the range, which
            clips rare values.
        shrinks: number of shares of each granule's range to try, at both ends: 1, 1 - 1/shrinks, .. The one that loses
            least on sampled tokens wins: ``sum over tokens and channels of (x - q(x))^2 |w_channel|^2`` with the
            linear's weights w.
    """

    skip_first: int = 0
    decay: float | None = None
    shrinks: int = 1

    def __post_init__(self):
        if self.skip_first < 0:
            raise ValueError(f"skip_first is a number of tokens, found {self.skip_first}")
        if self.shrinks < 1:
            raise ValueError(f"shrinks counts ranges to try, the full one included: 1 or more, found {self.shrinks}")
        if self.skip_first and self.decay is not None:
            raise ValueError("a moving average covers all tokens of a window; leave out skip_first or decay")

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.INPUT_RANGES})

    @property
    def mix_order(self) -> MixOrder:
        return MixOrder.LAST

    @property
    def _need(self) -> Statistic:
        if self.decay is not None:
            return MovingRange(decay=self.decay)
        return self._rest if self.skip_first else Range()

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Range(), self._rest, self._need} | ({_TRIED} if self.shrinks > 1 else set()))

    @property
    def _rest(self) -> LaterRange:
        return LaterRange(max(1, self.skip_first))

    def ticks(self, windows: int, linears: int) -> int:
        return windows

    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        for path, draft in state.drafts.items():
            act = None if draft.format is None else draft.format.act
            if act is None or not act.static:
                continue
            known = state.stats_of(stats, path)
            self._note_massive(state, path, known)
            bounds = known.get(self._need)
            if bounds is None:
                state.note(
                    f"saw no token{self._but_first}: its static activation range is unknown, [-1, 1] is stored", at=path
                )
                bounds = torch.tensor([[-1.0], [1.0]])
            bounds = bounds.expand(2, draft.weight.shape[1])
            tried, share = known.get(_TRIED), 1.0
            if self.shrinks > 1 and tried is not None:
                share = self._share(tried, draft.weight, act, bounds)
            draft.act_params = static_params(act, bounds, share)

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
            f"{what} {largest:.3g}, all others {rest:.3g}; "
            + (
                f"the static range leaves {'them' if several else 'it'} out and clips {'them' if several else 'it'} at run time"
                if self.skip_first
                else "it alone sets the static range; skip_first=1 leaves it out"
            ),
            at=path,
        )

    @property
    def _but_first(self) -> str:
        return f" but the first {self.skip_first} of each window" if self.skip_first else ""

    def _share(self, x_TI: Tensor, w_OI: Tensor, act: ActSpec, bounds_2I: Tensor) -> Tensor:
        """The share of each granule's range with the least loss, ``[G, 1]``; the first of equals."""
        weight_I, best, chosen = w_OI.square().sum(0), torch.tensor(torch.inf), torch.tensor(1.0)
        for i in range(self.shrinks):
            share = 1 - i / self.shrinks
            rounded = fake_quantize_activation(x_TI, act, static_params(act, bounds_2I, share))
            lost_I = (rounded - x_TI).square().sum(0) * weight_I
            lost_G1 = act.spec.granularity.split(lost_I[None], fill_zero=True).sum(1, keepdim=True)
            chosen = torch.where(lost_G1 < best, share, chosen)
            best = torch.minimum(lost_G1, best)
        return chosen


_TRIED = Samples(2048, stride=8)
