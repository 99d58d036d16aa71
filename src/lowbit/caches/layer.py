"""One attention layer of a cache, its keys and values packed, as transformers' caches hold layers.

Shapes: B sequence, H key-value head, T token, D channel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lowbit.caches.compiled import Description
from lowbit.caches.coordinates import Coordinates
from lowbit.caches.side import Side
from lowbit.caches.states import PackedStates
from lowbit.modules import KVSpec
from lowbit.numerics import straight_through


class PackedLayer(CacheLayerMixin):
    """Keys and values of one layer in the formats of ``spec``.

    Args:
        spec: the formats.
        key, value: coordinates in which they are quantized.
        frequencies: of the rotary embedding, where ``spec`` packs keys before it.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        spec: KVSpec,
        key: Coordinates | None = None,
        value: Coordinates | None = None,
        frequencies: Tensor | None = None,
    ):
        self.spec = spec
        self._coordinates = key or Coordinates(), value or Coordinates()
        self._frequencies = frequencies
        self.padding = 0
        """Leading positions that some sequence of the batch does not use."""
        self.lazy = False
        """Return states that are decoded only if something reads them."""
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        spec = self.spec
        key, value = self._coordinates
        self.key_side = Side(
            spec.key,
            spec.recent,
            spec.sink,
            key,
            rotated=spec.key_rotation is not None,
            centred=spec.centred,
            frequencies=self._frequencies if spec.before_rope else None,
        )
        self.value_side = Side(spec.value, spec.recent, spec.sink, value, rotated=spec.value_rotation is not None)
        self._descriptions = Description(), Description()
        self._unread: set[int] = set()
        self.is_initialized = False

    @property
    def packs(self) -> bool:
        """Whether its formats pack anything."""
        return self.spec.key is not None or self.spec.value is not None

    def with_coordinates(self, key: Coordinates | None, value: Coordinates | None) -> PackedLayer:
        """An empty layer in the same formats, in other coordinates."""
        return PackedLayer(self.spec, key, value, self._frequencies)

    @property
    def sides(self) -> tuple[Side, Side]:
        """Keys and values."""
        return self.key_side, self.value_side

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes over the dtype and device of the states ``[B, H, T, D]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for side, states in zip(self.sides, (key_states, value_states), strict=True):
            side.begin(states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends states ``[B, H, T, D]`` and returns all tokens, those that are packed decoded.

        Raises:
            ValueError: states of another batch, or that the format cannot store.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        for side, states in zip(self.sides, (key_states, value_states), strict=True):
            side.append(states.detach())
        if not self.spec.past_only:
            self.settle()
        whole = self.spec.key is None and self.spec.value is None
        if self.lazy and not whole and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._unread = {0, 1}
            length = self.get_seq_length()
            keys, values = (
                PackedStates.of(self, states, length, partial(self._read_late, i, length))
                for i, states in enumerate((key_states, value_states))
            )
            return keys, values
        keys, values = self.keys_values()
        self.settle()
        return _with_gradients(keys, key_states), _with_gradients(values, value_states)

    def _read_late(self, which: int, length: int) -> Tensor:
        states = self.sides[which].read(self.dtype, 0, length)
        self._unread.discard(which)
        if not self._unread:
            self.settle()
        return states

    def settle(self) -> None:
        """Packs what leaves the windows. Between an update and this, new tokens are held as they came."""
        for side in self.sides:
            side.settle(self.padding)

    def descriptions(self) -> tuple[Any, Any]:
        """Keys and values as the compiled code sees them."""
        keys, values = self._descriptions
        return keys.current(self.key_side), values.current(self.value_side)

    def before_token(self) -> tuple[Any, Any] | str:
        """Keys and values as the compiled step sees them before it adds a token; or the reason why it cannot."""
        self.settle()
        both = []
        for side, description in zip(self.sides, self._descriptions, strict=True):
            native = description.before_token(side)
            if isinstance(native, str):
                return native
            both.append(native)
        return both[0], both[1]

    def after_token(self) -> None:
        """Counts the token that the compiled step has added."""
        for side, description in zip(self.sides, self._descriptions, strict=True):
            description.after_token(side)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """All keys and values, decoded, ``[B, H, T, D]`` each.

        Raises:
            ValueError: there are none yet.
        """
        if not self.is_initialized:
            raise ValueError("the cache layer is empty: it has no keys and values yet")
        return self.key_side.read(self.dtype), self.value_side.read(self.dtype)

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All keys, decoded."""
        return self.keys_values()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All values, decoded."""
        return self.keys_values()[1] if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return self.key_side.nbytes + self.value_side.nbytes

    def get_seq_length(self) -> int:
        """Number of tokens."""
        return self.key_side.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys for queries that are about to come, and of the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last ``-tokens_to_remove`` tokens. Ranges of what stays in a block stay as they are.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, found {tokens_to_remove}")
        for side in self.sides:
            side.crop(-tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        self._select(lambda count: torch.arange(count).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices``."""
        self._select(lambda count: torch.arange(count)[indices.cpu()])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes over the sequences of other beams."""
        self._select(lambda _: beam_idx)

    def _select(self, index: Any) -> None:
        if self.is_initialized:
            self._descriptions = Description(), Description()
            for side in self.sides:
                assert side.waiting is not None
                side.select(index(len(side.waiting.buffer)))

    def to(self, device: torch.device | str) -> PackedLayer:
        """Moves all it holds to ``device``, in place."""
        for side in self.sides:
            side.to(torch.device(device))
        self.device = torch.device(device)
        self._descriptions = Description(), Description()
        return self

    def offload(self) -> None:
        """Refused: packed tokens stay where they are."""
        raise ValueError("a packed cache is not offloaded; leave offloading out")

    prefetch = offload


def _with_gradients(all_BHTD: Tensor, new_BHTD: Tensor) -> Tensor:
    """All tokens, the last of which are ``new_BHTD`` as they are or rounded, with gradients to those; earlier ones are constants."""
    if not (torch.is_grad_enabled() and new_BHTD.requires_grad):
        return all_BHTD
    past, new = all_BHTD.split((all_BHTD.shape[2] - new_BHTD.shape[2], new_BHTD.shape[2]), 2)
    return torch.cat([past, straight_through(new, new_BHTD)], 2)
