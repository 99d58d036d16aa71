"""Steps that choose the grid of a weight or of a static activation by its quantization error.

A recipe's scheme fixes formats before any weight is seen. These steps may replace a format's grid by another of the
same size. The linear is then packed, reported and written in the new format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.numerics import Fit, Grid, MinMax, Params, RangeSearch, Samples, Spec, Statistic, fit_params, serializable
from lowbit.steps.effects import Freedom
from lowbit.steps.state import BlockState
from lowbit.steps.step import Step


def _check_grids(grids: tuple[Grid, ...], fit: Fit) -> None:
    for grid in grids:
        if (grid.bits, grid.fields) != (grids[0].bits, grids[0].fields):
            raise ValueError(f"grids to choose from take the same storage, found {grids[0]} and {grid}")
        why_not = fit.why_not(grid)
        if why_not is not None:
            raise ValueError(f"{why_not}; choose another fit or another grid")


def _best(x: Tensor, spec: Spec, grids: tuple[Grid, ...], fit: Fit) -> tuple[Spec, Params]:
    """The grid of ``grids`` with the least squared error of ``x``: ``spec`` with that grid, and its parameters.

    Without ``grids``, the spec keeps its own.
    """
    best, chosen = float("inf"), None
    for grid in grids or (spec.grid,):
        tried = replace(spec, grid=grid)
        params = fit_params(x, tried, fit)
        x_GK = spec.granularity.split(x)
        restored = spec.granularity.join(grid.decode(grid.encode(x_GK, params), params), tuple(x.shape))
        loss = (restored - x).double().square().sum().item()
        if chosen is None or loss < best:
            best, chosen = loss, (tried, params)
    assert chosen is not None
    return chosen


@serializable
@dataclass(frozen=True)
class ChooseGrid(Step):
    """Gives each weight the grid of ``grids`` with the least squared error (numeric types of ANT, arXiv:2208.14286).

    Each grid is placed by ``fit``, and the error is summed over the tensor. Only formats whose grid is one of ``grids``
    change, so other rules, and mixes with other formats, keep theirs. A weight whose range was chosen before keeps its
    grid.
    """

    grids: tuple[Grid, ...]
    fit: Fit = RangeSearch()

    def __post_init__(self):
        if not self.grids:
            raise ValueError("there is no grid to choose from")
        _check_grids(self.grids, self.fit)

    def ticks(self, windows: int, linears: int) -> int:
        return linears

    @torch.no_grad()
    def run(self, state: BlockState) -> None:
        for draft in state.drafts.values():
            assert draft.format is not None
            if draft.format.weight.grid in self.grids and draft.range_shares is None:
                spec, _ = _best(draft.weight, draft.format.weight, self.grids, self.fit)
                draft.format = replace(draft.format, weight=spec)
            state.tick("choosing grids")


@serializable
@dataclass(frozen=True)
class FitActivation(Step):
    """Fixes every static activation by ``fit`` on the first ``tokens`` calibration tokens, in the current block.

    Args:
        fit: places a grid on the tokens.
        grids: a format with one of these grids gets the one with the least squared error on the tokens. Empty: formats
            stay.
        tokens: number of calibration tokens.
    """

    fit: Fit = RangeSearch()
    grids: tuple[Grid, ...] = ()
    tokens: int = 1024

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"a static activation needs at least one calibration token, found {self.tokens}")
        _check_grids(self.grids, self.fit)

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Samples(self.tokens)})

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.INPUT_RANGES})

    @property
    def one_input_range(self) -> bool:
        return True

    def ticks(self, windows: int, linears: int) -> int:
        return windows + linears

    @torch.no_grad()
    def run(self, state: BlockState) -> None:
        stats, drafts = state.collect(self.needs), state.drafts
        for shared in state.resolved.shared_inputs:
            known: dict[Spec, tuple[Spec, Params]] = {}  # linears that read the same input share them
            for path in (reader for reader in shared.readers if reader in drafts):
                form = drafts[path].format
                assert form is not None
                if form.act is None or not form.act.static:
                    continue
                x_TI, spec = stats.get(shared.name, {}).get(Samples(self.tokens)), form.act.spec
                if x_TI is None:
                    state.note("saw no token: its static activation range is unknown, [-1, 1] is stored", at=path)
                    x_TI = torch.tensor([[-1.0, 1.0]])
                    known[spec] = spec, fit_params(x_TI, spec, MinMax())
                if spec not in known:
                    grids = self.grids if spec.grid in self.grids else ()
                    known[spec] = _best(x_TI.float(), spec, grids, self.fit)
                chosen, drafts[path].act_params = known[spec]  # pyright: ignore[reportAttributeAccessIssue]
                drafts[path].format = replace(form, act=replace(form.act, spec=chosen))
                state.tick("fixing activations")
