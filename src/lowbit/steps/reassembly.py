"""Reassembly: channels with outliers are split into several, and other channels make room for the copies.

A linear gives the same output for T equal channels x / T as for one channel x, so an outlier can be divided until it no
longer sets the range of every token (QLLM, arXiv:2310.08041). To make room, pairs of similar channels are averaged, or
the least important channels are dropped; otherwise the layer grows. No neighbour can absorb this, so the linears that
read the input do it at run time.

Distances come from Gram matrices of inputs and weights over all calibration tokens; no tokens are kept for them.
Shapes: I channel, C a channel that could leave or be merged with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lowbit.architectures import Kind, ResolvedInput
from lowbit.numerics import AbsMax, Gram, Statistic, serializable
from lowbit.steps.effects import TRANSFORMING, BlockDescription, Freedom, LayerDescription
from lowbit.steps.judging import least_error
from lowbit.steps.listen import Place, listen
from lowbit.steps.state import BlockState, Stats
from lowbit.steps.step import FLOAT, RunSizes, Step
from lowbit.transforms import ChannelTransform, Reassembly, Split

Assembly = Literal["merge", "prune", "none"]
_DISTANCE_MATRICES = 4  # of the width of an input, held at once
NEGLIGIBLE = 1e-12
"""A share of the median energy that a channel adds to the output. A channel below it adds nothing."""


def thresholds(largest_I: Tensor, copies: int) -> Tensor:
    """The smallest threshold that adds at most e channels, for e = 0 .. ``copies``.

    A threshold just below M / k splits a channel with the largest magnitude M into k + 1, so the e-th threshold is the
    (e + 1)-th largest of all M / k.

    Args:
        largest_I: largest magnitude of each channel.
        copies: largest number of added channels.

    Returns:
        ``[copies + 1]`` float64, descending.
    """
    top = largest_I.double().sort(descending=True).values[: copies + 1]
    parts = top[:, None] / torch.arange(1, copies + 2, device=top.device)
    return parts.flatten().sort(descending=True).values[: copies + 1]


def disassembly(largest_I: Tensor, threshold: float) -> Tensor:
    """The number of channels that each channel becomes: ``max(1, ceil(M / threshold))``, int64 ``[I]``."""
    if not threshold > 0:
        return torch.ones_like(largest_I, dtype=torch.int64)
    parts = largest_I.double() / threshold
    return (parts - 1e-9).ceil().clamp(min=1).long()  # a threshold M / k must give k, however the division rounds


def merge_distances(gram_II: Tensor, weight_gram_II: Tensor) -> Tensor:
    """The squared error of the output if i and j are averaged: ``D_ij = |x_i - x_j|^2 |w_i - w_j|^2 / 4``, ``[I, I]``.

    The error is ``x_i (w_i - w_j) / 2 + x_j (w_j - w_i) / 2 = (x_i - x_j)(w_i - w_j) / 2``. It has rank one, so its
    energy over all tokens and rows is a product. The authors' code ranks by ``|x_i - x_j| (sum w_i + sum w_j)``
    instead, where columns of opposite signs cancel.

    Args:
        gram_II: ``sum_t x_t x_t^T``.
        weight_gram_II: ``W^T W`` of all consumers together.
    """
    return _squared_distances(gram_II).mul_(_squared_distances(weight_gram_II)).mul_(0.25)


def _squared_distances(gram_II: Tensor) -> Tensor:
    energy = gram_II.diagonal()
    return (energy[:, None] + energy - 2 * gram_II).clamp_(min=0)


def assembled(counts_I: Tensor, distance_II: Tensor, energy_I: Tensor, merge: bool) -> Reassembly | None:
    """The reassembly that makes room for the copies in ``counts_I``, or None if too few channels can leave.

    Merging is bipartite. Every second channel that is not split may leave; it is averaged with the nearest of the
    others. The pairs with the smallest distances merge, and several channels may join the same one. Channels that add
    nothing to the output are dropped before any is merged, because a mean with one would halve its partner. Without
    ``merge``, the channels that add least are dropped.

    Args:
        counts_I: how many channels each becomes.
        distance_II: the result of :func:`merge_distances`.
        energy_I: ``|x_i|^2 |w_i|^2``, the squared error if i is dropped.
        merge: average channels, or drop them.
    """
    size, copies = len(counts_I), int(counts_I.sum()) - len(counts_I)
    whole_C = (counts_I == 1).nonzero()[:, 0]
    whole_C = whole_C[energy_I[whole_C].argsort(stable=True)]
    dead = int((energy_I[whole_C] <= NEGLIGIBLE * energy_I.median()).sum()) if merge else len(whole_C)
    dropped = whole_C[: min(copies, dead)]
    slot, into = _merged(whole_C[dead:].sort().values, distance_II, copies - len(dropped))
    slot, into = torch.cat([dropped, slot]), torch.cat([dropped, into])
    if len(slot) < copies:
        return None
    copied = torch.arange(size, device=slot.device).repeat_interleave(counts_I - 1)
    return Reassembly(size, *(_narrow(each, size) for each in (slot, into, copied)))


def _merged(whole_C: Tensor, distance_II: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The channels that leave, at most ``wanted``, and the partner that each is averaged with."""
    leaving, staying = whole_C[0::2], whole_C[1::2]
    if not wanted or not len(staying):
        return whole_C[:0], whole_C[:0]
    nearest, partner = distance_II[leaving][:, staying].min(1)
    first = nearest.argsort(stable=True)[:wanted]
    return leaving[first], staying[partner[first]]


def _narrow(numbers: Tensor, size: int) -> Tensor:
    return numbers.to(torch.int16 if size <= 2**15 else torch.int32)


@serializable
@dataclass(frozen=True)
class SearchReassembly(Step):
    """Splits outlier channels of every input and lets others make room, at the threshold with the least output error.

    A channel whose largest calibrated magnitude is M becomes ``ceil(M / threshold)`` channels. Thresholds fall from the
    largest M (nothing changes) to the one that adds ``ratio`` of the channels. Weights and inputs are quantized as they
    will be, and the error is measured at the input of the next linear in the same module (attention before its output
    projection, the hidden layer of an MLP), or at the module's output if there is no single next linear. Inputs without
    an edge are judged by their linears' outputs. Every input is searched on the unchanged block; the winners are
    applied at the end.

    Args:
        ratio: largest share of channels to add, 0 to 0.5.
        assembly: ``"merge"`` averages pairs of similar channels, ``"prune"`` drops channels, ``"none"`` lets layers
            grow.
        steps: number of thresholds to try below the largest, evenly spaced by the channels that they add.
        windows: calibration windows on which thresholds are judged; None: all. Magnitudes and distances come from all
            windows.
        skip: patterns of names of shared inputs that stay as they are.
    """

    ratio: float = 0.2
    assembly: Assembly = "merge"
    steps: int = 20
    windows: int | None = 4
    skip: tuple[str, ...] = ("attention_out",)

    def __post_init__(self):
        if not 0 <= self.ratio <= 0.5:
            raise ValueError(f"the share of channels that may be added is 0 to 0.5, found {self.ratio}")
        if self.assembly not in ("merge", "prune", "none"):
            raise ValueError(f"channels make room by 'merge', 'prune' or 'none', found {self.assembly!r}")
        if self.steps < 1 or (self.windows is not None and self.windows < 1):
            raise ValueError(f"a search takes at least one step and one window, found {self}")

    @property
    def simulates(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({AbsMax()} if self.assembly == "none" else {AbsMax(), Gram()})

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({Kind.SPLIT})

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.CHANNEL_COPIES})

    @property
    def disturbs(self) -> frozenset[Freedom]:
        return TRANSFORMING | {Freedom.ROUNDING}

    @property
    def upper_bound(self) -> str:
        if not self.ratio:
            return ""
        return "a search decides how many channels are copied; bytes_out assumes the most that it may choose"

    def describe(self, block: BlockDescription) -> BlockDescription:
        inputs = [shared for shared in block.resolved.shared_inputs if not self._skips(shared)]
        paths = [path for shared in inputs for path in shared.readers if path in block.layers]
        return block.changed({path: self._reassembled(block.layers[path]) for path in paths})

    def _reassembled(self, layer: LayerDescription) -> LayerDescription:
        rows, columns = layer.shape
        copies = int(self.ratio * columns)
        if not copies:
            return layer
        if self.assembly == "none":
            return layer.running(Split(_narrow(torch.ones(columns), columns)), shape=(rows, columns + copies))
        numbers = _narrow(torch.zeros(copies), columns)
        return layer.running(Reassembly(columns, numbers, numbers, numbers))

    def memory(self, sizes: RunSizes) -> float:
        """Bytes of recorded inputs and outputs over the calibration windows, and of distances between channels."""
        widths = {path: sizes.shapes[path][1] for path in sizes.first_readers}
        read = sum(width * sizes.shares.get(path, 1.0) for path, width in widths.items())
        distances = _DISTANCE_MATRICES * max(widths.values(), default=0) ** 2
        return (2 * sizes.tokens(self.windows) * read + distances) * FLOAT

    def ticks(self, windows: int, linears: int) -> int:
        return windows + 3 * (1 + self.steps)

    def _skips(self, shared: ResolvedInput) -> bool:
        return any(fnmatch(shared.name, pattern) for pattern in self.skip)

    @torch.no_grad()
    def run(self, state: BlockState) -> None:
        every = (site_of(state, shared) for shared in state.resolved.shared_inputs if not self._skips(shared))
        sites = [site for site in every if site.readers and self.ratio]
        stats = state.collect(self.needs, {site.shared.name for site in sites})
        recorded = listen(state, [place for site in sites for place in site.places], self.windows)
        winners = []
        for site in sites:
            known, calls = stats.get(site.shared.name, {}), [call for call in recorded if call.place in site.places]
            if not known or not calls:
                state.note("saw no token: its channels stay as they are", at=site.shared.name)
                continue
            tried = [None, *self._candidates(state, site, known)]
            transform = least_error(state, calls, tried, partial(simulated_with, state, site))
            if transform is not None:
                winners.append((site, transform))
        for site, transform in winners:
            for path in site.readers:
                state.transform(path, transform)

    def _candidates(self, state: BlockState, site: Site, stats: Stats) -> Iterator[ChannelTransform]:
        largest = stats[AbsMax()]
        limit = int(self.ratio * len(largest))
        if not limit:
            return
        distance = energy = None
        if Gram() in self.needs:
            gram, weight_gram = stats[Gram()].float(), _weight_gram(state, site.readers)
            energy = gram.diagonal() * weight_gram.diagonal()
            distance = merge_distances(gram, weight_gram)
        levels, tried = thresholds(largest, limit).tolist(), set()
        for step in range(1, self.steps + 1):
            counts = disassembly(largest, levels[round(step * limit / self.steps)])
            copies = int(counts.sum()) - len(counts)
            if not 0 < copies <= limit or copies in tried:
                continue
            tried.add(copies)
            if distance is None or energy is None:
                yield Split(_narrow(counts, len(counts)))
            elif (transform := assembled(counts, distance, energy, self.assembly == "merge")) is not None:
                yield transform


@dataclass(frozen=True)
class Site:
    """A shared input, its readers that are to be quantized, and the places that judge it."""

    shared: ResolvedInput
    readers: tuple[str, ...]
    places: tuple[Place, ...]


def site_of(state: BlockState, shared: ResolvedInput) -> Site:
    """The site of ``shared``: see :class:`SearchReassembly` for where it is judged."""
    drafts = state.drafts
    readers = tuple(path for path in shared.readers if path in drafts)
    for edge in state.resolved.edges:
        if {port.module for port in edge.consumers} == set(shared.readers):
            later = [path for path in state.resolved.linears if path.startswith(f"{edge.judge}.")]
            later = [path for path in later if path not in shared.readers]
            return Site(shared, readers, (Place(edge.judge, later[0] if len(later) == 1 else None),))
    return Site(shared, readers, tuple(map(Place, readers)))


@contextmanager
def simulated_with(state: BlockState, site: Site, transform: ChannelTransform | None) -> Iterator[None]:
    """While open, the readers of ``site`` run quantized, with ``transform`` on their input."""
    with ExitStack() as stack:
        for path in site.readers:
            stack.enter_context(state.draft(path).simulated(transform))
        yield


def _weight_gram(state: BlockState, readers: tuple[str, ...]) -> Tensor:
    w_OI = torch.cat([state.draft(path).weight.float() for path in readers])
    return w_OI.T @ w_OI
