"""Keys, or values, of a packed layer as models get them: decoded only if something reads them.

Models hand what a cache's update returns to an attention function. One that knows packed layers reads them where they are;
everything else that computes with such a tensor gets the decoded numbers, without knowing. So packed caches are right in every
model, and fast where the attention is lowbit's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class PackedStates(Tensor):
    """``[B, H, T, D]`` that :attr:`decode` gives; :attr:`layer` holds them."""

    layer: Any
    _decode: Callable[[], Tensor]
    _decoded: Tensor | None

    @staticmethod
    def of(layer: Any, like: Tensor, length: int, decode: Callable[[], Tensor]) -> PackedStates:
        """States of ``length`` tokens with the sequences, heads, channels, dtype and device of ``like``."""
        shape = (*like.shape[:2], length, like.shape[-1])
        made = Tensor._make_wrapper_subclass(PackedStates, shape, dtype=like.dtype, device=like.device)  # pyright: ignore[reportAttributeAccessIssue]
        made.layer, made._decode, made._decoded = layer, decode, None
        return made

    def decoded(self) -> Tensor:
        """The numbers."""
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PackedStates{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            return x.decoded() if isinstance(x, PackedStates) else x

        with torch._C._DisableTorchDispatch():  # pyright: ignore[reportAttributeAccessIssue]
            return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
