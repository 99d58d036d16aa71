"""Static scales and shifts of keys and values, learned while attention reads a simulated cache.

Shapes: B window, G key-value head, T token, D channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.architectures import observed, simulated_layers
from lowbit.caches import Coordinates, PackedLayer
from lowbit.modules import CalibrationSpec, calibrate_cache
from lowbit.numerics import serializable
from lowbit.steps.parametrizations import Maker, Parametrization
from lowbit.steps.state import BlockState, Stats
from lowbit.steps.step import FLOAT, RunSizes

_SIDES = ("key", "value")
_PARTS = frozenset(f"{side}_{part}" for side in _SIDES for part in ("scale", "shift"))
_SCORES = 6
"""Matrices of scores and probabilities that attention over a simulated cache holds at once, for the backward pass."""
_DEAD = 1e-6
"""A channel that reaches less far than this share of its head's median has scale 1."""


class _Channels(nn.Module):
    """A scale ``exp(log_scale)`` and a shift of every channel, ``[G, 1, D]``; the shift moves in units of the channel's half-width.

    Args:
        extremes_2GD: lowest and highest value of each channel.
        scaled, shifted: which of the two there are.
    """

    def __init__(self, extremes_2GD: Tensor, scaled: bool, shifted: bool):
        super().__init__()
        low_G1D, high_G1D = extremes_2GD[:, :, None].float()
        half_G1D = (high_G1D - low_G1D) / 2
        self.middle_G1D, self.half_G1D = (high_G1D + low_G1D) / 2, half_G1D
        reach_G1D = half_G1D if shifted else torch.maximum(low_G1D.abs(), high_G1D.abs())
        self.log_scale = nn.Parameter(_smoothing(reach_G1D).log()) if scaled else None
        self.offset = nn.Parameter(torch.zeros_like(half_G1D)) if shifted else None

    def forward(self) -> Coordinates:
        scale = None if self.log_scale is None else self.log_scale.exp()
        shift = None if self.offset is None else self.middle_G1D + self.offset * self.half_G1D
        return Coordinates(None, scale, shift)


def _smoothing(reach_G1D: Tensor) -> Tensor:
    """The square root of each channel's reach over the geometric mean of the head's; 1 for dead channels."""
    alive = reach_G1D > _DEAD * reach_G1D.median(-1, keepdim=True).values
    logs = torch.where(alive, reach_G1D.log() / 2, 0.0)
    mean_G11 = logs.sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(alive, (logs - mean_G11).exp(), 1.0)


class _CacheCoordinates(Parametrization):
    """Coordinates of the keys and values of every attention module of the block."""

    def __init__(self, caches: Mapping[str, PackedLayer], extremes: Mapping[str, tuple[Tensor, Tensor]]):
        super().__init__()
        self.caches, self.extremes = caches, extremes
        self.channels = nn.ModuleList()  # keys and values of each path
        for path, layer in caches.items():
            asked = layer.spec.calibrated
            for name, bounds in zip(_SIDES, extremes[path], strict=True):
                self.channels.append(_Channels(bounds, f"{name}_scale" in asked, f"{name}_shift" in asked))

    def coordinates(self) -> dict[str, tuple[Coordinates, Coordinates]]:
        """Of keys and of values, by path."""
        found = [channels() for channels in self.channels]
        return {path: (found[2 * i], found[2 * i + 1]) for i, path in enumerate(self.caches)}

    def simulated(self, state: BlockState) -> AbstractContextManager[None]:
        if not self.caches:
            return super().simulated(state)
        layers: dict[int, PackedLayer] = {}
        for path, coordinates in self.coordinates().items():
            module: Any = state.block.get_submodule(path)
            layers[module.layer_idx] = self.caches[path].with_coordinates(*coordinates)
        return simulated_layers(state.block, layers)

    @torch.no_grad()
    def commit(self, state: BlockState) -> None:
        for path, coordinates in self.coordinates().items():
            found = {
                f"{name}_{part}": tensor[:, 0]
                for name, side in zip(_SIDES, coordinates, strict=True)
                for part, tensor in (("scale", side.scale), ("shift", side.shift))
                if tensor is not None
            }
            (_, heads, key), (_, _, value) = (bounds.shape for bounds in self.extremes[path])
            spec = CalibrationSpec.of(found, (heads, key, value)) if found else None
            made = calibrate_cache(state.block.get_submodule(path), spec)
            if made is not None:
                made.fill(found)


@serializable
@dataclass(frozen=True)
class CacheCoordinates(Maker):
    """Learning reads the recipe's cache as decoding does, and finds the scales and shifts of channels that its format asks for.

    Attention computes as if every token were decoded from the cache, so the block learns with the errors of its past (WKVQuant,
    arXiv:2402.12065). Shifts start from the middle of each channel's values on the calibration text, keys as the cache packs
    them; scales from the square root of how far its values reach from there, divided by the geometric mean over the head. A format
    without scales and shifts is simulated as it is.

    Args:
        lr: of the logarithms of scales, and of shifts in units of half the distance from a channel's lowest value to its highest.
        skip_first: tokens at the start of each calibration window that do not count for the start, beside the cache's sinks.
    """

    lr: float = 5e-3
    skip_first: int = 0

    def __post_init__(self):
        if self.skip_first < 0:
            raise ValueError(f"skip_first is a number of tokens, found {self.skip_first}")

    @property
    def cache_parts(self) -> frozenset[str]:
        return _PARTS

    def memory(self, sizes: RunSizes, batch: int) -> float:
        """Bytes of the scores of every query and key, several times."""
        heads = 0 if sizes.block.heads is None else sizes.block.heads[0]
        return _SCORES * batch * heads * sizes.seq_len**2 * FLOAT

    def make(self, state: BlockState, stats: dict[str, Stats]) -> Parametrization:
        caches = state.context.caches
        for path, layer in caches.items():
            if unknown := sorted(layer.spec.calibrated - _PARTS):
                raise ValueError(
                    f"{state.full_name(path)}: the cache has {', '.join(unknown)} that only a later stage finds, so it cannot be "
                    "simulated while a block learns; choose another format of the cache"
                )
        if not caches:
            state.note("no cache of keys and values is quantized here: none is simulated")
        return _CacheCoordinates(caches, self._extremes(state, caches))

    @torch.no_grad()
    def _extremes(self, state: BlockState, caches: Mapping[str, PackedLayer]) -> dict[str, tuple[Tensor, Tensor]]:
        """Lowest and highest value of each channel of keys and of values, ``[2, G, D]``, by path."""
        assert state.io is not None
        seen: dict[str, list[Tensor]] = {}

        def observe(path: str, _: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, factor: float | None) -> None:
            layer = caches[path]
            first = max(self.skip_first, layer.spec.sink)
            if key_BGTD.shape[2] <= first:
                raise ValueError(f"calibration windows of {key_BGTD.shape[2]} tokens have none after the first {first}")
            key_BGTD = layer.key_side.turned(key_BGTD, 0, -1)
            tokens = [x[:, :, first:].float().transpose(0, 1).flatten(1, 2) for x in (key_BGTD, value_BGTD)]
            ends = [torch.stack(torch.aminmax(x_GND, dim=1)) for x_GND in tokens]
            pairs = zip(seen.get(path, ends), ends, strict=True)
            seen[path] = [torch.stack([torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])]) for a, b in pairs]

        with ExitStack() as stack:
            for path in caches:
                stack.enter_context(observed(state.block.get_submodule(path), partial(observe, path)))
            for i in range(len(state.io) if caches else 0):
                state.io.run(state.block, state.io.window(i), i)
                state.tick("reading keys and values")
        if missing := sorted(set(caches) - set(seen)):
            raise ValueError(
                f"{state.full_name(missing[0])} does not attend through transformers' attention interface, so its cache cannot be "
                "simulated while the block learns; leave the cache's format out"
            )
        return {path: (bounds[0], bounds[1]) for path, bounds in seen.items()}
