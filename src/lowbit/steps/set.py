"""Set: what has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.modules import ActSpec, fake_quantize_activation
from lowbit.numerics import MovingRange, Range, Samples, Statistic, tagged
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
    """Fixes the range of every static activation from the calibration set, as the block is now (after any transform).

    decay: None, the extremes of all tokens; or the decay of a moving average of each window's extremes, channel by channel
    (:class:`~lowbit.numerics.MovingRange`), whose own extremes then make the range: it clips what few windows reach.
    shrinks: how many equal steps the range of every granule is shrunk by, at both ends, to where sampled tokens lose least:
    ``sum over tokens and channels of (x - q(x))^2 |w_channel|^2``, w the linear's weights; 1: not at all.
    """

    decay: float | None = None
    shrinks: int = 1

    def __post_init__(self):
        if self.shrinks < 1:
            raise ValueError(f"a range is tried as it is at least: shrinks is 1 or more, found {self.shrinks}")

    @property
    def _need(self) -> Statistic:
        return Range() if self.decay is None else MovingRange(self.decay)

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({self._need, _TRIED} if self.shrinks > 1 else {self._need})

    def ticks(self, windows: int, linears: int) -> int:
        return windows

    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        for path, form in state.formats.items():
            if form.act is None or not form.act.static:
                continue
            bounds = state.stats_of(stats, path).get(self._need)
            if bounds is None:
                state.note(f"{path} saw no token: its static activation range is unknown, [-1, 1] is stored")
                bounds = torch.tensor([[-1.0], [1.0]]).expand(2, state.weight_OI(path).shape[1])
            spec = form.act.spec
            lo = spec.granularity.split(bounds[:1]).amin(1, keepdim=True)
            hi = spec.granularity.split(bounds[1:]).amax(1, keepdim=True)
            tried = state.stats_of(stats, path).get(_TRIED)
            if self.shrinks > 1 and tried is not None:
                share = self._share(tried, state.weight_OI(path), form.act, lo, hi)
                lo, hi = lo * share, hi * share
            state.act_params[path] = spec.as_stored(spec.grid.from_range(lo, hi))  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    def _share(self, x_TI: Tensor, w_OI: Tensor, act: ActSpec, lo_G1: Tensor, hi_G1: Tensor) -> Tensor:
        """What is left of each granule's range, ``[G, 1]``: the first of the best."""
        spec, weight_I = act.spec, w_OI.square().sum(0)
        best, chosen = torch.full_like(lo_G1, float("inf")), torch.ones_like(lo_G1)
        for i in range(self.shrinks):
            share = 1 - i / self.shrinks
            params = spec.as_stored(spec.grid.from_range(lo_G1 * share, hi_G1 * share))  # pyright: ignore[reportAttributeAccessIssue]
            lost_I = (fake_quantize_activation(x_TI, act, params) - x_TI).square().sum(0) * weight_I  # pyright: ignore[reportArgumentType]
            lost_G1 = spec.granularity.split(lost_I[None], fill_zero=True).sum(1, keepdim=True)
            better = lost_G1 < best
            best = torch.where(better, lost_G1, best)
            chosen = torch.where(better, torch.full_like(chosen, share), chosen)
        return chosen


_TRIED = Samples(2048, stride=8)
