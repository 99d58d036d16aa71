"""A description of a model for the compiled step, or the reason why the step cannot run it.

The architecture's table (``token_step``) and the layers themselves decide whether a model qualifies. A description holds
addresses, so it also records its sources and compares them. It is made again when a layer was replaced, restored, moved
or cast, a tensor has new memory, a number or a hook was changed or added, or what is read once (indices, scales, rotary
frequencies) was changed in place. The compiled code itself sees weights, gains and biases that change in place.
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
from lowbit.compiled import ENVIRONMENT
from lowbit.decoding.cache import PackedRoom, Room
from lowbit.kernels.native import DTYPES
from lowbit.kernels.step import DecoderBlock, Linear, RmsNorm, TokenStep, why_not
from lowbit.modules import QuantEmbedding, QuantLinear
from lowbit.transforms import Normalize, Scale

_TOGETHER = 512
"""Positions whose angles are made at once."""
_MOST_POSITIONS = 2**24
"""Positions that float32, in which models compute angles, tells apart."""


class _NotDescribed(Exception):
    """The reason why the step cannot run a model."""


class _Watch:
    """The sources of a description, and whether they are unchanged."""

    def __init__(self) -> None:
        self._entries = kernels.step.watch()
        self._seen: set[tuple[int, str]] = set()
        self._hooks: list[dict[Any, Any]] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._read: list[Tensor] = []
        self._versions: list[int] = []

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

    def tensor(self, module: nn.Module, name: str, *, read_once: bool = False) -> Tensor | None:
        """A parameter or buffer of floats, whose memory is watched from now on; ``read_once``: its values too."""
        tensor = self.memory(module, name, read_once=read_once)
        if tensor is None:
            return None
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise _NotDescribed(f"a {name} is {tensor.dtype} on {tensor.device}")
        return tensor

    def memory(self, module: nn.Module, name: str, *, read_once: bool) -> Tensor | None:
        """A parameter or buffer of any kind, watched likewise."""
        held = module._parameters if name in module._parameters else module._buffers
        self.see(held, name)
        tensor = held.get(name)
        if tensor is None:
            return None
        self._tensors.append(tensor)
        self._addresses.append(tensor.data_ptr())
        if read_once and not tensor.is_inference():
            self._read.append(tensor)
            self._versions.append(tensor._version)
        return tensor

    def current(self) -> bool:
        """Whether all sources are unchanged and no hook was added."""
        unmoved = list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        unchanged = [t._version for t in self._read] == self._versions
        return unmoved and unchanged and self._entries.same() and not self.has_hooks()

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
    _angles: tuple[int, Tensor, Tensor] | None = None

    def current(self) -> bool:
        """Whether the model is unchanged since its description."""
        return self._watch.current()

    def run(self, ids: Tensor, room: Room | PackedRoom, position: int) -> Tensor:
        """Logits ``[V]`` after the token ``ids`` ``[1, 1]``; appends the token's keys and values to ``room``.

        Raises:
            ValueError: a key or value that the format of a packed cache cannot store.
        """
        if isinstance(room, PackedRoom):
            logits = self._step.packed(
                self._embed(ids).view(-1), room.keys, room.values, room.length, *self._turned(position)
            )
            room.advance()
            if logits is None:
                raise ValueError(
                    "keys or values have no scale that the cache's format stores; set scale_dtype to 'float32'"
                )
            return logits
        length = room.lengths[0]
        room.reserve(length + 1)
        cos, sin = self._turned(position)
        x = self._embed(ids).view(-1)
        logits = self._step(x, *room.addresses(), self.cache[-1], room.capacity, length, cos, sin)
        room.advance()
        return logits

    def _turned(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a position, float32 ``[rotary]``; those of its neighbours are kept."""
        start = position - position % _TOGETHER
        if self._angles is None or self._angles[0] != start:
            self._angles = start, *_angles(self._rotary, start, self.cache[-1])
        _, cos, sin = self._angles
        return cos[position - start], sin[position - start]


def position_of(position: Any, length: int) -> int | None:
    """The position of the token behind ``length`` others: ``length`` where ``position`` is None, else the one number in it;
    None where the step does not take it, a fraction, a negative or a huge one."""
    if position is None:
        return length
    if not isinstance(position, Tensor) or position.numel() != 1 or position.is_floating_point():
        return None
    at = int(position)
    return at if 0 <= at < _MOST_POSITIONS else None


def _angles(rotary: nn.Module, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions from ``start``, float32 ``[_TOGETHER, rotary]``."""
    with torch.inference_mode(False), torch.no_grad():
        cos, sin = rotary(torch.empty(1, dtype=dtype), position_ids=torch.arange(start, start + _TOGETHER)[None])
    return cos[0].float().contiguous(), sin[0].float().contiguous()


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
    embedding = watch.tensor(embed, "like" if isinstance(embed, QuantEmbedding) else "weight")
    if embedding is None:
        raise _NotDescribed("the embedding is not a table")
    width = embed.embedding_dim if isinstance(embed, QuantEmbedding) else embedding.shape[1]
    norm = _norm(watch, watch.module(model, table.final_norm), 0.0)
    head = _linear(watch, watch.module(model, table.head), table.head)
    rotary = watch.module(model, token_step.rotary)
    watch.tensor(rotary, "inv_freq", read_once=True)
    for number in ("attention_scaling", "rope_type"):
        watch.see(rotary.__dict__, number)
    if watch.has_hooks():
        raise _NotDescribed("a forward hook is registered inside the model")
    angles = _angles(rotary, 0, embedding.dtype)
    turned = angles[0].shape[-1]
    if turned != heads.rotary:
        raise _NotDescribed(f"the rotary embedding turns {turned} channels of a head, the table says {heads.rotary}")
    try:
        step = TokenStep(isa, width, heads.query, heads.key_value, heads.dim, heads.rotary, parts, norm, head)
    except ValueError as error:
        raise _NotDescribed(str(error)) from error
    return Described(
        isa, (len(blocks), heads.key_value, heads.dim, embedding.dtype), step, embed, rotary, watch, (0, *angles)
    )


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
    name = next((name for name in ("variance_epsilon", "eps") if name in norm.__dict__), "eps")
    watch.see(norm.__dict__, name)
    eps = norm.__dict__.get(name)
    if gain is None or eps is None:
        raise _NotDescribed(f"a norm is {type(norm).__name__}")
    return RmsNorm(gain, eps, gain_offset)


def _multiplier(scales: tuple[Any, ...]) -> Tensor | None:
    """What ``scales``, one after another, multiply each channel by, float32; None where there are none."""
    if not scales:
        return None
    divisors = torch.stack([scale.s.double() for scale in scales])
    return (1 / divisors.prod(0)).float()


def _linear(watch: _Watch, layer: nn.Module, role: str) -> Linear:
    bias = watch.tensor(layer, "bias")
    if type(layer) is nn.Linear:
        return Linear(weight=watch.tensor(layer, "weight"), bias=bias)
    if not isinstance(layer, QuantLinear):
        raise _NotDescribed(f"{role} is a {type(layer).__name__}")
    try:
        ready, tiles = layer.prepared, layer.tiles
    except ValueError as error:  # of a tensor that was changed after loading; the ordinary forward says it too
        raise _NotDescribed(f"{role}: {error}") from error
    for name in layer._buffers:  # the compiled code reads tiles and the bias anew for each token
        watch.memory(layer, name, read_once=name not in ("tiles", "bias"))
    if ready is None or tiles is None:
        raise _NotDescribed(f"{role} is not packed for the compiled kernels")
    pre, post = ready.transforms["pre"], ready.transforms["post"]
    normalizing = [t.eps for t in post[-1:] if isinstance(t, Normalize)]
    scales = pre, post[: len(post) - len(normalizing)]
    if not all(isinstance(t, Scale) for each in scales for t in each):
        raise _NotDescribed(f"{role} has transforms of its own other than scales, which run in torch")
    before, after = map(_multiplier, scales)
    linear = Linear(
        product=ready.product,
        tiles=tiles,
        side_terms=ready.side_terms,
        bias=bias,
        before=before,
        after=after,
        eps=normalizing[0] if normalizing else None,
    )
    if reason := why_not(linear):
        raise _NotDescribed(f"{role}: {reason}")
    return linear
