"""SearchClip: the clipping of every granule that hurts its own product least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics import Clipped, Gram, PerChannel, PerGroup, Statistic, extremes, serializable
from lowbit.steps.effects import Freedom
from lowbit.steps.state import BlockState
from lowbit.steps.step import Step


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
