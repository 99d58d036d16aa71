"""Rules: channel transforms in closed form, from statistics.

A rule declares its kind of transform and the statistics it needs, and makes the transform of one edge. Searches and
learning start from the same rules, so a paper's initialisation is written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.architectures import Kind, Port, ResolvedEdge
from lowbit.numerics import AbsMax, Gram, Range, Statistic, serializable
from lowbit.steps.state import BlockState, Stats
from lowbit.transforms import ChannelTransform, Scale, Shift


@runtime_checkable
class TransformRule(Protocol):
    """Makes the transform of one edge, or None if its activation saw no token.

    ``dtype`` is the dtype of the transform's vector.
    """

    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[Statistic]]
    dtype: ClassVar[torch.dtype]

    def __call__(
        self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]
    ) -> ChannelTransform | None: ...


def consumer_absmax(state: BlockState, edge: ResolvedEdge) -> Tensor:
    """The largest weight magnitude of each channel, ``[channels]``, over all consumers of ``edge`` together."""
    parts = [port.reduce(_weight(state, port).abs().amax(0)) for port in edge.consumers]
    return torch.stack(parts).amax(0)


def _weight(state: BlockState, port: Port) -> Tensor:
    """The port's weight ``[O, I]``. A consumer may also be a router, which is no draft."""
    return state.block.get_parameter(port.weight).detach()


def guard_dead(s: Tensor, *magnitudes: Tensor) -> Tensor:
    """``s`` with 1 for dead channels, which no scale can help: those with a magnitude under 1e-6 of the median."""
    alive = torch.isfinite(s) & (s > 0)
    for magnitude in magnitudes:
        alive &= magnitude > 1e-6 * magnitude.median()
    return torch.where(alive, s, torch.ones_like(s))


@serializable
@dataclass(frozen=True)
class Smooth:
    """``s = max|x|**alpha / max|w|**(1 - alpha)`` for each channel (SmoothQuant, arXiv:2211.10438, equation 4)."""

    alpha: float = 0.5
    kind: ClassVar[Kind] = Kind.SCALE
    needs: ClassVar[frozenset[Statistic]] = frozenset({AbsMax()})
    dtype: ClassVar[torch.dtype] = torch.float32

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share between 0 (weights only) and 1 (activations only), found {self.alpha}")

    def __call__(self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]) -> Scale | None:
        absmax = state.edge_stat(edge, stats, AbsMax())
        if absmax is None:
            return None
        a = edge.reduce_max(absmax).float()
        w = consumer_absmax(state, edge)
        s = a.clamp(min=1e-5).pow(self.alpha) / w.clamp(min=1e-5).pow(1 - self.alpha)
        return Scale(guard_dead(s.clamp(min=1e-5), a, w))


@serializable
@dataclass(frozen=True)
class Balance:
    """The diagonal rescale of QuIP (arXiv:2307.13304): ``d = (H_jj / (W^T W)_jj)**0.25`` for each channel.

    It minimizes the product of tr(H) and the weight's squared norm for ``W diag(d)`` and ``diag(1/d) H diag(1/d)``,
    over all linears to be quantized that read the edge. Only ratios matter, so the geometric mean is 1. Stored in
    float16.
    """

    kind: ClassVar[Kind] = Kind.SCALE
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram()})
    dtype: ClassVar[torch.dtype] = torch.float16

    def __call__(self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]) -> Scale | None:
        gram = state.edge_stat(edge, stats, Gram())
        if gram is None:
            return None
        h = edge.reduce_sum(gram.diagonal().float())
        drafts = state.drafts
        quantized = [port for port in edge.consumers if port.module in drafts]
        w = torch.stack([port.reduce(_weight(state, port).square().sum(0), "sum") for port in quantized]).sum(0)
        d = guard_dead(h.div(w).pow(0.25), h, w)
        return Scale((d / d.log().mean().exp()).clamp(2.0**-14, 2.0**15).half())


@serializable
@dataclass(frozen=True)
class Ones:
    """The identity scale: the start of a search or of learning that has no better one."""

    kind: ClassVar[Kind] = Kind.SCALE
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    dtype: ClassVar[torch.dtype] = torch.float32

    def __call__(self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]) -> Scale:
        return Scale(torch.ones(edge.channels))


@serializable
@dataclass(frozen=True)
class OwnGain:
    """The gain of the norm before the edge: the norm's gain becomes 1, and the weights after it absorb the gain.

    Gamma migration (Outlier Suppression, arXiv:2209.13325, section 4.1). The norm's bias is divided by the gain, so a
    channel whose gain is at most ``floor`` times the largest keeps it.
    """

    floor: float = 1e-4
    kind: ClassVar[Kind] = Kind.SCALE
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    dtype: ClassVar[torch.dtype] = torch.float32

    def __call__(self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]) -> Scale:
        norms = [port for port in edge.producers if port.norm]
        if len(norms) != 1 or norms[0].expand is not None:
            modules = [port.module for port in edge.producers]
            raise ValueError(
                f"edge {edge.name!r} has no norm of its own whose gain could move, its producers are {modules}; name edges "
                "after norms, such as 'norm_*'"
            )
        gain = state.block.get_parameter(norms[0].weight).detach() + norms[0].gain_offset
        alive = gain.abs() > self.floor * gain.abs().max()
        return Scale(torch.where(alive, gain, torch.ones_like(gain)))


@serializable
@dataclass(frozen=True)
class Midpoint:
    """``d = (max + min) / 2``: centres the range of each channel (Outlier Suppression+, arXiv:2304.09145)."""

    kind: ClassVar[Kind] = Kind.SHIFT
    needs: ClassVar[frozenset[Statistic]] = frozenset({Range()})
    dtype: ClassVar[torch.dtype] = torch.float32

    def __call__(self, state: BlockState, edge: ResolvedEdge, stats: Mapping[str, Stats]) -> Shift | None:
        bounds = state.edge_stat(edge, stats, Range())
        if bounds is None:
            return None
        return Shift((edge.reduce_min(bounds[0]) + edge.reduce_max(bounds[1])).float() / 2)
