"""Calls of modules during calibration, kept so that they can be made again with something tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowbit.steps.state import BlockState


@dataclass(frozen=True)
class Place:
    """A module to run, and what to look at.

    Attributes:
        module: path of the module.
        behind: path of the linear whose input is looked at; None: the output of ``module``.
    """

    module: str
    behind: str | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module during calibration, and what was seen at its place."""

    place: Place
    args: tuple
    kwargs: dict[str, Any]
    answer: Tensor

    def error(self, state: BlockState) -> float:
        """Sum of the squared differences from the answer when the call is made again."""
        with _watched(state, self.place) as seen:
            state.block.get_submodule(self.place.module)(*self.args, **self.kwargs)
        return (seen.pop() - self.answer).square().sum().item()


def listen(state: BlockState, places: Iterable[Place], windows: int | None = None) -> list[Call]:
    """Runs the block over the first ``windows`` calibration windows (None: all) and returns the calls at ``places``, in the order
    in which they end; those without a token are left out."""
    assert state.io is not None
    calls: list[Call] = []
    with ExitStack() as stack:
        for place in dict.fromkeys(places):
            stack.enter_context(_keeping(state, place, calls))
        for i in range(len(state.io) if windows is None else min(windows, len(state.io))):
            state.io.run(state.block, state.io.window(i), i)
    return calls


@contextmanager
def _keeping(state: BlockState, place: Place, calls: list[Call]) -> Iterator[None]:
    """While open, calls at ``place`` are appended to ``calls``."""
    asked: list[tuple[tuple, dict]] = []
    module = state.block.get_submodule(place.module)

    def on_call(_: nn.Module, args: tuple, kwargs: dict) -> None:
        asked.append((args, kwargs))

    def on_answer(*_: Any) -> None:
        (args, kwargs), answer = asked.pop(), seen.pop()
        if answer.numel():
            calls.append(Call(place, args, kwargs, answer))

    with _watched(state, place) as seen:
        before = module.register_forward_pre_hook(on_call, with_kwargs=True)
        after = module.register_forward_hook(on_answer)
        try:
            yield
        finally:
            before.remove()
            after.remove()


@contextmanager
def _watched(state: BlockState, place: Place) -> Iterator[list[Tensor]]:
    """While open, what is looked at is appended to a list at each call of the place's module."""
    seen: list[Tensor] = []

    def on_output(_: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    def on_input(_: nn.Module, args: tuple) -> None:
        seen.append(args[0])

    if place.behind is None:
        hook = state.block.get_submodule(place.module).register_forward_hook(on_output)
    else:
        hook = state.block.get_submodule(place.behind).register_forward_pre_hook(on_input)
    try:
        yield seen
    finally:
        hook.remove()
