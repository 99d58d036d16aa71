"""A transformers model whose forward runs one new token by the compiled step if that computes the same.

:func:`install` changes the model's class to a child class with another ``forward``. Generation, sampling, streaming and
caches stay transformers'. The ordinary forward runs when a call needs more than the next token's logits of one sequence,
or when the step cannot run the model; :func:`explain` says which forward runs, and why.

A replaced forward on the instance would be simpler, but it ties the model to itself, which keeps large models in memory
until Python collects cycles; and a copy of the model would run the original.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lowbit import kernels
from lowbit.decoding.cache import adopt
from lowbit.decoding.description import Described, Refused, describe, position_of

_UNDERSTOOD = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
)


def install(model: PreTrainedModel) -> None:
    """Makes ``model`` run single tokens by the compiled step whenever possible; see :func:`explain`."""
    if not isinstance(model, _Stepping):
        model.__class__ = _stepping(type(model))


def uninstall(model: PreTrainedModel) -> None:
    """Undoes :func:`install`: the ordinary forward runs every token."""
    if isinstance(model, _Stepping):
        model.__class__ = type(model).__bases__[1]


def explain(model: nn.Module) -> str:
    """One sentence: whether the compiled step runs one new token, and if not, why."""
    if not isinstance(model, _Stepping):
        return "No compiled step of one token: the model was not loaded as a lowbit checkpoint."
    described = model._described()
    if isinstance(described, Refused):
        return f"No compiled step of one token: {described.reason}."
    isa = kernels.native.MATRIX_TILES.get(described.isa, described.isa)  # one token is too few for tiles
    return f"One new token of one sequence runs as one compiled step ({isa}, {torch.get_num_threads()} threads)."


class _Kept:
    """The description of one model, or the reason why there is none; a copy of the model makes its own."""

    def __init__(self) -> None:
        self.described: Described | Refused | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


class _Stepping:
    """The parts that :func:`install` adds to a model's class."""

    def _described(self: Any) -> Described | Refused:
        kept = self.__dict__.setdefault("_lowbit_step", _Kept())
        isa = kernels.forced() or next(iter(kernels.native.instruction_sets()), "")
        now = kept.described
        if now is None or now.isa != isa or not now.current():
            now = kept.described = describe(self, isa)
        return now

    def _step(self: Any, inputs: dict[str, Any]) -> CausalLMOutputWithPast | None:
        """The output for one new token, or None if the ordinary forward must compute it."""
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        if cache is None or not isinstance(ids, Tensor) or ids.shape != (1, 1):
            return None
        if self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        if _asks_more(inputs, self.config):
            return None
        described = self._described()
        if isinstance(described, Refused):
            return None
        room = adopt(cache, *described.cache)
        if isinstance(room, str):
            return None
        length = room.lengths[0]
        mask, position = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None and (mask.shape != (1, length + 1) or not bool(mask.all())):
            return None
        at = position_of(position, length)
        if at is None:
            return None
        logits = described.run(ids, room, at)
        return CausalLMOutputWithPast(logits=logits.view(1, 1, -1), past_key_values=cache)  # pyright: ignore[reportArgumentType]


def _asks_more(inputs: dict[str, Any], config: Any) -> bool:
    """Whether the inputs ask for more than the logits of the last token."""
    if inputs.get("use_cache") is False or inputs.get("return_dict") is False:
        return True
    if not config.return_dict or config.output_attentions or config.output_hidden_states:
        return True
    keep = inputs.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep not in (0, 1):
        return True
    return any(value is not None and value is not False for name, value in inputs.items() if name not in _UNDERSTOOD)


@functools.cache
def _stepping(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """``cls`` with the compiled step before its forward, under the same name."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Nobody calls a model with more than one positional argument.
        if not torch.compiler.is_compiling() and len(args) < 2:
            inputs = {"input_ids": args[0], **kwargs} if args else kwargs
            if (output := self._step(inputs)) is not None:
                return output
        return cls.forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return (_revive, (cls,), *object.__reduce_ex__(self, protocol)[2:])

    names = ("__module__", "__qualname__", "__doc__")
    same = {name: getattr(cls, name) for name in names}
    return type(cls.__name__, (_Stepping, cls), {**same, "forward": forward, "__reduce_ex__": reduce})


def _revive(cls: type[PreTrainedModel]) -> Any:
    """An empty model of the class that :func:`install` makes from ``cls``, for copies and pickles."""
    made = _stepping(cls)
    return made.__new__(made)
