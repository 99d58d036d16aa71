"""A description of a model for the compiled step, or the reason why the step cannot run it.

The architecture's table (``token_step``) and the layers themselves decide whether a model qualifies. A description holds
addresses, so it also records its sources and compares them. It is made again when a layer was replaced, restored, moved
or cast, a parameter has new memory, or a hook was added. The compiled code itself sees values that change in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from lowbit import kernels
from lowbit.architectures import Architecture, for_config
from lowbit.architectures.attention import SPEC
from lowbit.decoding.cache import Room
from lowbit.kernels.native import DTYPES
from lowbit.kernels.ops import ENVIRONMENT
from lowbit.kernels.step import DecoderBlock, Linear, RmsNorm, TokenStep, why_not
from lowbit.modules import QuantLinear


class _NotDescribed(Exception):
    """The reason why the step cannot run a model."""


class _Watch:
    """The sources of a description, and whether they are unchanged."""

    def __init__(self) -> None:
        self._entries = kernels.step.watch()
        self._seen: set[tuple[int, str]] = set()
        self._hooks: list[dict[Any, Any]] = []
        self._parameters: list[Tensor] = []
        self._addresses: list[int] = []

    def module(self, parent: nn.Module, path: str) -> nn.Module:
        """The module at ``path``; watches it and the modules on the way."""
        for name in path.split("."):
            inner = parent._modules.get(name)
            if inner is None:
                raise _NotDescribed(f"there is no module {path}")
            self.see(parent._modules, name)
            if self.see(inner.__dict__, "forward"):
                for hooks in (inner._forward_hooks, inner._forward_pre_hooks):
                    self._hooks.append(hooks)
                    self._entries.empty(hooks)
            if "forward" in inner.__dict__:
                raise _NotDescribed(f"the forward of {path} was replaced")
            parent = inner
        return parent

    def tensor(self, module: nn.Module, name: str) -> Tensor | None:
        """A parameter or buffer, which is watched from now on."""
        parameter = name in module._parameters
        held = module._parameters if parameter else module._buffers
        self.see(held, name)
        tensor = held.get(name)
        if tensor is None:
            return None
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise _NotDescribed(f"a {name} is {tensor.dtype} on {tensor.device}")
        if parameter:  # casts and moves give a parameter new memory, but replace a buffer
            self._parameters.append(tensor)
            self._addresses.append(tensor.data_ptr())
        return tensor

    def current(self) -> bool:
        """Whether all sources are unchanged and no hook was added."""
        unmoved = [p.data_ptr() for p in self._parameters] == self._addresses
        return unmoved and self._entries.same() and not self.has_hooks()

    def has_hooks(self) -> bool:
        """Whether hooks exist, which the step would not call."""
        if torch_modules._has_any_global_hook():
            return True
        return not self._entries.all_empty() and any(_listens(hook) for hooks in self._hooks for hook in hooks.values())

    def see(self, place: dict[str, Any], name: str) -> bool:
        """Watches ``place[name]``, which may be absent. Returns False if it was watched before."""
        if (id(place), name) in self._seen:
            return False
        self._seen.add((id(place), name))
        self._entries.entry(place, name, place.get(name), name in place)
        return True


def _listens(hook: Any) -> bool:
    """Whether a hook counts: transformers' own recorder does not, because it is idle unless hidden states are requested."""
    return getattr(hook, "__module__", "") != "transformers.utils.output_capturing"


@dataclass
class Described:
    """A model described for the compiled step.

    Args:
        isa: the kernel that runs.
        cache: layers, heads, dim and dtype of the keys and values: arguments of :func:`lowbit.decoding.cache.adopt`.
    """

    isa: str
    cache: tuple[int, int, int, torch.dtype]
    _step: TokenStep
    _embed: nn.Module
    _rotary: nn.Module
    _watch: _Watch
    _angles: tuple[Tensor, Tensor] | None = None

    def current(self) -> bool:
        """Whether the model is unchanged since its description."""
        return self._watch.current()

    def run(self, ids: Tensor, room: Room, position: int) -> Tensor:
        """Logits ``[V]`` after the token ``ids`` ``[1, 1]``; appends the token's keys and values to ``room``."""
        length = room.lengths[0]
        room.reserve(length + 1)
        cos, sin = self._turned(position)
        x = self._embed(ids).view(-1)
        logits = self._step(x, *room.addresses(), self.cache[-1], room.capacity, length, cos[position], sin[position])
        room.advance()
        return logits

    def _turned(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions up to this one or further, float32 ``[positions, rotary]``."""
        if self._angles is None or position >= len(self._angles[0]):
            count = 512
            while count <= position:
                count *= 2
            with torch.inference_mode(False), torch.no_grad():
                x = torch.empty(1, dtype=self.cache[-1])
                cos, sin = self._rotary(x, position_ids=torch.arange(count)[None])
            self._angles = cos[0].float().contiguous(), sin[0].float().contiguous()
        return self._angles


@dataclass
class Refused:
    """The reason why the compiled step with kernel ``isa`` does not run a model."""

    isa: str
    reason: str
    _watch: _Watch

    def current(self) -> bool:
        """Whether the sources of the reason are unchanged."""
        return self._watch.current()


def describe(model: PreTrainedModel, isa: str) -> Described | Refused:
    """A description of ``model`` for the kernel ``isa``, or the reason why the compiled step does not run it."""
    watch = _Watch()
    try:
        return _describe(model, isa, watch)
    except _NotDescribed as reason:
        return Refused(isa, str(reason), watch)


def _describe(model: PreTrainedModel, isa: str, watch: _Watch) -> Described:
    if not kernels.native.instruction_sets():
        raise _NotDescribed("lowbit was installed without its compiled kernels")
    if isa not in kernels.native.instruction_sets():
        raise _NotDescribed(f"{ENVIRONMENT}={isa} is set")
    table = for_config(model.config)
    token_step = table.token_step
    if isinstance(token_step, str):
        raise _NotDescribed(f"{table.name}: {token_step}")
    heads = table.heads
    assert heads is not None and table.final_norm is not None and table.head is not None
    blocks = cast("nn.ModuleList", watch.module(model, table.blocks))
    parts = [_block(watch, watch.module(blocks, str(i)), table) for i in range(len(blocks))]
    if not any(isinstance(module, QuantLinear) for module in blocks.modules()):
        raise _NotDescribed("no layer is packed")
    embed = watch.module(model, table.embed[0])
    embedding = watch.tensor(embed, "weight")
    if embedding is None:
        raise _NotDescribed("the embedding is not a table")
    norm = _norm(watch, watch.module(model, table.final_norm), 0.0)
    head = _linear(watch, watch.module(model, table.head), table.head)
    rotary = watch.module(model, token_step.rotary)
    watch.tensor(rotary, "inv_freq")
    if watch.has_hooks():
        raise _NotDescribed("a forward hook is registered inside the model")
    try:
        step = TokenStep(
            isa, embedding.shape[1], heads.query, heads.key_value, heads.dim, heads.rotary, parts, norm, head
        )
    except ValueError as error:
        raise _NotDescribed(str(error)) from error
    return Described(isa, (len(blocks), heads.key_value, heads.dim, embedding.dtype), step, embed, rotary, watch)


def _block(watch: _Watch, block: nn.Module, table: Architecture) -> DecoderBlock:
    paths = {entry.role: entry.path for entry in table.linears}
    norms = {entry.role: entry for entry in table.norms}
    attends = watch.module(block, paths["o"].rpartition(".")[0])
    watch.see(attends.__dict__, SPEC)
    if getattr(attends, SPEC, None) is not None:
        raise _NotDescribed("queries, keys and values are quantized, which runs in torch")

    def linear(role: str) -> Linear:
        return _linear(watch, watch.module(block, paths[role]), role)

    def norm(role: str) -> RmsNorm:
        return _norm(watch, watch.module(block, norms[role].path), norms[role].gain_offset)

    return DecoderBlock(
        attention_norm=norm("attention_norm"),
        q=linear("q"),
        k=linear("k"),
        v=linear("v"),
        q_norm=norm("q_norm") if "q_norm" in norms else None,
        k_norm=norm("k_norm") if "k_norm" in norms else None,
        o=linear("o"),
        mlp_norm=norm("mlp_norm"),
        gate=linear("gate"),
        up=linear("up"),
        down=linear("down"),
    )


def _norm(watch: _Watch, norm: nn.Module, gain_offset: float) -> RmsNorm:
    gain = watch.tensor(norm, "weight")
    eps = next((norm.__dict__[name] for name in ("variance_epsilon", "eps") if name in norm.__dict__), None)
    if gain is None or eps is None:
        raise _NotDescribed(f"a norm is {type(norm).__name__}")
    return RmsNorm(gain, eps, gain_offset)


def _linear(watch: _Watch, layer: nn.Module, role: str) -> Linear:
    bias = watch.tensor(layer, "bias")
    if type(layer) is nn.Linear:
        return Linear(weight=watch.tensor(layer, "weight"), bias=bias)
    if not isinstance(layer, QuantLinear):
        raise _NotDescribed(f"{role} is a {type(layer).__name__}")
    ready, tiles = layer.prepared, layer.tiles
    watch.see(layer._buffers, "tiles")
    if ready is None or tiles is None:
        raise _NotDescribed(f"{role} is not packed for the compiled kernels")
    if any(ready.transforms.values()):
        raise _NotDescribed(f"{role} has transforms of its own, which run in torch")
    linear = Linear(product=ready.product, tiles=tiles, side_terms=ready.side_terms, bias=bias)
    if reason := why_not(linear):
        raise _NotDescribed(f"{role}: {reason}")
    return linear
