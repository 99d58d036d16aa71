"""Static ranges of queries, keys and values, from the calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lowbit.architectures import attention_modules, attention_spec, observed, operand_ranges, quantize_attention
from lowbit.modules import AttentionSpec
from lowbit.numerics import Int, MovingRange, Range, serializable
from lowbit.numerics.kmeans import kmeans_points
from lowbit.steps.effects import BlockDescription, Freedom, MixOrder
from lowbit.steps.state import BlockState
from lowbit.steps.step import Step

_Extremes = dict[str, Tensor]  # of "query", "key" and "value": [2, heads * channels], lowest and highest


@serializable
@dataclass(frozen=True)
class SetAttentionRange(Step):
    """Fixes static ranges of queries, keys and values: their extremes over the calibration text.

    Queries and keys are measured after the rotary embedding, in the current block. With clusters, k-means groups the
    channels of each key head by (max, min) of its keys and of the queries that read them, because a product pairs their
    channels. Values have their own clusters (RPTQ, arXiv:2304.01089; its order of queries and keys is R2).

    Args:
        decay: None for the extremes of all tokens, or the decay of a moving average of each window's extremes.
        skip_first: tokens at the start of each calibration window that are left out of the ranges, as in
            :class:`~lowbit.steps.SetActivationRange`.
    """

    decay: float | None = None
    skip_first: int = 0

    def __post_init__(self):
        if self.skip_first < 0:
            raise ValueError(f"skip_first is a number of tokens, found {self.skip_first}")

    @property
    def reads_inputs(self) -> bool:
        return True

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.ATTENTION_RANGES})

    @property
    def mix_order(self) -> MixOrder:
        return MixOrder.LAST

    def describe(self, block: BlockDescription) -> BlockDescription:
        static = {path: replace(spec, heads=block.heads) for path, spec in block.attention.items() if spec.static}
        return replace(block, attention={**block.attention, **static})

    @property
    def _need(self) -> Range:
        return Range() if self.decay is None else MovingRange(self.decay)

    def ticks(self, windows: int, linears: int) -> int:
        return windows

    @torch.no_grad()
    def run(self, state: BlockState) -> None:
        if state.io is None:
            raise ValueError("static ranges of attention's operands need calibration text; none was given")
        observed_ranges: dict[str, tuple[_Extremes, tuple[int, int, int, int]]] = {}
        if (tokens := state.io.window(0).shape[1]) <= self.skip_first:
            raise ValueError(f"calibration windows of {tokens} tokens have none after the first {self.skip_first}")
        paths = [path for path in attention_modules(state.resolved) if self._spec(state, path).static]
        with ExitStack() as stack:
            for path in paths:
                observer = partial(self._observe, observed_ranges, path)
                stack.enter_context(observed(state.block.get_submodule(path), observer))
            for i in range(len(state.io)):
                state.io.run(state.block, state.io.window(i), i)
                state.tick("calibrating attention")
        for path, (extremes, heads) in observed_ranges.items():
            self._place(state, path, extremes, heads)

    def _spec(self, state: BlockState, path: str) -> AttentionSpec:
        spec = attention_spec(state.block.get_submodule(path))
        if spec is None:
            raise ValueError("SetAttentionRange: the recipe quantizes no operands of attention; leave it out")
        return spec

    def _observe(
        self, observed_ranges: dict, path: str, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> None:
        heads = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        before = observed_ranges[path][0] if path in observed_ranges else {}
        now = {
            name: self._need.update(before.get(name), self._rows(x_BHTD))
            for name, x_BHTD in (("query", query), ("key", key), ("value", value))
        }
        observed_ranges[path] = now, heads

    def _rows(self, x_BHTD: Tensor) -> Tensor:
        return x_BHTD[:, :, self.skip_first :].transpose(1, 2).flatten(2).flatten(0, 1).float()

    def _place(self, state: BlockState, path: str, extremes: _Extremes, heads: tuple[int, int, int, int]) -> None:
        module = state.block.get_submodule(path)
        spec = replace(self._spec(state, path), heads=heads)
        quantize_attention(module, spec)
        ranges = operand_ranges(module)
        assert ranges is not None
        ranges.fill(dict(operand_buffers(spec, extremes, state.seed)))


def operand_buffers(spec: AttentionSpec, extremes: _Extremes, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The buffers of :class:`~lowbit.modules.OperandRanges` by name: cluster labels, scales and zero points.

    Shapes: H head, D channel, G key-value head.

    Args:
        spec: static, with ``heads``.
        extremes: lowest and highest value of each channel of "query", "key" and "value", ``[2, heads * channels]``.
        seed: of k-means.
    """
    assert spec.heads is not None
    queries, shared, width, value_width = spec.heads
    sizes = {"query": (queries, width), "key": (shared, width), "value": (shared, value_width)}
    bounds = {name: extremes[name].view(2, *size) for name, size in sizes.items()}
    labels: dict[str, Tensor] = {}
    if spec.clusters is not None and spec.clusters > 1:
        read = bounds["query"].view(2, shared, -1, width)
        of_queries = torch.stack([read[1].amax(1), read[0].amin(1)], -1)  # [G, D, 2]
        features = {
            "key": torch.cat([of_queries, bounds["key"].flip(0).movedim(0, -1)], -1),
            "value": bounds["value"].flip(0).movedim(0, -1),
        }
        for name, buffer in (("key", "labels"), ("value", "value_labels")):
            count = min(spec.clusters, sizes[name][1])
            labels[name] = torch.stack([kmeans_points(points, count, seed) for points in features[name]])
            yield buffer, labels[name].to(torch.uint8)
        labels["query"] = labels["key"].repeat_interleave(queries // shared, 0)
    grid = spec.operand.grid
    assert isinstance(grid, Int)
    for name, (lo_HD, hi_HD) in bounds.items():
        if spec.clusters is None:
            lo, hi = lo_HD.amin().view(1, 1), hi_HD.amax().view(1, 1)
        elif name in labels:
            shape, index = (len(lo_HD), int(labels[name].max()) + 1), labels[name]
            lo = lo_HD.new_full(shape, torch.inf).scatter_reduce(1, index, lo_HD, "amin")
            hi = hi_HD.new_full(shape, -torch.inf).scatter_reduce(1, index, hi_HD, "amax")
        else:
            lo, hi = lo_HD.amin(1, keepdim=True), hi_HD.amax(1, keepdim=True)
        params = grid.from_range(lo, hi)
        yield f"{name}_scale", params.scale
        if params.zero is not None:
            yield f"{name}_zero", params.zero
