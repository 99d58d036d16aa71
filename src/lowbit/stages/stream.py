"""Running one block of a model that is not there: its arguments, and what comes before and after all blocks.

The blocks of a skeleton are replaced by stubs while the model runs. A stub hands on the hidden states it is given and
notes the other arguments (masks, position embeddings), which differ from block to block in some models. The part
before the blocks so yields the first inputs, and the part after them turns hidden states into logits, without a word about how the
model is made. The usual catcher, which breaks off the forward pass by raising an exception, gives the first block's
arguments only and needs a second mechanism for the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.architectures import Architecture, block_modules
from lowbit.checkpoints.source import ModelSource


class CannotStream(ValueError):
    """The blocks of a model cannot run one at a time, or not on token ids alone. Found before the first block is changed."""


@dataclass(frozen=True)
class Call:
    """The arguments of a block other than its hidden states; runs any block with them.

    ``args`` and ``kwargs`` are those of the first window, and of all others where ``windows`` is empty. Else it holds, for
    every window, the values of the tensors that differ: made of the token ids, such as embeddings for each layer.
    """

    args: tuple
    kwargs: dict[str, Any]
    windows: tuple[tuple[Tensor, ...], ...] = ()

    def __call__(self, block: Callable[..., Any], x: Tensor, first: int = 0) -> Tensor:
        """Hidden states ``[B, T, d]`` after ``block``, which may be a module or a function of a module's signature.

        ``x`` are the inputs of windows ``first`` and following. Where some arguments do not broadcast over B (some position
        biases have windows and heads in one dimension) or differ by window, windows run one after another.
        """
        alike = not self.windows and all(t.dim() < 2 or len(t) == 1 for t in _tensors((self.args, self.kwargs)))
        if len(x) > 1 and not alike:
            return torch.cat([self(block, window, first + w) for w, window in enumerate(x.split(1))])
        args, kwargs = self._of(first)
        output = block(x, *args, **kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def _of(self, window: int) -> tuple[tuple, dict[str, Any]]:
        """A copy of the containers each time, since a block may write into a dict that it is given."""
        values = iter(self.windows[window]) if self.windows else _tensors((self.args, self.kwargs))
        return _filled((self.args, self.kwargs), values)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """``value`` with other tensors in the order of :func:`_tensors`, in containers of its own."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        filled = copy.copy(value)
        filled.update({key: _filled(item, tensors) for key, item in value.items()})
        return filled
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_filled(item, tensors) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_filled(item, tensors) for item in value)
    return value


def _kinds(value: Any) -> Any:
    """What is not a tensor in arguments, and where the tensors are."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, dict):
        return {key: _kinds(item) for key, item in value.items()}
    return tuple(map(_kinds, value)) if isinstance(value, tuple | list) else value


class _Arguments:
    """The arguments of every block, gathered window by window: tensors equal to those of the first window are kept once.

    ``keep``: where a tensor that differs is put.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor]):
        self.keep = keep
        self.first: list[Call] = []
        self.others: list[list[list[Tensor]]] = []  # of each block, of each window

    def add(self, calls: list[Call]) -> None:
        """Takes the arguments of the next window.

        Raises:
            CannotStream: they differ in something that is not a tensor.
        """
        if not self.first:
            self.first = calls
            self.others = [[list(_tensors((call.args, call.kwargs)))] for call in calls]
            return
        kept: dict[tuple[int, int], Tensor] = {}  # many blocks are given the same tensors
        for i, (first, call, windows) in enumerate(zip(self.first, calls, self.others, strict=True)):
            if _kinds((first.args, first.kwargs)) != _kinds((call.args, call.kwargs)):
                raise CannotStream(
                    f"block {i} is called with arguments that change from window to window in more than tensors; its blocks "
                    "cannot run one at a time"
                )
            row = []
            for old, new in zip(windows[0], _tensors((call.args, call.kwargs)), strict=True):
                key = (id(old), id(new))
                if key not in kept:
                    same = old is new or (old.shape == new.shape and torch.equal(old, new))
                    kept[key] = old if same else self.keep(new)
                row.append(kept[key])
            windows.append(row)

    def calls(self) -> list[Call]:
        """The arguments of every block for all windows."""
        return [
            first
            if all(value is old for row in windows for value, old in zip(row, windows[0], strict=True))
            else Call(first.args, first.kwargs, tuple(map(tuple, windows)))
            for first, windows in zip(self.first, self.others, strict=True)
        ]


class _Stub(nn.Module):
    """Stands in for a block: keeps its arguments, answers with ``answer`` or with what it was given.

    ``traits``: plain attributes of the block, which some models read from outside of it.
    ``rest``: what the answer of the block has after its hidden states; None: it answers with hidden states alone.
    """

    def __init__(self, traits: dict[str, Any], rest: tuple | None, answer: Tensor | None = None):
        super().__init__()
        self.rest, self.answer = rest, answer
        self.call: Call | None = None
        self.seen: Tensor | None = None
        for name, value in traits.items():
            setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):
        self.call, self.seen = Call(args, kwargs), hidden_states
        output = hidden_states if self.answer is None else self.answer
        return output if self.rest is None else (output, *self.rest)


def _traits(block: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(block).items()
        if isinstance(value, str | bool | int | float | None) and not name.startswith("_") and name != "training"
    }


def outside(model: PreTrainedModel, architecture: Architecture, *, only_base: bool = False) -> list[str]:
    """Parameters and stored buffers outside the blocks; ``only_base``: without the head."""
    prefix = f"{architecture.blocks}."
    base = next(path for path, module in model.named_modules() if module is model.base_model) if only_base else ""
    inside = f"{base}." if base else ""
    return sorted(key for key in model.state_dict() if not key.startswith(prefix) and key.startswith(inside))


def check_blocks_run_alone(architecture: Architecture) -> None:
    """Checks what is known before any block runs.

    Raises:
        CannotStream: the blocks need more of each other than hidden states.
    """
    if architecture.apart:
        raise CannotStream(f"{architecture.apart}, so they cannot run one at a time. {_WITHOUT_TEXT}")


_WITHOUT_TEXT = "Methods that need no text can quantize this model: give none (--calibration none)"


class Stream:
    """Hidden states in, hidden states and logits out, for a skeleton whose blocks come and go.

    Args:
        model: a skeleton; what comes before the blocks must be loaded before :meth:`enter`, everything outside of them
            before :meth:`logits`.
        architecture: its table.
        as_tuple: whether its blocks answer with a tuple; see :meth:`find_answers`.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, as_tuple: bool = False):
        self.model, self.architecture = model, architecture
        self.blocks = block_modules(model, architecture)
        self.kinds = [type(block) for block in self.blocks]
        self.traits = [_traits(block) for block in self.blocks]
        self.rests: dict[type, tuple | None] = {}
        self.as_tuple = as_tuple

    @contextmanager
    def _stubs(self, answer: Tensor | None = None) -> Iterator[list[_Stub]]:
        parent_path, _, name = self.architecture.blocks.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        default = () if self.as_tuple else None
        rests = [self.rests.get(kind, default) for kind in self.kinds]
        stubs = [_Stub(traits, rest, answer) for traits, rest in zip(self.traits, rests, strict=True)]
        setattr(parent, name, nn.ModuleList(stubs))
        try:
            yield stubs
        finally:
            setattr(parent, name, self.blocks)

    @property
    def samples(self) -> list[int]:
        """Numbers of blocks that together are of every class."""
        return [self.kinds.index(kind) for kind in dict.fromkeys(self.kinds)]

    @torch.no_grad()
    def find_answers(self) -> None:
        """Runs a block of every class (:attr:`samples`, which must be loaded) on two tokens to see how they answer."""
        for number in self.samples:
            with self._stubs() as stubs:
                try:
                    self.model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
                except Exception as error:  # a model that expects tuples may fail in any way behind a stub
                    if stubs[number].call is None:
                        raise CannotStream(
                            f"{type(self.model).__name__} does not run on token ids alone as far as block {number} "
                            f"({type(error).__name__}: {error}). {_WITHOUT_TEXT}"
                        ) from error
                call, seen = stubs[number].call, stubs[number].seen
            if call is None or seen is None:
                kind = self.kinds[number].__name__
                raise CannotStream(f"block {number} ({kind}) does not run on token ids alone. {_WITHOUT_TEXT}")
            args, kwargs = call._of(0)
            output = self.blocks[number](seen, *args, **kwargs)
            self.rests[self.kinds[number]] = tuple(output[1:]) if isinstance(output, tuple | list) else None

    @torch.no_grad()
    def enter(self, ids_1T: Tensor) -> tuple[Tensor, list[Call]]:
        """The first block's inputs ``[1, T, d]`` for one window of ids, and every block's other arguments.

        Raises:
            CannotStream: blocks that the model does not run one after another, each on what the one before gave.
        """
        with self._stubs() as stubs:
            self.model.base_model(input_ids=ids_1T, use_cache=False)
        missing = [i for i, stub in enumerate(stubs) if stub.call is None]
        seen = [stub.seen for stub in stubs if stub.seen is not None]
        if missing:
            raise CannotStream(f"blocks {missing} do not run on token ids alone. {_WITHOUT_TEXT}")
        changed = [i for i, x in enumerate(seen) if x is not seen[0] and not torch.equal(x, seen[0])]
        if changed or seen[0].dim() != 3 or seen[0].shape[:2] != ids_1T.shape:
            raise CannotStream(
                f"{type(self.model).__name__} "
                + (
                    f"changes the hidden states before block {changed[0]}"
                    if changed
                    else f"holds {list(seen[0].shape)}"
                )
                + " between its blocks; expected one vector for each token, handed on from block to block. "
                + _WITHOUT_TEXT
            )
        return seen[0], [stub.call for stub in stubs if stub.call is not None]

    def enter_all(self, source: ModelSource, ids_NT: Tensor) -> Iterator[tuple[Tensor, list[Call]]]:
        """:meth:`enter` for every window, with what that needs loaded from ``source`` meanwhile.

        Raises:
            CannotStream: as :meth:`enter`; blocks that need more of each other than hidden states.
        """
        check_blocks_run_alone(self.architecture)
        before = outside(self.model, self.architecture, only_base=True)
        blocks = [f"{self.architecture.blocks}.{i}" for i in self.samples]
        source.load(self.model, before)
        for block in blocks:
            source.load_into(self.model, block)
        self.find_answers()
        for block in blocks:
            source.release(self.model, block)
        for ids_T in ids_NT:
            yield self.enter(ids_T[None])
        source.release_tensors(self.model, before)

    def enter_windows(
        self,
        source: ModelSource,
        ids_NT: Tensor,
        take: Callable[[int, Tensor], None],
        keep: Callable[[Tensor], Tensor] = lambda tensor: tensor.clone(),
    ) -> list[Call]:
        """Every block's arguments for all windows; ``take(w, hidden [1, T, d])`` is given the first block's inputs, and
        ``keep`` puts away a tensor of a window."""
        arguments = _Arguments(keep)
        for w, (hidden, calls) in enumerate(self.enter_all(source, ids_NT)):
            arguments.add(calls)
            take(w, hidden)
        return arguments.calls()

    @contextmanager
    def loaded_outside(self, source: ModelSource) -> Iterator[None]:
        """While open, everything outside the blocks has its weights: what :meth:`logits` needs."""
        names = outside(self.model, self.architecture)
        source.load(self.model, names)
        try:
            yield
        finally:
            source.release_tensors(self.model, names)

    def logits(self, ids_1T: Tensor, hidden_1Td: Tensor) -> Tensor:
        """Logits ``[T, vocabulary]`` of the part after the blocks for the hidden states of one window.

        Differentiable in the hidden states where they require a gradient.
        """
        with torch.set_grad_enabled(hidden_1Td.requires_grad), self._stubs(hidden_1Td):
            return self.model(input_ids=ids_1T, use_cache=False).logits[0]
