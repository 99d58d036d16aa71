"""Cluster: input channels with similar ranges are sorted next to each other, and each cluster has its own range.

One range for all channels is as wide as the widest channel. A range for each channel does not factor out of an integer
sum. Clusters lie between the two. The sort is free where the weights before the input can absorb the permutation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.architectures import Kind, ResolvedBlock, ResolvedEdge
from lowbit.modules import ActSpec, LinearFormat
from lowbit.numerics import PerCluster, Range, Spec, Statistic, arity, serializable
from lowbit.numerics.kmeans import kmeans_points
from lowbit.steps.effects import TRANSFORMING, BlockDescription, Freedom
from lowbit.steps.state import BlockState
from lowbit.steps.step import Step, names_of
from lowbit.transforms import Permute


@serializable
@dataclass(frozen=True)
class Cluster(Step):
    """Sorts the channels of every static activation into clusters with similar (max, min) (RPTQ, arXiv:2304.01089).

    Each cluster has its own range.

    k-means runs on the extremes of each channel over the calibration tokens. The order is folded into the weights on
    both sides of an edge that carries a permutation (v -> o inside each key-value head, the MLP's inner channels).
    After a norm it cannot be folded, because the residual stream has one order: there each linear reorders its own
    input, at 32 bits for each channel.

    Args:
        count: clusters of an input. An input with fewer channels has one cluster for each.
        head_count: clusters of each head, where channels cannot leave their head.
    """

    count: int = 32
    head_count: int = 4

    def __post_init__(self):
        if self.count < 1 or self.head_count < 1:
            raise ValueError(
                f"an input has at least one cluster, found {self.count} and {self.head_count} in each head"
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Range()})

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({Kind.PERMUTE})

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.CHANNEL_ORDER})

    @property
    def disturbs(self) -> frozenset[Freedom]:
        return TRANSFORMING | {Freedom.WEIGHT_RANGES}

    def check(self, weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
        if not any(act.static for act in activations):
            raise ValueError(
                "Cluster gives static activations a range for each cluster, and activations here are dynamic or not quantized; "
                "make them static, or leave it out"
            )
        pairs = sorted({str(act.spec.grid) for act in activations if arity(act.spec.grid) > 1})
        whole = [names_of([step]) for step in steps if step.one_input_range]
        if pairs or whole:
            raise ValueError(
                f"Cluster gives every cluster of channels a range of its own, which {', '.join([*pairs, *whole])} "
                "cannot; leave one of the two out"
            )

    def describe(self, block: BlockDescription) -> BlockDescription:
        """Cluster sizes are unknown before calibration, so they are described as even."""
        layers = dict(block.layers)
        formats = {path: layer.format for path, layer in layers.items()}
        for edge in _folded(block.resolved, formats):
            for path in (port.module for port in edge.consumers if _static(formats.get(port.module))):
                width = layers[path].shape[1]
                run = edge.within or edge.channels
                count = self._in_run(run, edge.within is not None) * (width // run)
                layers[path] = replace(layers[path], format=_clustered(formats[path], _even(width, count)))
        for path in _gathered(block.resolved, formats):
            width = layers[path].shape[1]
            layers[path] = layers[path].running(Permute(torch.arange(width)))
            if _static(formats[path]):
                clustered = _clustered(formats[path], _even(width, self._in_run(width, False)))
                layers[path] = replace(layers[path], format=clustered)
        return block.changed(layers)

    def ticks(self, windows: int, linears: int) -> int:
        return windows

    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        gathered = set(_gathered(state.resolved, state.formats))
        loose = [edge for edge in state.loose_ends(Kind.PERMUTE) if gathered & {port.module for port in edge.consumers}]
        for edge in (*_folded(state.resolved, state.formats), *loose):
            bounds = state.edge_stat(edge, stats, Range())
            if bounds is None:
                state.note("saw no token: its channels are clustered as they come", at=edge.name)
                bounds = torch.arange(state.draft(edge.consumers[0].module).weight.shape[1]).expand(2, -1).float()
            sizes, order = self._sorted(edge, bounds, state.seed)
            state.commit(edge, Permute(order), Kind.PERMUTE)
            for port in edge.consumers:
                draft = state.draft(port.module)
                if draft.format is not None and _static(draft.format):
                    draft.format = _clustered(draft.format, sizes)

    def _sorted(self, edge: ResolvedEdge, bounds: Tensor, seed: int) -> tuple[tuple[int, ...], Tensor]:
        """Cluster sizes at the consumers, and the order ``[C]`` of the free channels that makes clusters contiguous."""
        points = torch.stack([edge.reduce_max(bounds[1]), edge.reduce_min(bounds[0])], 1)
        run = edge.within or edge.channels
        clusters = self._in_run(run, edge.within is not None)
        labels = torch.cat(
            [
                kmeans_points(part, clusters, seed) + i * clusters
                for i, part in enumerate(points.split(run))  # heads never mix
            ]
        )
        order = labels.argsort(stable=True)
        at_consumer = edge.spread(labels[order])
        change = at_consumer.diff() != 0
        change[run - 1 :: run] = True  # each query head has its own clusters, even where heads share keys
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), change.nonzero()[:, 0].cpu() + 1])
        ends = torch.cat([starts[1:], torch.tensor([len(at_consumer)])])
        return tuple((ends - starts).tolist()), order

    def _in_run(self, channels: int, in_head: bool) -> int:
        return min(self.head_count if in_head else self.count, channels)


def _static(form: LinearFormat | None) -> bool:
    return form is not None and form.act is not None and form.act.static


def _any_static(paths: Iterable[str], formats: Mapping[str, LinearFormat]) -> bool:
    return any(_static(formats.get(path)) for path in paths)


def _folded(resolved: ResolvedBlock, formats: Mapping[str, LinearFormat]) -> Iterator[ResolvedEdge]:
    """Edges whose weights absorb the permutation of a clustered input."""
    for edge in resolved.edges:
        if Kind.PERMUTE in edge.carries and _any_static((port.module for port in edge.consumers), formats):
            yield edge


def _gathered(resolved: ResolvedBlock, formats: Mapping[str, LinearFormat]) -> Iterator[str]:
    """Linears to be quantized that reorder their own input: no edge carries its order, and a reader is clustered."""
    carried = {name for edge in resolved.edges if Kind.PERMUTE in edge.carries for name in edge.inputs}
    for shared in resolved.shared_inputs:
        if shared.name not in carried and _any_static(shared.readers, formats):
            yield from (path for path in shared.readers if path in formats)


def _clustered(form: LinearFormat, sizes: tuple[int, ...]) -> LinearFormat:
    assert form.act is not None
    return replace(form, act=ActSpec(replace(form.act.spec, granularity=PerCluster(sizes)), static=True))


def _even(width: int, number: int) -> tuple[int, ...]:
    return tuple(width // number + (i < width % number) for i in range(number))
