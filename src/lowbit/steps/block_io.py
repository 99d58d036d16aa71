"""Calibration windows at one block, and what lies behind it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Ahead:
    """The next original blocks, as many as a step looks ahead to and there are.

    Attributes:
        run: takes hidden states ``[B, T, d]`` of windows ``first`` and following through them; gradients pass.
        y: ``[N, T, d]``, the original stream behind the last of them.
    """

    run: Callable[[Tensor, int], Tensor]
    y: Tensor


@dataclass
class BlockIO:
    """Calibration windows at one block.

    Attributes:
        x: ``[N, T, d]``, the inputs that steps see, from the quantized blocks before or from the original ones.
        y: ``[N, T, d]`` or None, the original block's output for the original inputs: the target of learning.
        call: runs a block on one or more windows ``[B, T, d]`` and returns its hidden states.
        x_fp: ``[N, T, d]``, the inputs from the original blocks; None if they are ``x``.
        by_window: ``call`` also takes the number of the first window, because arguments of the block differ by window.
        products: makes a context for passes that only gather statistics; products in it may be less exact and faster.
        ahead: the next original blocks; None where no step looks ahead (``Step.looks_ahead``), and at the last block.
    """

    x: Tensor
    y: Tensor | None
    call: Callable[..., Tensor]
    x_fp: Tensor | None = None
    by_window: bool = False
    products: Callable[[], AbstractContextManager[Any]] = nullcontext
    ahead: Ahead | None = None

    def window(self, i: int, original: bool = False) -> Tensor:
        """Window ``i``, ``[1, T, d]`` float32; with ``original`` from the original blocks."""
        x = self.x_fp if original and self.x_fp is not None else self.x
        return x[i : i + 1].float()

    def run(self, block: Callable[..., Any], x: Tensor, first: int) -> Tensor:
        """``block`` on inputs ``[B, T, d]`` of windows ``first`` and following."""
        return self.call(block, x, first) if self.by_window else self.call(block, x)

    def __len__(self) -> int:
        return len(self.x)
