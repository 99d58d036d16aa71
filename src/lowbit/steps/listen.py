"""Records calls of modules during calibration, to repeat them with candidates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.parallel import each
from lowbit.steps.state import BlockState

_RUNS = 8  # of the tokens of one call: each is a sample of a candidate's error


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

    def errors(self, state: BlockState) -> Tensor:
        """Repeats the call. Returns sums of squared differences from the recorded tensor, one for each run of tokens, float64.

        Products are of the type in which the call was recorded: both sides round alike.
        """
        assert state.io is not None
        module = state.block.get_submodule(self.place.module)
        with state.io.products():
            if self.place.behind is None:
                tensor = _hidden(module(*self.args, **self.kwargs))
            else:
                with _watched(state, self.place) as seen:
                    module(*self.args, **self.kwargs)
                tensor = seen.items.pop()
        lost_T = (tensor.float() - self.answer.float()).square_().flatten(0, -2).sum(1).double()
        return torch.stack([run.sum() for run in lost_T.tensor_split(_RUNS) if len(run)])


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class Recorder:
    """Records the calls of each window that passes through the block in :meth:`window`, while open. Made by :func:`recording`."""

    def __init__(self, count: int):
        self.of_windows: list[list[Call]] = [[] for _ in range(count)]
        self._own = _Own()

    @contextmanager
    def window(self, i: int) -> Iterator[None]:
        """While open, calls on this thread are those of window ``i``, in place of any before. Those of windows beyond the count are
        dropped."""
        self._own.items = []
        if i < len(self.of_windows):
            self.of_windows[i] = self._own.items
        try:
            yield
        finally:
            self._own.items = []

    def keep(self, call: Call) -> None:
        self._own.items.append(call)

    @property
    def calls(self) -> list[Call]:
        """By window, and in the order in which they ended. Calls without tokens are left out."""
        return [call for of_window in self.of_windows for call in of_window]


@contextmanager
def recording(state: BlockState, places: Iterable[Place], windows: int | None = None) -> Iterator[Recorder]:
    """While open, calls at ``places`` are recorded.

    Args:
        windows: number of windows, from the first; None: all.
    """
    assert state.io is not None
    recorder = Recorder(len(state.io) if windows is None else min(windows, len(state.io)))
    with ExitStack() as stack:
        for place in dict.fromkeys(places):
            stack.enter_context(_keeping(state, place, recorder.keep))
        yield recorder


def listen(state: BlockState, places: Iterable[Place], windows: int | None = None) -> list[Call]:
    """Runs the block over calibration windows, side by side, and records the calls at ``places``. Products are of the type that
    passes for statistics have.

    Args:
        windows: number of windows, from the first; None: all.
    """
    io = state.io
    assert io is not None

    def window(i: int) -> None:
        with recorder.window(i), io.products():  # settings of the thread
            io.run(state.block, io.window(i), i)

    with recording(state, places, windows) as recorder:
        each(len(recorder.of_windows), window)
    return recorder.calls


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
