"""Records calls of modules during calibration, to repeat them with candidates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowbit.parallel import each
from lowbit.steps.state import BlockState


@dataclass(frozen=True)
class Place:
    """A module to call, and the tensor to compare.

    Attributes:
        module: path of the module.
        behind: path of the linear whose input is compared; None: the output of ``module``.
    """

    module: str
    behind: str | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """A recorded call of a module, and the tensor recorded at its place."""

    place: Place
    args: tuple
    kwargs: dict[str, Any]
    answer: Tensor

    def error(self, state: BlockState) -> float:
        """Repeats the call and returns the sum of squared differences from the recorded tensor."""
        module = state.block.get_submodule(self.place.module)
        if self.place.behind is None:
            tensor = _hidden(module(*self.args, **self.kwargs))
        else:
            with _watched(state, self.place) as seen:
                module(*self.args, **self.kwargs)
            tensor = seen.items.pop()
        return (tensor - self.answer).square().sum().item()


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def listen(state: BlockState, places: Iterable[Place], windows: int | None = None) -> list[Call]:
    """Runs the block over calibration windows, side by side, and records the calls at ``places``.

    Args:
        windows: number of windows, from the first; None: all.

    Returns:
        The calls by window, and in the order in which they end. Calls without tokens are left out.
    """
    assert state.io is not None
    io, own = state.io, _Own()
    calls: list[list[Call]] = [[] for _ in range(len(io) if windows is None else min(windows, len(io)))]

    def window(i: int) -> None:
        own.items = calls[i]
        io.run(state.block, io.window(i), i)

    with ExitStack() as stack:
        for place in dict.fromkeys(places):
            stack.enter_context(_keeping(state, place, lambda call: own.items.append(call)))
        each(len(calls), window)
    return [call for of_window in calls for call in of_window]


class _Own(threading.local):
    """A list for each thread."""

    def __init__(self) -> None:
        self.items: list[Any] = []


@contextmanager
def _keeping(state: BlockState, place: Place, keep: Callable[[Call], None]) -> Iterator[None]:
    """While open, ``keep`` is given the calls at ``place``."""
    asked = _Own()
    module = state.block.get_submodule(place.module)

    def on_call(_: nn.Module, args: tuple, kwargs: dict) -> None:
        asked.items.append((args, kwargs))

    def on_answer(*_: Any) -> None:
        (args, kwargs), answer = asked.items.pop(), seen.items.pop()
        if answer.numel():
            keep(Call(place, args, kwargs, answer))

    with _watched(state, place) as seen:
        before = module.register_forward_pre_hook(on_call, with_kwargs=True)
        after = module.register_forward_hook(on_answer)
        try:
            yield
        finally:
            before.remove()
            after.remove()


@contextmanager
def _watched(state: BlockState, place: Place) -> Iterator[_Own]:
    """While open, each call of the place's module appends the tensor to compare to the returned list of its thread."""
    seen = _Own()

    def on_output(_: nn.Module, args: tuple, output: Any) -> None:
        seen.items.append(_hidden(output))

    def on_input(_: nn.Module, args: tuple) -> None:
        seen.items.append(args[0])

    if place.behind is None:
        hook = state.block.get_submodule(place.module).register_forward_hook(on_output)
    else:
        hook = state.block.get_submodule(place.behind).register_forward_pre_hook(on_input)
    try:
        yield seen
    finally:
        hook.remove()
