"""Keys and values with room for more, as a layer of transformers' own dynamic cache.

transformers appends a token by copying all tokens. Here a buffer has room, which doubles when it is used up, and
the compiled step writes into it. The layer is otherwise transformers': what sets its keys or values (reordering,
selection, cropping) makes it an ordinary layer again, which :func:`adopt` takes back.

Shapes: H key-value head, C capacity, D dim of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 256
"""Tokens of the smallest buffer; all others have a power of two as many."""


class Growing(DynamicLayer):
    """Keys and values of one sequence in a buffer ``[2, 1, H, C, D]``; without one, as its base class."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._length = 0
        self._alone: dict[str, Tensor | None] = {}
        super().__init__()

    @staticmethod
    def of(layer: DynamicLayer) -> Growing:
        """The tokens of ``layer`` (batch 1), copied into a buffer."""
        assert layer.keys is not None and layer.values is not None
        made = Growing()
        made.dtype, made.device, made.is_initialized = layer.keys.dtype, layer.keys.device, True
        _, heads, length, dim = layer.keys.shape
        made._buffer = _buffer(layer.keys, heads, length + 1, dim)
        made._length = length
        made._buffer[0, ..., :length, :] = layer.keys
        made._buffer[1, ..., :length, :] = layer.values
        return made

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[1, H, tokens, D]``, a view of the buffer."""
        return self._get("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._set("keys", value)

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[1, H, tokens, D]``, a view of the buffer."""
        return self._get("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._set("values", value)

    @property
    def attached(self) -> bool:
        """Whether the tokens are in the buffer."""
        return self._buffer is not None

    @property
    def kind(self) -> tuple[int, int, torch.dtype]:
        """Heads, their dim and dtype, of a buffer."""
        assert self._buffer is not None
        return self._buffer.shape[2], self._buffer.shape[4], self._buffer.dtype

    @property
    def capacity(self) -> int:
        """Tokens that the buffer has room for."""
        return 0 if self._buffer is None else self._buffer.shape[3]

    def addresses(self) -> tuple[int, int]:
        """Of the keys and the values of the buffer, each ``[H, C, D]``."""
        assert self._buffer is not None
        start = self._buffer.data_ptr()
        return start, start + self._buffer.nbytes // 2

    def reserve(self, tokens: int) -> None:
        """Room for at least so many tokens."""
        old = self._buffer
        assert old is not None
        if tokens > self.capacity:
            new = _buffer(old, old.shape[2], tokens, old.shape[4])
            new[..., : self._length, :] = old[..., : self._length, :]
            self._buffer = new

    def written(self, tokens: int) -> None:
        """So many tokens more are in the buffer."""
        self._length += tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends states ``[1, H, tokens, D]`` and returns all of them."""
        buffer = self._buffer
        fits = buffer is not None and key_states.shape[0] == 1 and key_states.dtype == buffer.dtype
        if not fits or key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        end = self._length + key_states.shape[-2]
        self.reserve(end)
        assert self._buffer is not None
        self._buffer[0, ..., self._length : end, :] = key_states
        self._buffer[1, ..., self._length : end, :] = value_states
        self._length = end
        return self._view(0), self._view(1)

    def get_seq_length(self) -> int:
        """Tokens that are held."""
        return self._length if self.attached else super().get_seq_length()

    def _view(self, which: int) -> Tensor:
        assert self._buffer is not None
        return self._buffer[which, ..., : self._length, :]

    def _get(self, name: str) -> Tensor | None:
        return self._alone.get(name) if self._buffer is None else self._view(name == "values")

    def _set(self, name: str, value: Tensor | None) -> None:
        if self._buffer is not None:
            self._alone = {"keys": self._view(0), "values": self._view(1)}
            self._buffer = None
        self._alone[name] = value


def adopt(cache: Any, layers: int, heads: int, dim: int, dtype: torch.dtype) -> list[Growing] | str:
    """The layers of ``cache``, all of one length and with room for one more token; or why there are none.

    Ordinary layers of the cache are replaced by :class:`Growing` ones of the same tokens.

    Args:
        cache: what a model's forward was given.
        layers, heads, dim, dtype: of the keys and values that the model makes.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return f"the cache is a {type(cache).__name__}, not a DynamicCache in memory"
    found: list[Any] = cache.layers
    if len(found) != layers:
        return f"the cache has {len(found)} of {layers} layers"
    length = found[0].get_seq_length()
    for i, layer in enumerate(found):
        if type(layer) not in (Growing, DynamicLayer):
            return f"the cache has a {type(layer).__name__}, not a DynamicLayer"
        if length == 0 or layer.get_seq_length() != length:
            return "the cache is empty or uneven"
        if type(layer) is DynamicLayer or not layer.attached:
            if len(layer.keys) != 1 or layer.keys.device.type != "cpu":
                return f"the cache holds {len(layer.keys)} sequences on {layer.keys.device}"
            found[i] = Growing.of(layer)
        if found[i].kind != (heads, dim, dtype):
            return "the cache is another model's"
    room = max(length + 1, *(layer.capacity for layer in found))
    for layer in found:
        layer.reserve(room)
    return found


def _buffer(like: Tensor, heads: int, tokens: int, dim: int) -> Tensor:
    room = LEAST_ROOM
    while room < tokens:
        room *= 2
    with torch.inference_mode(False):  # it is written to again in any mode
        return torch.empty(2, 1, heads, room, dim, dtype=like.dtype, device=like.device)
