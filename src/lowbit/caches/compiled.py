"""A layer's keys, or values, as the compiled attention sees them: addresses and numbers, told again when they change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.caches.coordinates import Coordinates
from lowbit.caches.rotary import table
from lowbit.caches.side import Side
from lowbit.kernels.native import DTYPES
from lowbit.numerics import Affine, Int, PerTensor

_BEYOND = 16
"""Positions of the rotary embedding that the compiled code may read beyond the last token: of one tile."""


def why_not(side: Side, values: bool) -> str | None:
    """The reason why the compiled attention does not read ``side``; None if it does."""
    if side.waiting is not None and (
        side.waiting.buffer.device.type != "cpu" or side.waiting.buffer.dtype not in DTYPES
    ):
        return f"the cache is {side.waiting.buffer.dtype} on {side.waiting.buffer.device}"
    if side.spec is None:
        return None
    if reason := shared_range(side):
        return reason
    if side.spec.grid.kind is not Affine:
        return f"codes of {side.spec.grid} have no scale"
    if side.spec.torch_scale_dtype not in DTYPES:
        return f"scales are {side.spec.scale_dtype}"
    if values and side.in_blocks:
        return "values share ranges over tokens"
    return None


def shared_range(side: Side) -> str | None:
    """What kernels do not know of the ranges of ``side``; None: each token or block of each head has its own."""
    if side.spec is None:
        return None
    if isinstance(side.spec.granularity, PerTensor):
        return "one range serves all tokens"
    return "heads share ranges" if side.shared_heads else None


def packs(side: Side) -> bool:
    """Whether the compiled code packs tokens of ``side`` as :class:`~lowbit.caches.tokens.PackedTokens` does."""
    grid = None if side.spec is None else side.spec.grid
    if shared_range(side):
        return False
    return grid is None or (isinstance(grid, Int) and not grid.full and grid.reach == 1)


class Description:
    """What the compiled code knows of one side; :meth:`current` brings it up to date. A copy starts anew."""

    def __init__(self) -> None:
        self._native: Any = None
        self._coordinates: Coordinates | None = None
        self._kept: list[Tensor] = []
        self._turning: tuple[Tensor, Tensor] | None = None
        self._formatted = False
        self._state: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Description, ()

    def current(self, side: Side) -> Any:
        """The description of ``side`` as it is now."""
        waiting, packed, kept = side.waiting, side.packed, side.kept
        assert waiting is not None
        state = _state(side)
        if state == self._state:
            return self._native
        if self._native is None:
            batch, heads, _, dim = waiting.buffer.shape
            self._native = kernels.cache.layer_side(batch, heads, dim, waiting.buffer.dtype)
        native = self._native
        native.floats(
            0 if kept is None else kept.data_ptr(), side.kept_length, side.kept_length,
            waiting.buffer.data_ptr(), waiting.buffer.shape[2], waiting.start, waiting.length,
        )  # fmt: skip
        if packed is not None:
            if not self._formatted:
                self._format(side)
            per_head = packed.scale[0, 0].numel()
            zero = 0 if packed.zero is None else packed.zero.data_ptr()
            native.packed(
                packed.codes.data_ptr(), packed.codes.shape[2], packed.scale.data_ptr(), zero, per_head, packed.counts,
                packed.length,
            )  # fmt: skip
            if self._coordinates is not side.coordinates:
                self._place(side.coordinates)
            if side.frequencies is not None:
                self._turn(side.frequencies, side.length)
        self._state = state
        return native

    def before_token(self, side: Side) -> Any:
        """The description of ``side`` with room for one more token, which the compiled step adds; or the reason why it cannot."""
        waiting, packed = side.waiting, side.packed
        assert waiting is not None
        leaving = side.leaving(waiting.length + 1)
        if side.missing() or (leaving and packed is None):
            return "the first tokens are about to be packed"
        waiting.reserve(1)
        if leaving:
            assert packed is not None
            packed.reserve(leaving)
        native = self.current(side)
        native.leaving = leaving
        return native

    def after_token(self, side: Side) -> None:
        """Counts the token that the compiled step has added, and those that it has packed; its description did so itself."""
        waiting, packed = side.waiting, side.packed
        assert waiting is not None
        waiting.length += 1
        leaving = side.leaving(waiting.length)
        if leaving:
            assert packed is not None
            packed.count(leaving)
            waiting.start += leaving
            waiting.length -= leaving
        self._state = _state(side)

    def _format(self, side: Side) -> None:
        packed = side.packed
        assert packed is not None
        grid, number = packed.spec.grid, DTYPES[packed.scale.dtype]
        whole = isinstance(grid, Int) and not grid.symmetric and grid.zero == "int"
        table = [] if isinstance(grid, Int) else list(grid.table())  # pyright: ignore[reportAttributeAccessIssue]
        middle = grid.middle if isinstance(grid, Int) and grid.symmetric else 0.0
        words = packed.codes.shape[3]
        self._native.format(
            grid.bits, table, middle, words, packed.groups, packed.width, packed.rows, number,
            isinstance(grid, Int) and grid.symmetric, whole,
        )  # fmt: skip
        self._formatted = True

    def _turn(self, frequencies: Tensor, length: int) -> None:
        needed = length + 1 + _BEYOND
        if self._turning is None or self._turning[0].shape[1] < needed:
            positions = 1 << max(10, (needed - 1).bit_length())
            self._turning = table(tuple(frequencies.tolist()), positions)
            cos, sin = self._turning
            self._native.turning(cos.data_ptr(), sin.data_ptr(), len(cos), positions)

    def _place(self, coordinates: Coordinates) -> None:
        def plain(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to("cpu", torch.float32).contiguous()

        rotation, scale, shift = (plain(t) for t in (coordinates.rotation, coordinates.scale, coordinates.shift))
        self._kept = [
            t for t in (rotation, scale, shift) if t is not None
        ]  # the compiled code reads them where they are
        address = [0 if t is None else t.data_ptr() for t in (rotation, scale, shift)]
        rotation_step = rotation[0].numel() if rotation is not None and rotation.dim() == 3 else 0
        shift_step = shift[0].numel() if shift is not None and shift.dim() == 4 else 0
        self._native.coordinates(address[0], rotation_step, address[1], address[2], shift_step)
        self._coordinates = coordinates


def _state(side: Side) -> tuple[int, ...]:
    """What a description tells of ``side``, short."""
    waiting, packed = side.waiting, side.packed
    assert waiting is not None
    state = (waiting.buffer.data_ptr(), waiting.start, waiting.length, side.kept_length)
    if packed is None:
        return state
    return *state, packed.codes.data_ptr(), packed.scale.data_ptr(), packed.length, packed.changes
