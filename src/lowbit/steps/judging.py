"""The least error among candidates, from recorded calls, without work that cannot change which one it is.

Errors are sums of squares over calls. So a candidate is given up as soon as its sum exceeds the least whole one; that finds
the same candidate as whole sums for all. Calls run side by side (:mod:`lowbit.parallel`) and are added in their order, so the
bits of a sum do not depend on the number of threads.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from math import inf
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lowbit.modules import DraftLinear
from lowbit.parallel import each
from lowbit.steps.listen import Call, Place
from lowbit.steps.state import BlockState
from lowbit.transforms import through

Candidate = TypeVar("Candidate")
_PROBED = 8
"""One in so many calls puts the candidates in order. The likely winner then runs first, and the others are soon given up."""


class Piece(Protocol):
    """A part of the sum. ``place``: of the calls that it is of."""

    @property
    def place(self) -> Place: ...

    def error(self, state: BlockState) -> float: ...


@dataclass(frozen=True, eq=False)
class Product:
    """All calls of one linear whose output errs by its weight alone: by ``tr(D G D^T)``, D the error of the weight.

    Args:
        gram_II: G, ``sum_t x_t x_t^T`` of the inputs.
    """

    calls: tuple[Call, ...]
    gram_II: Tensor

    @property
    def place(self) -> Place:
        return self.calls[0].place

    def error(self, state: BlockState) -> float:
        d_OI = state.draft(self.place.module).weight_error()
        if d_OI is None:
            return sum(call.error(state) for call in self.calls)
        return ((d_OI @ self.gram_II) * d_OI).sum().item()


def condensed(state: BlockState, calls: Sequence[Call], candidates: int) -> list[Piece]:
    """``calls`` in which all calls of one linear are one product where that is less work for so many candidates."""
    groups: dict[Place, list[Call]] = {}
    for call in calls:
        groups.setdefault(call.place, []).append(call)
    pieces: list[Piece] = []
    for place, group in groups.items():
        linear = state.block.get_submodule(place.module)
        if place.behind is None and isinstance(linear, DraftLinear) and linear.errs_by_weight:
            rows, columns = linear.weight.shape
            tokens = sum(call.answer.numel() for call in group) // rows
            if tokens * columns + candidates * rows * columns < candidates * tokens * rows:
                pieces.append(Product(tuple(group), _gram(linear, group)))
                continue
        pieces.extend(group)
    return pieces


def _gram(linear: DraftLinear, calls: Sequence[Call]) -> Tensor:
    size = linear.weight.shape[1]
    gram_II = linear.weight.new_zeros(size, size)
    for call in calls:
        x_TI = through(linear.pre, call.args[0]).flatten(0, -2).float()
        gram_II.addmm_(x_TI.T, x_TI)
    return gram_II


def total_error(state: BlockState, pieces: Sequence[Piece], start: float = 0.0, beyond: float = inf) -> float:
    """``start`` and the errors of ``pieces``, added in order; infinite once the sum exceeds ``beyond``."""
    errors: list[float | None] = [None] * len(pieces)
    total, added = start, 0

    def work(i: int) -> None:
        if not total > beyond:
            errors[i] = pieces[i].error(state)

    def add() -> None:
        nonlocal total, added
        while added < len(pieces) and (error := errors[added]) is not None:
            total, added = total + error, added + 1

    with ExitStack() as stack:
        for path in {piece.place.behind for piece in pieces}:
            linear = None if path is None else state.block.get_submodule(path)
            if isinstance(linear, DraftLinear):  # its input is compared; nobody reads its output
                stack.enter_context(linear.idle())
        each(len(pieces), work, add)
    return inf if total > beyond else total


@torch.no_grad()
def least_error(
    state: BlockState,
    pieces: Sequence[Piece],
    candidates: Sequence[Candidate],
    simulated: Callable[[Candidate], AbstractContextManager[object]],
) -> Candidate:
    """The candidate whose error over all ``pieces`` is least: the first of equals, NaN last.

    Args:
        pieces: at least one.
        candidates: at least one.
        simulated: makes a context in which the block runs as a candidate would let it.
    """
    count = len(candidates)
    probed = len(pieces) // _PROBED
    errors = [0.0] * count
    if probed:
        for i in range(count):
            with simulated(candidates[i]):
                errors[i] = total_error(state, pieces[:probed])

    def rank(i: int) -> tuple[bool, float]:
        return not errors[i] >= 0, errors[i]

    least = inf
    for i in sorted(range(count), key=rank):
        if errors[i] > least:
            errors[i] = inf
        else:
            with simulated(candidates[i]):
                errors[i] = total_error(state, pieces[probed:], errors[i], least)
            least = min(least, errors[i]) if errors[i] >= 0 else least
        state.tick("searching")
    return candidates[min(range(count), key=rank)]
