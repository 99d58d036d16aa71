"""Search of floating-point formats and their ranges: the number of exponent bits and the largest number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.modules import ActSpec, DraftLinear, LinearFormat, fake_activation
from lowbit.numerics import (
    AbsMax,
    Affine,
    Clipped,
    Fixed,
    Float,
    PerCluster,
    PerInput,
    Samples,
    Spec,
    Statistic,
    fake_quantize,
    serializable,
)
from lowbit.steps.effects import Freedom
from lowbit.steps.product_errors import ProductErrors
from lowbit.steps.race import race, spread
from lowbit.steps.state import BlockState, Stats, product_dtype
from lowbit.steps.step import Step
from lowbit.steps.weight_ranges import WeightRanges

_SMALLEST = 2.0**-60  # the range of an input that is zero on every calibration token
_LOUD = 64
"""Tokens that every candidate for an input sees first: few tokens like them decide what clipping costs."""
_FIRST = 64
"""Further tokens of the first round of a race."""


@serializable
@dataclass(frozen=True)
class SearchFloat(Step):
    """Chooses floating-point formats and ranges of each linear's weight and static input by its output error.

    The search runs in rounds (LLM-FP4, arXiv:2310.16836, section 3.2). For each format of the weight, every output
    channel takes the share of its range with the least squared error of its output, and the format with the least sum
    wins. Format and range of the input follow in the same way, with the weight as it is now. The previous choice is
    always tried again, so no round is worse. Range shares multiply the largest magnitude. The authors multiply the
    exponent bias, which has the opposite effect if the bias is negative. Weights and inputs that are not floating, and
    inputs that are not static, stay as they are.

    Three things save time. Formats and ranges of an input race over tokens (:mod:`lowbit.steps.race`). Formats of the weight that
    are far behind on some channels, or were in the round before, are left out
    (:class:`~lowbit.steps.weight_ranges.WeightRanges`). Errors of rounding are multiplied in the type that passes for
    statistics have.

    A static input with a scale for each input channel (``PerInput``) halves the tensor's scale k times for a channel.
    Its stored statistics and the ``2**exponent - 1`` of its format limit k: the paper's pre-shifted exponent bias. Each
    channel's scale is the nearest power of two, as published, or the next one that covers the channel: at 8 bits
    clipping costs more than it gains.

    Args:
        weight_format, activation_format: choose between all splits of the same bits into exponent and mantissa. False:
            search only the range of the scheme's format.
        rounds: rounds of both searches. 0: ranges are the extremes, in the scheme's formats.
        grid: number of range shares to try, evenly from 0.3 to 1.2, in addition to 1.
        tokens: calibration tokens on which outputs are judged.
    """

    weight_format: bool = True
    activation_format: bool = True
    rounds: int = 3
    grid: int = 19
    tokens: int = 2048

    def __post_init__(self):
        if self.rounds < 0 or self.grid < 1 or self.tokens < 1:
            raise ValueError(f"a search needs rounds of 0 or more, grid and tokens of at least 1, found {self}")

    @property
    def simulates(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({AbsMax(), self._samples} if self.rounds else {AbsMax()})

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.INPUT_RANGES})

    def places_weight(self, spec: Spec) -> bool:
        return isinstance(spec.grid, Float)

    def places_input(self, act: ActSpec) -> bool:
        return isinstance(act.spec.grid, Float)

    @property
    def _samples(self) -> Samples:
        return Samples(self.tokens, stride=4)

    @property
    def shares(self) -> tuple[float, ...]:
        """Multiples of the largest magnitude to try, 1 first."""
        even = (0.3 + 0.9 * i / max(1, self.grid - 1) for i in range(self.grid))
        return (1.0, *(share for share in even if abs(share - 1) > 1e-9))

    def _ranges(self, spec: Spec) -> Iterator[tuple[float, bool]]:
        of_channels = isinstance(spec.granularity, PerInput)
        yield from (
            (share, covering) for covering in ((False, True) if of_channels else (False,)) for share in self.shares
        )

    def ticks(self, windows: int, linears: int) -> int:
        return windows + linears * max(1, self.rounds)

    @torch.no_grad()
    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        for path, draft in state.drafts.items():
            self._place(state, path, draft, state.stats_of(stats, path))

    def _place(self, state: BlockState, path: str, draft: DraftLinear, stats: Stats) -> None:
        form, absmax_I, w_OI = draft.format, stats.get(AbsMax()), draft.weight
        assert form is not None
        act = form.act if form.act is not None and form.act.static and isinstance(form.act.spec.grid, Float) else None
        floating = isinstance(form.weight.grid, Float)
        if absmax_I is None:
            state.note("saw no token: its formats are not searched, and a static input reaches from -1 to 1", at=path)
            absmax_I = torch.ones(w_OI.shape[1])
        if act is not None:
            draft.act_params = input_range(act.spec, absmax_I, 1.0)
        x_TI = stats.get(self._samples)
        if x_TI is None or not self.rounds or not (floating or act):
            state.tick("searching")
            return
        x_TI = _ordered(x_TI.float())
        inputs = None if act is None else _Inputs(x_TI, self._inputs(act, absmax_I))
        ranges = self._weight_ranges(w_OI, form.weight) if floating else None
        dtype = product_dtype(state)
        for _ in range(self.rounds if floating and act is not None else 1):
            before = form, draft.range_shares, draft.act_params
            if ranges is not None:
                seen_TI = fake_activation(x_TI, form.act, draft.act_params)
                spec, draft.range_shares = ranges.search(ProductErrors(w_OI, seen_TI, x_TI, dtype))
                form = replace(form, weight=spec)
            if inputs is not None:
                restored_OI = fake_quantize(w_OI, form.weight, draft.range_shares)
                act, draft.act_params = inputs.search(ProductErrors(x_TI, restored_OI, w_OI, dtype))
                form = replace(form, act=act)
            draft.format = form
            state.tick("searching")
            if _same(before, (form, draft.range_shares, draft.act_params)):
                break

    def _weight_ranges(self, w_OI: Tensor, spec: Spec) -> WeightRanges:
        return WeightRanges(w_OI, spec, tuple(_formats(spec, self.weight_format)), self.shares)

    def _inputs(self, act: ActSpec, absmax_I: Tensor) -> list[tuple[ActSpec, Affine]]:
        """All formats and ranges to try for the input."""
        tried = []
        for grid in _formats(act.spec, self.activation_format):
            here = replace(act, spec=replace(act.spec, grid=grid))
            tried += [(here, input_range(here.spec, absmax_I, *chosen)) for chosen in self._ranges(here.spec)]
        return tried


def _ordered(x_TI: Tensor) -> Tensor:
    """Tokens for a race: the loudest first, then the others in an order that spreads every beginning over the text."""
    loud = x_TI.square().sum(1).argsort(descending=True, stable=True)[:_LOUD]
    rest = torch.ones(len(x_TI), dtype=torch.bool).index_fill(0, loud.cpu(), False).nonzero()[:, 0]
    order = torch.cat([loud.cpu(), rest[torch.tensor(spread(len(rest)), dtype=torch.int64)]])
    return x_TI[order.to(x_TI.device)]


class _Inputs:
    """Formats and ranges of one input, and repeated races between them while the weight changes.

    The first race has all of them. Later ones have those that the first tokens of the first race did not rule out.

    Args:
        x_TI: tokens, in the order of :func:`_ordered`.
        tried: formats with parameters; the first one is the choice at the beginning.
    """

    def __init__(self, x_TI: Tensor, tried: Sequence[tuple[ActSpec, Affine]]):
        self.x_TI, self.tried, self.now = x_TI, tried, 0
        self.scales = [channel_scale(act.spec, params, x_TI.shape[1]) for act, params in tried]
        self.rivals = list(range(len(tried)))
        self.raced = False

    def search(self, errors: ProductErrors) -> tuple[ActSpec, Affine]:
        """The format and range whose output errs least; the first of equals. The last choice takes part.

        Args:
            errors: of tokens.
        """

        def of(i: int, part: slice, beyond: float) -> Tensor:
            (act, _), scale_I = self.tried[self.rivals[i]], self.scales[self.rivals[i]]
            return errors.of(act.spec.grid.fake(self.x_TI[part], Affine(scale_I)), part).double()  # pyright: ignore[reportAttributeAccessIssue]

        kept, first = (self.rivals.index(self.now),), _LOUD + _FIRST
        result = race(len(self.rivals), len(self.x_TI), of, first=first, apart=_LOUD, kept=kept)
        self.now = self.rivals[result.winner]
        if not self.raced:
            self.rivals = [
                rival
                for rival, saw in zip(self.rivals, result.saw, strict=True)
                if saw > min(first, len(self.x_TI) - 1)
            ]
            self.raced = True
        return self.tried[self.now]


def channel_scale(spec: Spec, params: Affine, columns: int) -> Tensor:
    """The scale of every input channel, ``[I]``, of a static floating input."""
    grain = spec.granularity
    scale = grain.spread(params.scale) if isinstance(grain, PerCluster | PerInput) else params.scale.reshape(-1)
    return scale.expand(columns)


def input_range(spec: Spec, absmax_I: Tensor, share: float, covering: bool = False) -> Affine:
    """Static parameters of a floating-point ``spec``, as stored, that reach ``share`` of the largest magnitude.

    For each input channel: the end of the tensor's range halved k times. k is the integer nearest to ``log2(end /
    absmax)`` of the channel, in ``0 .. 2**exponent - 1`` and within the table of ``spec.stats``. The nearest k, as
    published, clips a channel by a factor of up to 1.41. ``covering`` takes the next lower k, which clips no channel
    itself.

    Args:
        absmax_I: largest magnitude of each input channel.
    """
    assert isinstance(spec.grid, Float)
    end = (share * absmax_I.float().amax()).clamp(min=_SMALLEST)
    if isinstance(spec.granularity, PerInput):
        most = 2 ** min(spec.grid.exponent, spec.stats.grid.bits if spec.stats is not None else 5) - 1
        k_I = (end / absmax_I.float()).log2()
        k_I = (k_I.floor() if covering else k_I.round()).clamp(0, most)
        ends_G1 = torch.ldexp(end, -k_I)[:, None]
    else:
        ends_G1 = end.expand(spec.granularity.param_shape((1, len(absmax_I)))).reshape(-1, 1)
    params = spec.as_stored(spec.grid.from_range(-ends_G1, ends_G1))
    assert isinstance(params, Affine)
    return params


def _formats(spec: Spec, searched: bool) -> Iterator[Float]:
    assert isinstance(spec.grid, Float)
    yield from spec.grid.splits() if searched else (spec.grid,)


_Choice = tuple[LinearFormat, Clipped | Fixed | None, Affine | None]


def _same(a: _Choice, b: _Choice) -> bool:
    """Whether a round changed nothing; then further rounds change nothing either."""
    clips = [clip.lo_share_G1 if isinstance(clip, Clipped) else None for _, clip, _ in (a, b)]
    scales = [None if params is None else params.scale for _, _, params in (a, b)]
    return a[0] == b[0] and all(
        x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in (clips, scales)
    )
