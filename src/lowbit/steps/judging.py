"""The least error among candidates, from recorded calls.

Errors are sums of squares over calls. A candidate is given up as soon as its sum exceeds the least whole one, or earlier, by a
rule of chance (:mod:`lowbit.steps.race`). Calls run side by side (:mod:`lowbit.parallel`) and are added in their order, so the
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
from lowbit.steps.race import race, spread
from lowbit.steps.state import BlockState, product_dtype
from lowbit.transforms import through

Candidate = TypeVar("Candidate")
_PROBED = 8
"""Where whole sums decide, one in so many calls puts the candidates in order. The likely winner then runs first, and the others
are soon given up."""
_FIRST = 32
"""In a race, the first round has one in so many calls."""
_RACED = 0.2
"""Share of all sums that a race looks at: 0.18 and 0.12 for AWQ's scales at two edges of SmolLM2-135M, from two windows on."""


class Piece(Protocol):
    """A part of the sum. ``place``: of the calls that it is of. ``errors``: float64, one or several, which are added."""

    @property
    def place(self) -> Place: ...

    def errors(self, state: BlockState) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Product:
    """All calls of one linear whose output errs by its weight alone: by ``tr(D G D^T)``, D the error of the weight.

    Args:
        gram_II: G, ``sum_t x_t x_t^T`` of the inputs, in the type of the recorded products, as is their product with D.
    """

    calls: tuple[Call, ...]
    gram_II: Tensor

    @property
    def place(self) -> Place:
        return self.calls[0].place

    def errors(self, state: BlockState) -> Tensor:
        d_OI = state.draft(self.place.module).weight_error()
        if d_OI is None:
            return torch.cat([call.errors(state) for call in self.calls])
        moved_OI = (d_OI.to(self.gram_II.dtype) @ self.gram_II).float()
        return (moved_OI * d_OI).sum(1).sum(dtype=torch.float64)[None]


def condensed(state: BlockState, calls: Sequence[Call], candidates: int, certain: bool = True) -> list[Piece]:
    """``calls`` in which all calls of one linear are one product where that is less work for so many candidates.

    Args:
        certain: as for :func:`least_error`, which then repeats all calls for most candidates.
    """
    groups: dict[Place, list[Call]] = {}
    for call in calls:
        groups.setdefault(call.place, []).append(call)
    pieces: list[Piece] = []
    for place, group in groups.items():
        linear = state.block.get_submodule(place.module)
        if place.behind is None and isinstance(linear, DraftLinear) and linear.errs_by_weight:
            rows, columns = linear.weight.shape
            tokens = sum(call.answer.numel() for call in group) // rows
            repeated = candidates * tokens * rows * (1 if certain else _RACED)
            if tokens * columns + candidates * rows * columns < repeated:
                pieces.append(Product(tuple(group), _gram(state, linear, group)))
                continue
        pieces.extend(group)
    return pieces


def _gram(state: BlockState, linear: DraftLinear, calls: Sequence[Call]) -> Tensor:
    """The Gram matrix of the linear's inputs; sums over calls are in float32, whatever the type of products."""
    size, dtype = linear.weight.shape[1], product_dtype(state)
    gram_II = linear.weight.new_zeros(size, size)
    for call in calls:
        x_TI = through(linear.pre, call.args[0]).flatten(0, -2).to(dtype)
        gram_II += x_TI.T @ x_TI
    return gram_II.to(dtype)


def errors_of(state: BlockState, pieces: Sequence[Piece], beyond: float = inf) -> Tensor:
    """The errors of ``pieces``, in order, float64; without those of the last pieces once the sum exceeds ``beyond``."""
    found: list[Tensor | None] = [None] * len(pieces)
    total, added = 0.0, 0

    def work(i: int) -> None:
        if not total > beyond:
            found[i] = pieces[i].errors(state)

    def add() -> None:
        nonlocal total, added
        while added < len(pieces) and not total > beyond and (errors := found[added]) is not None:
            total, added = total + sum(errors.tolist()), added + 1

    with ExitStack() as stack:
        for path in {piece.place.behind for piece in pieces}:
            linear = None if path is None else state.block.get_submodule(path)
            if isinstance(linear, DraftLinear):  # its input is compared; nobody reads its output
                stack.enter_context(linear.idle())
        each(len(pieces), work, add)
    return torch.cat([errors for errors in found[:added] if errors is not None])


@torch.no_grad()
def least_error(
    state: BlockState,
    pieces: Sequence[Piece],
    candidates: Sequence[Candidate],
    simulated: Callable[[Candidate], AbstractContextManager[object]],
    certain: bool = True,
) -> Candidate:
    """The candidate whose error over all ``pieces`` is least: the first of equals, NaN last.

    Args:
        pieces: at least one.
        candidates: at least one.
        simulated: makes a context in which the block runs as a candidate would let it.
        certain: only whole sums decide; else candidates race (:mod:`lowbit.steps.race`), where all pieces are of one place.
    """
    certain = certain or len({piece.place for piece in pieces}) > 1
    if not certain:
        pieces = [pieces[i] for i in spread(len(pieces))]

    def errors(i: int, part: slice, beyond: float) -> Tensor:
        with simulated(candidates[i]):
            found = errors_of(state, pieces[part], beyond)
        if part.start == 0:
            state.tick("searching")
        return found

    first = len(pieces) // _PROBED if certain else max(1, len(pieces) // _FIRST)
    return candidates[race(len(candidates), len(pieces), errors, first=first, certain=certain).winner]
