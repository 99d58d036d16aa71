"""What is not quantized: the dtype in which a result stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lowbit.checkpoints.source import ModelSource
from lowbit.numerics import narrower

KeepDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, eq=False)
class Kept:
    """Dtypes of the tensors that a result of ``source`` stores unquantized.

    Args:
        choice: ``auto``: each tensor keeps the dtype that it has. Else floating tensors with more bytes an element than this
            type's are cast to it; nothing is widened.

    Raises:
        ValueError: no such choice.
    """

    source: ModelSource
    choice: KeepDtype = "auto"

    def __post_init__(self):
        if self.choice not in get_args(KeepDtype):
            raise ValueError(f"keep_dtype = {self.choice!r}: expected {', '.join(get_args(KeepDtype))}")

    @property
    def narrows(self) -> bool:
        """Whether some tensor may be cast."""
        return self._limit is not None

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the weights."""
        return narrower(self.source.dtype, self._limit)

    def dtype_of(self, name: str) -> torch.dtype:
        """That of a parameter or stored buffer of the model, experts unfused or not."""
        return narrower(self.source.dtype_of(name), self._limit)

    @property
    def _limit(self) -> torch.dtype | None:
        return None if self.choice == "auto" else getattr(torch, self.choice)
