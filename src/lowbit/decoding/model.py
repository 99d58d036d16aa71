"""A transformers model whose forward runs one new token by the compiled step if that computes the same.

:func:`install` changes the model's class to a child class with another ``forward``. Generation, sampling and streaming stay
transformers'. So do caches, but for a model whose formats say how its cache is held (:func:`lowbit.modules.kv_formats`):
``generate`` makes a packed one unless the call brings or names one. A plain ``model(ids, use_cache=True)`` makes
transformers' own. The ordinary forward runs when a call needs more than the next token's logits of one sequence,
or when the step cannot run the model; :func:`explain` says which forward runs, and why.

A replaced forward on the instance would be simpler, but it ties the model to itself, which keeps large models in memory
until Python collects cycles; and a copy of the model would run the original.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lowbit import kernels
from lowbit.caches import PackedCache
from lowbit.decoding.cache import adopt
from lowbit.decoding.description import Described, Refused, describe, position_of
from lowbit.decoding.packed_cache import packed_cache, read_packed
from lowbit.modules import KVFormats, kv_formats, set_kv_formats

_CACHES = ("cache", "past_key_values")
"""The argument that carries keys and values: its name since transformers 5.24, and its name before."""

_OUTPUT_CACHE = next(name for name in _CACHES if name in CausalLMOutputWithPast.__dataclass_fields__)

_UNDERSTOOD = (
    "input_ids",
    "attention_mask",
    "position_ids",
    *_CACHES,
    "use_cache",
    "logits_to_keep",
    "return_dict",
)


def install(model: PreTrainedModel) -> None:
    """Makes ``model`` run single tokens by the compiled step whenever possible; see :func:`explain`."""
    if not isinstance(model, _Stepping):
        model.__class__ = _stepping(type(model))


def use_cache(model: PreTrainedModel, formats: KVFormats) -> None:
    """Makes ``generate`` hold keys and values in ``formats``, and measurements read through such a cache; without formats, as
    transformers does.

    Raises:
        ValueError: formats that the model cannot have.
    """
    if formats:
        packed_cache(model, formats.kv, formats.overrides)
        read_packed(model)
    set_kv_formats(model, formats)
    install(model)


def uninstall(model: PreTrainedModel) -> None:
    """Undoes :func:`install`: the ordinary forward runs every token."""
    if isinstance(model, _Stepping):
        model.__class__ = type(model).__bases__[1]


def cache_argument(model: nn.Module) -> str:
    """The name of the argument of ``model``'s forward, and of its output, that carries what it remembers.

    transformers 5.24 renamed ``past_key_values`` and ``cache_params`` to ``cache``; a model with code of its own may keep
    the old name.

    Raises:
        ValueError: the forward has no such argument, so the model cannot continue a text token by token.
    """
    names = inspect.signature(model.forward).parameters
    for name in (*_CACHES, "cache_params"):
        if name in names:
            return name
    raise ValueError(f"{type(model).__name__}.forward has no cache argument; it cannot continue a text token by token.")


def explain(model: nn.Module) -> str:
    """Whether the compiled step runs one new token, if not why, and how many tokens it has run."""
    if not isinstance(model, _Stepping):
        return "No compiled step of one token: the model was not loaded as a lowbit checkpoint."
    described = model._described()
    if isinstance(described, Refused):
        return f"No compiled step of one token: {described.reason}."
    isa = kernels.native.MATRIX_TILES.get(described.isa, described.isa)  # one token is too few for tiles
    text = f"One new token of one sequence runs as one compiled step ({isa}, {torch.get_num_threads()} threads)."
    kept = model._kept()
    if kept.steps or kept.others:
        text += f" So far: {kept.steps} tokens by it"
        text += f", {kept.others} by the ordinary forward (last: {kept.reason})." if kept.others else "."
    return text


class _Kept:
    """What is known of one model: its description, and which forward ran its single tokens. A copy starts anew."""

    def __init__(self) -> None:
        self.described: Described | Refused | None = None
        self.steps = 0
        """Tokens that the compiled step has run."""
        self.others = 0
        """Single tokens with a cache that the ordinary forward has run."""
        self.reason = ""
        """Why the ordinary forward ran the last of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


class _Stepping:
    """The parts that :func:`install` adds to a model's class."""

    def _kept(self: Any) -> _Kept:
        return self.__dict__.setdefault("_lowbit_step", _Kept())

    def _described(self: Any) -> Described | Refused:
        kept = self._kept()
        isa = kernels.forced() or next(iter(kernels.native.instruction_sets()), "")
        now = kept.described
        if now is None or now.isa != isa or not now.current():
            now = kept.described = describe(self, isa)
        return now

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Lets transformers make the cache; puts a packed one in its place where the model's formats say so."""
        formats = kv_formats(self)
        ours = bool(formats) and generation_config.cache_implementation is None
        ours = ours and all(model_kwargs.get(name) is None for name in _CACHES)
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for name in _CACHES:
            if ours and type(model_kwargs.get(name)) is DynamicCache:
                model_kwargs[name] = packed_cache(self, formats.kv, formats.overrides)
            if isinstance(cache := model_kwargs.get(name), PackedCache):
                cache.pad(_padding(model_kwargs.get("attention_mask")))
        return result

    def _one_token(self: Any, inputs: dict[str, Any]) -> CausalLMOutputWithPast | None:
        """The output for one new token after a cache, or None if the ordinary forward must compute it."""
        ids, caches = inputs.get("input_ids"), [inputs[name] for name in _CACHES if inputs.get(name) is not None]
        if len(caches) != 1 or not isinstance(ids, Tensor) or ids.shape != (1, 1):
            return None
        kept, output = self._kept(), self._step(ids, caches[0], inputs)
        if isinstance(output, str):
            kept.others, kept.reason = kept.others + 1, output
            return None
        kept.steps += 1
        return output

    def _step(self: Any, ids: Tensor, cache: Any, inputs: dict[str, Any]) -> CausalLMOutputWithPast | str:
        """The output for the token ``ids`` ``[1, 1]``, or the reason why the step does not compute it."""
        if self.training or torch.is_grad_enabled():
            return "the model is in training mode, or gradients are on"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if _asks_more(inputs, self.config):
            return "the call asks for more than the last token's logits"
        described = self._described()
        if isinstance(described, Refused):
            return described.reason
        room = adopt(cache, *described.cache)
        if isinstance(room, str):
            return room
        length = room.length
        mask, position = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None and (mask.shape != (1, length + 1) or not bool(mask.all())):
            return "the attention mask hides tokens"
        at = position_of(position, length)
        if at is None:
            return "the position is not one that the step can turn to"
        logits = described.run(ids, room, at)
        return CausalLMOutputWithPast(**{"logits": logits.view(1, 1, -1), _OUTPUT_CACHE: cache})


def _padding(mask: Any) -> int:
    """The most leading positions that a row of an attention mask ``[B, T]`` hides."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return 0
    return int((mask.cumsum(1) == 0).sum(1).max())


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
            if (output := self._one_token(inputs)) is not None:
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
