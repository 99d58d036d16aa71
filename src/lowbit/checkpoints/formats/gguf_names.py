"""GGUF's names of a model's tensors, and back. The package gguf has the table."""

from __future__ import annotations

from typing import Any

import gguf

from lowbit.architectures.gguf import GgufArchitecture


class GgufNames:
    """GGUF's names of a model's tensors, and back."""

    def __init__(self, entry: GgufArchitecture, config: Any):
        self.entry, self.config = entry, config
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == entry.name)
        self._map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def find(self, name: str) -> str | None:
        """The name of a tensor; None where the architecture does not have it."""
        return self._map.get_name(name, try_suffixes=(".weight", ".bias"))

    def __call__(self, name: str) -> str:
        """The name of a tensor. Raises ValueError where the architecture does not have it."""
        found = self.find(name)
        if found is None:
            raise ValueError(f"llama.cpp's {self.entry.name} has no tensor for {name}")
        return found
