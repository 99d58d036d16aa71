"""Learn: trains parametrizations of a block by gradients; the block's own weights stay frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from lowbit.architectures import Kind
from lowbit.modules import SharedInput
from lowbit.numerics import Statistic, serializable
from lowbit.steps.effects import BlockDescription, EdgeUse, Freedom, MixOrder
from lowbit.steps.objectives import BlockMSE, Objective, block_loss
from lowbit.steps.parametrizations import Maker, Parametrization, Weights
from lowbit.steps.precision import faster_products
from lowbit.steps.state import BlockState
from lowbit.steps.step import FLOAT, RunSizes, Step

_STANDSTILL = 1e-4
"""A relative fall of the lowest loss by less than this counts as none."""
_COPIES = 8  # of weights and activations, held at once
_COPIES_AHEAD = 3  # of the activations of an original block behind, which gradients only pass


@serializable
@dataclass(frozen=True)
class Learn(Step):
    """Minimizes ``objective`` over the parameters of ``makers``, each maker with its own learning rate.

    The block sees the inputs that the recipe feeds; with quantized inputs it can correct errors of earlier blocks. The
    target is the original block's output for its original inputs. Weights and activations are quantized as they will be
    stored. The parameters at the end of the epoch with the lowest mean loss are kept, or the start if no epoch is
    better. Learning stops at a loss that is not finite, and where the lowest loss, once it has fallen, falls no further by
    one part in 10,000 for a quarter of all epochs (at least three).

    Args:
        epochs: passes over the calibration windows.
        batch: windows that pass through the block at once.
        amp: run the block's products in bfloat16 on processors that have instructions for it; None: as the recipe's
            ``compute`` says. Quantization and parameters stay in float32.
        steps: number of gradient steps, rounded up to whole passes; replaces ``epochs``.
        descent: ``"adamw"`` at constant rates, or ``"sign"``, which steps along the gradient's sign at rates that fall
            linearly to zero (SignRound, arXiv:2309.05516).
        decay: let the rates of ``"adamw"`` fall linearly to zero too.
        verify: measure the loss again at the end and restore the start unless the loss is lower. An epoch's mean is not
            the loss after its last step.
        accumulate: batches for each gradient step. This gives the step of a larger batch in the memory of a small one.
    """

    makers: tuple[Maker, ...]
    objective: Objective = BlockMSE()
    epochs: int = 20
    batch: int = 1
    amp: bool | None = None
    steps: int | None = None
    descent: Literal["adamw", "sign"] = "adamw"
    decay: bool = False
    accumulate: int = 1
    verify: bool = False

    def __post_init__(self):
        if self.descent not in ("adamw", "sign"):
            raise ValueError(f"descent is 'adamw' or 'sign', found {self.descent!r}")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"learning takes 0 steps or more, found {self.steps}")
        if self.epochs < 0 or self.batch < 1 or self.accumulate < 1 or not self.makers:
            raise ValueError(
                f"learning needs something to learn, epochs >= 0, batch >= 1 and accumulate >= 1, found {self}"
            )

    @property
    def simulates(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset().union(*(maker.needs for maker in self.makers))

    @property
    def learns(self) -> bool:
        return True

    @property
    def reads_original(self) -> bool:
        return True

    @property
    def reads_inputs(self) -> bool:
        return True

    @property
    def looks_ahead(self) -> int:
        return self.objective.ahead

    @property
    def transforms(self) -> tuple[EdgeUse, ...]:
        return tuple(use for maker in self.makers for use in maker.transforms)

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset().union(*(maker.kinds for maker in self.makers))

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset().union(*(maker.fixes for maker in self.makers))

    @property
    def disturbs(self) -> frozenset[Freedom]:
        return frozenset().union(*(maker.disturbs for maker in self.makers))

    @property
    def cache_parts(self) -> frozenset[str]:
        return frozenset().union(*(maker.cache_parts for maker in self.makers))

    @property
    def mix_order(self) -> MixOrder:
        return min(maker.mix_order for maker in self.makers)

    def describe(self, block: BlockDescription) -> BlockDescription:
        for maker in self.makers:
            block = maker.describe(block)
        return block

    def memory(self, sizes: RunSizes) -> float:
        """Bytes of several copies of the weights and of one batch's activations, for the backward pass, of what makers add, and
        of the blocks that it looks ahead to."""
        block = sum(prod(shape) for shape in sizes.shapes.values()) * FLOAT
        further = self.looks_ahead * (block + _COPIES_AHEAD * self.batch * sizes.window_bytes)
        further += sum(maker.memory(sizes, self.batch) for maker in self.makers)
        return _COPIES * (sizes.quantized_weights * FLOAT + self.batch * sizes.window_bytes) + further

    def ticks(self, windows: int, linears: int) -> int:
        return windows * bool(self.needs) + (self._epochs(windows) + 1) * -(-windows // self.batch)

    def _epochs(self, windows: int) -> int:
        return self.epochs if self.steps is None else -(-self.steps // self._steps_an_epoch(windows))

    def _steps_an_epoch(self, windows: int) -> int:
        return -(-windows // (self.batch * self.accumulate))

    def run(self, state: BlockState) -> None:
        if state.io is None or state.io.y is None:
            raise ValueError("learning needs calibration text; none was given")
        stats = state.collect(self.needs)
        maps = [maker.make(state, stats) for maker in self.makers]  # pyright: ignore[reportArgumentType]
        groups = [
            {"params": list(each.parameters()), "lr": maker.lr} for each, maker in zip(maps, self.makers, strict=True)
        ]
        groups = [group for group in groups if group["params"]]
        if groups:
            sign = self.descent == "sign"
            optimizer = _SignSGD(groups) if sign else torch.optim.AdamW(groups, weight_decay=0.0)
            total = max(1, self._epochs(len(state.io)) * self._steps_an_epoch(len(state.io)))
            rate = (lambda step: 1 - step / total) if sign or self.decay else (lambda step: 1.0)
            self._descend(state, maps, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate))
        for each in maps:
            each.commit(state)

    def _descend(self, state: BlockState, maps: list[Parametrization], optimizer, schedule) -> None:
        assert state.io is not None and state.io.y is not None
        base: Weights = {name: p.detach() for name, p in state.block.named_parameters()}
        order = torch.Generator().manual_seed(state.seed)
        starts = list(range(0, len(state.io), self.batch))
        best, kept = float("inf"), _snapshot(maps)
        first, before = best, kept
        epochs = self._epochs(len(state.io))
        patience, lately, at = max(3, -(-epochs // 4)), float("inf"), 0
        for epoch in range(epochs + 1):
            total = 0.0
            visits = torch.randperm(len(starts), generator=order).tolist() if epoch else range(len(starts))
            for i, k in enumerate(visits):
                pick = slice(starts[k], starts[k] + self.batch)
                with torch.set_grad_enabled(epoch > 0):
                    loss = self._loss(state, base, maps, pick)
                if epoch:
                    together = min(self.accumulate, len(starts) - i // self.accumulate * self.accumulate)
                    if i % self.accumulate == 0:
                        optimizer.zero_grad()
                    (loss / together).backward()
                    if i % self.accumulate == together - 1:
                        optimizer.step()
                        schedule.step()
                        for each in maps:
                            each.constrain()
                total += loss.item()
                state.tick(f"learning {epoch}/{epochs}")
            if not total < float("inf"):
                state.note(f"learning stopped at epoch {epoch}: the loss is not finite; the best epoch is kept")
                break
            first = total if epoch == 0 else first
            if total < best:
                best, kept = total, _snapshot(maps)
            if best < lately * (1 - _STANDSTILL):
                lately, at = best, epoch
            elif 0 < at <= epoch - patience and epoch < epochs:  # many a loss rises first
                state.note("learning stopped before the last epoch: the loss stood still for a quarter of them")
                break
        _restore(maps, kept)
        if self.verify and best < first:
            with torch.no_grad():
                picks = (slice(start, start + self.batch) for start in starts)
                last = sum(self._loss(state, base, maps, pick).item() for pick in picks)
            if not last < first:
                state.note("learning did not lower the loss, measured again at the end: the start is kept")
                _restore(maps, before)

    def _loss(self, state: BlockState, base: Weights, maps: list[Parametrization], pick: slice) -> Tensor:
        assert state.io is not None and state.io.y is not None
        weights = base
        for each in maps:
            weights = each(weights)
        x = state.io.x[pick].float()

        def run(values: Weights) -> Callable[..., Any]:
            return lambda *args, **kwargs: functional_call(state.block, values, args, kwargs)

        products = state.io.products() if self.amp is None else faster_products(x.device, self.amp)
        with _simulated(state, weights, maps), products:
            output = state.io.run(run(weights), x, pick.start)
            loss = block_loss(self.objective, state.io, output, pick.start)
        if self.objective.augment:
            with torch.no_grad():
                target = state.io.run(run(base), x, pick.start)
            loss = loss + self.objective(output, target)
        return loss


@contextmanager
def _simulated(state: BlockState, weights: Weights, maps: list[Parametrization]) -> Iterator[None]:
    """While open, drafts run as they will be packed, with ``weights`` and what ``maps`` choose, open to gradients."""
    inputs = SharedInput()
    with ExitStack() as stack:
        for path, draft in state.drafts.items():
            w_OI = weights[f"{path}.weight"]
            chosen = {"weight": w_OI, "bias": weights.get(f"{path}.bias"), "inputs": inputs}
            for each in maps:
                chosen |= each.chosen(path, w_OI)
            stack.enter_context(draft.simulated(**chosen))
        for each in maps:
            stack.enter_context(each.simulated(state))
        yield


class _SignSGD(torch.optim.SGD):
    """Moves each parameter by the learning rate along the sign of its gradient."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.sign_()
        return super().step(closure)


def _snapshot(maps: list[Parametrization]) -> list[list[Tensor]]:
    return [[p.detach().clone() for p in each.parameters()] for each in maps]


@torch.no_grad()
def _restore(maps: list[Parametrization], kept: list[list[Tensor]]) -> None:
    for each, values in zip(maps, kept, strict=True):
        for p, value in zip(each.parameters(), values, strict=True):
            p.copy_(value)
