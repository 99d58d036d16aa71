"""Keys and values where the compiled step reads and writes them.

For transformers' dynamic cache these are buffers with spare room, as layers of it.

transformers copies all tokens to append one. These buffers have spare room, which doubles when it is used up, and the
compiled step writes into them. Otherwise the layers behave as in transformers: setting keys or values (reordering,
selection, cropping) makes an ordinary layer again, until :func:`adopt` takes it back.

Shapes: H key-value head, C capacity, D dim of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lowbit.caches import PackedCache, PackedLayer
from lowbit.caches.attention import compiled_reason, packing_reason

LEAST_ROOM = 256
"""Tokens in the smallest buffer; larger buffers double it."""


class Room:
    """The buffers ``[2, H, C, D]`` of all layers of a cache, for one sequence.

    Args:
        layers: ordinary layers (batch 1) of equal length, heads, dim and dtype; their tokens are copied.
    """

    def __init__(self, layers: list[Any]):
        self.lengths = [layer.get_seq_length() for layer in layers]
        """Tokens of each layer; -1: the layer has left the room."""
        self.capacity = _capacity(max(self.lengths) + 1)
        self.buffers: list[Tensor] = []
        for layer, length in zip(layers, self.lengths, strict=True):
            buffer = _buffer(layer.keys, self.capacity)
            buffer[0, :, :length] = layer.keys[0]
            buffer[1, :, :length] = layer.values[0]
            self.buffers.append(buffer)

    @property
    def length(self) -> int:
        """Tokens of every layer."""
        return self.lengths[0]

    def reserve(self, tokens: int) -> None:
        """Makes room for at least this number of tokens in every layer."""
        if tokens <= self.capacity:
            return
        self.capacity = _capacity(tokens)
        for i, old in enumerate(self.buffers):
            length = max(self.lengths[i], 0)
            self.buffers[i] = _buffer(old, self.capacity)
            self.buffers[i][:, :, :length] = old[:, :, :length]

    def addresses(self) -> tuple[list[int], list[int]]:
        """Addresses of the keys and of the values ``[H, C, D]`` of each layer."""
        keys = [buffer.data_ptr() for buffer in self.buffers]
        half = self.buffers[0].nbytes // 2
        return keys, [address + half for address in keys]

    def advance(self) -> None:
        """Counts one more token in every layer."""
        self.lengths = [length + 1 for length in self.lengths]

    def holds(self, layers: list[Any]) -> bool:
        """Whether ``layers`` are exactly the layers of this room, with equal lengths."""
        lengths = self.lengths
        here = all(type(layer) is Growing and layer.is_in(self, i) for i, layer in enumerate(layers))
        return here and len(layers) == len(lengths) == lengths.count(lengths[0]) and lengths[0] > 0


class Growing(DynamicLayer):
    """A layer whose tokens are in a :class:`Room`; once it leaves the room it behaves like its base class."""

    def __init__(self, room: Room, index: int):
        self._room: Room | None = None
        self._alone: dict[str, Tensor | None] = {}
        super().__init__()
        self._room, self._index = room, index
        buffer = room.buffers[index]
        self.dtype, self.device, self.is_initialized = buffer.dtype, buffer.device, True

    @property
    def room(self) -> Room | None:
        """The room that holds the tokens; None after the layer left it."""
        return self._room

    def is_in(self, room: Room, index: int) -> bool:
        """Whether its tokens are layer ``index`` of ``room``."""
        return self._room is room and self._index == index

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[1, H, tokens, D]``."""
        return self._get("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._set("keys", value)

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[1, H, tokens, D]``."""
        return self._get("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._set("values", value)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends states ``[1, H, tokens, D]`` and returns all states."""
        room, i = self._room, self._index
        plain = len(key_states) > 1 or key_states.dtype != self.dtype or key_states.device != self.device
        if room is None or plain or key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        start = room.lengths[i]
        end = start + key_states.shape[2]
        room.reserve(end)
        room.buffers[i][0, :, start:end] = key_states[0]
        room.buffers[i][1, :, start:end] = value_states[0]
        room.lengths[i] = end
        return self._view(0), self._view(1)

    def get_seq_length(self) -> int:
        """Number of tokens."""
        return super().get_seq_length() if self._room is None else self._room.lengths[self._index]

    def _view(self, which: int) -> Tensor:
        assert self._room is not None
        return self._room.buffers[self._index][which, None, :, : self._room.lengths[self._index]]

    def _get(self, name: str) -> Tensor | None:
        return self._alone.get(name) if self._room is None else self._view(int(name == "values"))

    def _set(self, name: str, value: Tensor | None) -> None:
        if self._room is not None:
            self._alone = {"keys": self._view(0), "values": self._view(1)}
            self._room.lengths[self._index] = -1
            self._room = None
        self._alone[name] = value


class PackedRoom:
    """The layers of a packed cache, for one sequence, ready for one more token.

    Args:
        layers: those of the model, in order.
        keys, values: what the compiled code knows of each.
    """

    def __init__(self, layers: list[PackedLayer], keys: list[Any], values: list[Any]):
        self.layers, self.keys, self.values = layers, keys, values
        self.length = layers[0].get_seq_length()

    def advance(self) -> None:
        """Counts one more token in every layer."""
        for layer in self.layers:
            layer.after_token()

    @classmethod
    def of(cls, layers: list[Any], heads: int, dim: int, dtype: torch.dtype) -> PackedRoom | str:
        """The room, or the reason why there is none."""
        keys, values = [], []
        for layer in layers:
            if type(layer) is not PackedLayer:
                return f"the cache has a {type(layer).__name__}, not a PackedLayer"
            if not layer.is_initialized or layer.get_seq_length() != layers[0].get_seq_length():
                return "the cache is empty or uneven"
            for side in layer.sides:
                if side.shape != (1, heads, dim) or layer.dtype != dtype:
                    return "the cache holds several sequences, or is another model's"
            if reason := compiled_reason(layer) or packing_reason(layer):
                return reason
            ready = layer.before_token()
            if isinstance(ready, str):
                return ready
            keys.append(ready[0])
            values.append(ready[1])
        return cls(layers, keys, values)


def adopt(cache: Any, layers: int, heads: int, dim: int, dtype: torch.dtype) -> Room | PackedRoom | str:
    """The room of a cache, whose ordinary layers become :class:`Growing` ones with the same tokens.

    Args:
        cache: the cache in a call of a model's forward.
        layers: number of the model's layers.
        heads, dim, dtype: of the model's keys and values.

    Returns:
        The room, or the reason why there is none.
    """
    if type(cache) not in (DynamicCache, PackedCache) or cache.offloading:
        return f"the cache is a {type(cache).__name__}, not a DynamicCache in memory"
    present: list[Any] = cache.layers
    if len(present) != layers:
        return f"the cache has {len(present)} of {layers} layers"
    if type(cache) is PackedCache:
        return PackedRoom.of(present, heads, dim, dtype)
    room = present[0].room if type(present[0]) is Growing else None
    if room is None or not room.holds(present):
        for layer in present:
            if type(layer) not in (Growing, DynamicLayer):
                return f"the cache has a {type(layer).__name__}, not a DynamicLayer"
            if layer.get_seq_length() == 0 or layer.get_seq_length() != present[0].get_seq_length():
                return "the cache is empty or uneven"
            for states in (layer.keys, layer.values):
                if len(states) > 1 or states.device.type != "cpu":
                    return f"the cache holds {len(states)} sequences on {states.device}"
                if states.shape != (1, heads, layer.get_seq_length(), dim) or states.dtype != dtype:
                    return "the cache is another model's"
        room = Room(present)
        present[:] = [Growing(room, i) for i in range(layers)]
    if any((b.shape[1], b.shape[3], b.dtype) != (heads, dim, dtype) for b in room.buffers):
        return "the cache is another model's"
    return room


def _capacity(tokens: int) -> int:
    room = LEAST_ROOM
    while room < tokens:
        room *= 2
    return room


def _buffer(like: Tensor, capacity: int) -> Tensor:
    """An empty buffer with the heads, dim and dtype of ``like`` ``[..., H, tokens, D]``."""
    shape = (2, like.shape[-3], capacity, like.shape[-1])
    with torch.inference_mode(False):  # so that it can be written in any mode later
        return torch.empty(shape, dtype=like.dtype, device=like.device)
