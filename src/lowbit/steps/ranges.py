"""Static activation ranges chosen by the block's output: a search, and step sizes learned by gradients.

Where nothing should be clipped, :class:`~lowbit.steps.SetActivationRange` is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.modules import ActSpec, static_params
from lowbit.numerics import Affine, PerTensor, Spec, Statistic, TokenRange, clipped_tokens, serializable
from lowbit.numerics.grids.int import round_ste
from lowbit.steps.effects import Freedom, MixOrder
from lowbit.steps.objectives import BlockMSE, Objective, block_loss
from lowbit.steps.parametrizations import SMALLEST_SCALE, Maker, Parametrization
from lowbit.steps.state import BlockState, Stats
from lowbit.steps.step import Step


def static_linears(state: BlockState) -> dict[str, ActSpec]:
    """The activation formats of all linears with a static input range, by path."""
    acts = {path: draft.format.act for path, draft in state.drafts.items() if draft.format is not None}
    return {path: act for path, act in acts.items() if act is not None and act.static}


@serializable
@dataclass(frozen=True)
class SearchActivationRange(Step):
    """Fixes the range of every static activation by its tokens. The loudest tokens may be clipped whole.

    Token-wise clipping, coarse stage (Outlier Suppression, arXiv:2209.13325, section 4.2). One share of the tokens
    serves all linears of the block. The search tries ``1, 1 - step, ..``, ``span / step`` shares in all; 1 gives the
    range of all values. It keeps the share with the least ``objective`` of the block's output, with weights rounded to
    nearest and activations quantized.

    The authors choose one share for the whole model by its last output; here each block has its own.

    Args:
        span, step: the shares to try, 0 < step <= span <= 1.
        windows: calibration windows on which shares are judged; None: all. Ranges come from all windows.
        objective: compares the block's output with the original's.
    """

    span: float = 0.1
    step: float = 0.01
    windows: int | None = None
    objective: Objective = BlockMSE()

    def __post_init__(self):
        if not 0 < self.step <= self.span <= 1:
            raise ValueError(f"token-wise clipping needs 0 < step <= span <= 1, found {self}")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"a search judges by one window or more, found windows={self.windows}")

    @property
    def simulates(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({TokenRange()})

    @property
    def reads_original(self) -> bool:
        return True

    @property
    def looks_ahead(self) -> int:
        return self.objective.ahead

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.INPUT_RANGES})

    @property
    def mix_order(self) -> MixOrder:
        return MixOrder.LAST

    @property
    def one_input_range(self) -> bool:
        return True

    def check(self, weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
        grains = {act.spec.granularity for act in activations if act.static} - {PerTensor()}
        if grains:
            raise ValueError(
                f"SearchActivationRange clips tokens where one range serves the whole input, not "
                f"{', '.join(sorted(map(str, grains)))}; use PerTensor() or SetActivationRange"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares to try, 1 first."""
        return tuple(1 - k * self.step for k in range(round(self.span / self.step)))

    def ticks(self, windows: int, linears: int) -> int:
        return windows + len(self.shares)

    @torch.no_grad()
    def run(self, state: BlockState) -> None:
        static = static_linears(state)
        if not static:
            return
        if state.io is None or state.io.y is None:
            raise ValueError("a search for activation ranges needs calibration text; none was given")
        bounds = self._bounds(state, static)
        losses = []
        with ExitStack() as stack:
            for draft in state.drafts.values():
                stack.enter_context(draft.simulated())
            for share in self.shares:
                self._fix(state, static, bounds, share)
                losses.append(self._loss(state))
                state.tick("searching")
        best = min(range(len(losses)), key=lambda i: (not losses[i] >= 0, losses[i]))  # NaN last, first of equals
        self._fix(state, static, bounds, self.shares[best])

    def _bounds(self, state: BlockState, static: dict[str, ActSpec]) -> dict[str, Tensor]:
        stats, bounds = state.collect(self.needs), {}
        for path, act in static.items():
            if not isinstance(act.spec.granularity, PerTensor):
                raise ValueError(
                    f"{state.full_name(path)}: tokens are clipped where one range serves the whole input, not "
                    f"{act.spec.granularity}; use PerTensor() or SetActivationRange"
                )
            seen = state.stats_of(stats, path).get(TokenRange())
            if seen is None:
                state.note("saw no token: its static activation range is unknown, [-1, 1] is stored", at=path)
                seen = torch.tensor([[-1.0], [1.0]])
            bounds[path] = seen
        return bounds

    def _fix(self, state: BlockState, static: dict[str, ActSpec], bounds: dict[str, Tensor], share: float) -> None:
        for path, act in static.items():
            state.draft(path).act_params = static_params(act, clipped_tokens(bounds[path], share).view(2, 1))

    def _loss(self, state: BlockState) -> float:
        assert state.io is not None and state.io.y is not None
        count = len(state.io) if self.windows is None else min(self.windows, len(state.io))
        return sum(
            block_loss(self.objective, state.io, state.io.run(state.block, state.io.window(i), i), i).item()
            for i in range(count)
        )


class _LearnedStepSizes(Parametrization):
    """A factor of the step and an offset of the zero point (a share of all codes) for every static input.

    Linears that read the same input in the same format share both. Gradients pass straight through the rounding, as in
    LSQ+.
    """

    def __init__(self, state: BlockState):
        super().__init__()
        inputs: dict[tuple[str, ActSpec], list[str]] = {}
        for path, act in static_linears(state).items():
            name = next(shared.name for shared in state.resolved.shared_inputs if path in shared.readers)
            inputs.setdefault((name, act), []).append(path)
        self.inputs = [(act, tuple(paths)) for (_, act), paths in inputs.items()]
        self.starts: list[Affine] = []
        for _, paths in self.inputs:
            start = state.draft(paths[0]).act_params
            if start is None:
                raise ValueError(
                    f"{state.full_name(paths[0])}: steps of activations are learned from a range that is set before; put "
                    "SearchActivationRange or SetActivationRange first"
                )
            self.starts.append(start)
        self.factors = nn.ParameterList(nn.Parameter(torch.ones_like(start.scale)) for start in self.starts)
        self.offsets = nn.ParameterList(
            nn.Parameter(torch.zeros_like(start.scale), requires_grad=start.zero is not None) for start in self.starts
        )

    def chosen(self, path: str, w_OI: Tensor) -> dict[str, Any]:
        return next(({"act_params": self._params(i)} for i, (_, paths) in enumerate(self.inputs) if path in paths), {})

    def _params(self, i: int) -> Affine:
        start, grid = self.starts[i], self.inputs[i][0].spec.grid
        scale = start.scale * self.factors[i]
        if start.zero is None:
            return Affine(scale)
        last = 2**grid.bits - 1
        zero = start.zero + self.offsets[i] * last
        whole = any(field.name == "zero" and field.bits is not None for field in grid.fields)
        return Affine(scale, round_ste(zero.clamp(0, last)) if whole else zero)

    @torch.no_grad()
    def constrain(self) -> None:
        for factor in self.factors:
            factor.clamp_(min=SMALLEST_SCALE)

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        for i, (act, paths) in enumerate(self.inputs):
            for path in paths:
                state.draft(path).act_params = act.spec.as_stored(self._params(i))  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


@serializable
@dataclass(frozen=True)
class LearnedStepSizes(Maker):
    """Learned steps and zero points of static activations, from ranges that an earlier step has set.

    The fine stage of token-wise clipping (Outlier Suppression, arXiv:2209.13325, section 4.2), as in LSQ+. ``lr`` is
    relative to the step and to the number of codes.
    """

    lr: float = 5e-3

    @property
    def mix_order(self) -> MixOrder:
        return MixOrder.LAST

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        return _LearnedStepSizes(state)
