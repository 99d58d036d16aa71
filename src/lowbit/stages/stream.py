"""Running one block of a model that is not there: its arguments, and what comes before and after all blocks.

The blocks of a skeleton are replaced by stubs while the model runs. A stub hands on the hidden states it is given and
notes the other arguments (masks, position embeddings), which differ from block to block in some models. The part
before the blocks so yields the first inputs, and the part after them turns hidden states into logits, without a word about how the
model is made. The usual catcher, which breaks off the forward pass by raising an exception, gives the first block's
arguments only and needs a second mechanism for the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.architectures import Architecture, block_modules
from lowbit.checkpoints.source import ModelSource


@dataclass(frozen=True)
class Call:
    """The arguments of a block other than its hidden states; runs any block with them."""

    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, block: Callable[..., Any], x: Tensor) -> Tensor:
        """Hidden states ``[B, T, d]`` after ``block``, which may be a module or a function of a module's signature.

        The arguments are those of one window. Where some do not broadcast over B (some position biases have windows and
        heads in one dimension), windows run one after another.
        """
        if len(x) > 1 and not all(t.dim() < 2 or len(t) == 1 for t in _tensors((self.args, self.kwargs))):
            return torch.cat([self(block, window) for window in x.split(1)])
        output = block(x, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


class _Stub(nn.Module):
    """Stands in for a block: keeps its arguments, answers with ``answer`` or with what it was given."""

    def __init__(self, original: nn.Module, as_tuple: bool, answer: Tensor | None = None):
        super().__init__()
        self.as_tuple, self.answer = as_tuple, answer
        self.call: Call | None = None
        self.seen: Tensor | None = None
        for name in ("attention_type", "layer_type", "is_sliding"):  # read by some models from outside the block
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):
        self.call, self.seen = Call(args, kwargs), hidden_states
        output = hidden_states if self.answer is None else self.answer
        return (output,) if self.as_tuple else output


def outside(model: PreTrainedModel, architecture: Architecture, *, only_base: bool = False) -> list[str]:
    """Modules outside the blocks that hold parameters or stored buffers; ``only_base``: without the head."""
    prefix, base = f"{architecture.blocks}.", f"{model.base_model_prefix}."
    names = (key for key in model.state_dict() if not key.startswith(prefix))
    return sorted({key.rpartition(".")[0] for key in names if not only_base or key.startswith(base)})


class Stream:
    """Hidden states in, hidden states and logits out, for a skeleton whose blocks come and go.

    Args:
        model: a skeleton; what comes before the blocks must be loaded before :meth:`enter`, everything outside of them
            before :meth:`logits`.
        architecture: its table.
        as_tuple: whether its blocks answer with a tuple; see :meth:`answers_with_tuple`.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, as_tuple: bool = False):
        self.model, self.architecture, self.as_tuple = model, architecture, as_tuple
        self.blocks = block_modules(model, architecture)

    @contextmanager
    def _stubs(self, answer: Tensor | None = None) -> Iterator[list[_Stub]]:
        parent_path, _, name = self.architecture.blocks.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        stubs = [_Stub(block, self.as_tuple, answer) for block in self.blocks]
        setattr(parent, name, nn.ModuleList(stubs))
        try:
            yield stubs
        finally:
            setattr(parent, name, self.blocks)

    @torch.no_grad()
    def answers_with_tuple(self) -> bool:
        """Runs the first block, which must be loaded, on two tokens to see how the blocks of this model answer."""
        with self._stubs() as stubs:
            try:
                self.model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
            except Exception:  # a model that expects tuples may fail in any way behind the first block
                if stubs[0].call is None:
                    raise
            call, seen = stubs[0].call, stubs[0].seen
        assert call is not None and seen is not None
        return isinstance(self.blocks[0](seen, *call.args, **call.kwargs), tuple)

    @torch.no_grad()
    def enter(self, ids_1T: Tensor) -> tuple[Tensor, list[Call]]:
        """The first block's inputs ``[1, T, d]`` for one window of ids, and every block's other arguments.

        Raises:
            ValueError: blocks that the model does not run.
        """
        with self._stubs() as stubs:
            self.model.base_model(input_ids=ids_1T, use_cache=False)
        missing = [i for i, stub in enumerate(stubs) if stub.call is None]
        if missing or stubs[0].seen is None:
            raise ValueError(f"blocks {missing} of {self.architecture.blocks} are not run by the model")
        return stubs[0].seen, [stub.call for stub in stubs if stub.call is not None]

    def enter_all(self, source: ModelSource, ids_NT: Tensor) -> Iterator[tuple[Tensor, list[Call]]]:
        """:meth:`enter` for every window, with what that needs loaded from ``source`` meanwhile."""
        before = (*outside(self.model, self.architecture, only_base=True), f"{self.architecture.blocks}.0")
        for module in before:
            source.load_into(self.model, module)
        self.as_tuple = self.answers_with_tuple()
        for ids_T in ids_NT:
            yield self.enter(ids_T[None])
        for module in before:
            source.release(self.model, module)

    @contextmanager
    def loaded_outside(self, source: ModelSource) -> Iterator[None]:
        """While open, everything outside the blocks has its weights: what :meth:`logits` needs."""
        for module in outside(self.model, self.architecture):
            source.load_into(self.model, module)
        try:
            yield
        finally:
            for module in outside(self.model, self.architecture):
                source.release(self.model, module)

    def logits(self, ids_1T: Tensor, hidden_1Td: Tensor) -> Tensor:
        """Logits ``[T, vocabulary]`` of the part after the blocks for the hidden states of one window.

        Differentiable in the hidden states where they require a gradient.
        """
        with torch.set_grad_enabled(hidden_1Td.requires_grad), self._stubs(hidden_1Td):
            return self.model(input_ids=ids_1T, use_cache=False).logits[0]
