"""Search of floating-point formats and their ranges: the number of exponent bits and the largest number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.modules import ActSpec, DraftLinear, LinearFormat, fake_activation, fake_quantize_activation
from lowbit.numerics import (
    AbsMax,
    Affine,
    Clipped,
    Fixed,
    Float,
    PerInput,
    Samples,
    Spec,
    Statistic,
    fake_quantize,
    serializable,
)
from lowbit.steps.effects import Freedom
from lowbit.steps.state import BlockState, Stats
from lowbit.steps.step import Step

_SMALLEST = 2.0**-60  # the range of an input that is zero on every calibration token
_PARTS = 8  # in which the tokens that judge an input come


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
        x_TI = x_TI.float()
        y_TO, inputs = x_TI @ w_OI.T, [] if act is None else self._inputs(act, absmax_I)
        for _ in range(self.rounds if floating and act is not None else 1):
            before = form, draft.range_shares, draft.act_params
            if floating:
                seen_TI = fake_activation(x_TI, form.act, draft.act_params)
                spec, draft.range_shares = self._best_weight(w_OI, form.weight, seen_TI, y_TO)
                form = replace(form, weight=spec)
            if inputs:
                restored_OI = _restored(w_OI, form.weight, draft.range_shares)
                act, draft.act_params = _best_input(x_TI, inputs, restored_OI, y_TO)
                form = replace(form, act=act)
            draft.format = form
            state.tick("searching")
            if _same(before, (form, draft.range_shares, draft.act_params)):
                break

    def _best_weight(self, w_OI: Tensor, spec: Spec, seen_TI: Tensor, y_TO: Tensor) -> tuple[Spec, Clipped]:
        best, chosen = float("inf"), (spec, Clipped(*[torch.ones(1, 1)] * 2))
        errors = _Errors(w_OI, seen_TI, y_TO)
        rows, columns = spec.granularity.param_shape((w_OI.shape[0], w_OI.shape[1]))
        for grid in _formats(spec, self.weight_format):
            here, lost_O, share_O = replace(spec, grid=grid), None, torch.ones(len(w_OI))
            for share in self.shares:
                error_O = errors.of(_restored(w_OI, here, _clip(share)))
                if rows != len(w_OI):  # rows share ranges: one share for all
                    error_O = error_O.sum().expand_as(error_O)
                better = torch.ones_like(error_O, dtype=torch.bool) if lost_O is None else error_O < lost_O
                lost_O = error_O if lost_O is None else error_O.where(better, lost_O)
                share_O = share_O.masked_fill(better, share)
            assert lost_O is not None
            lost = lost_O.double().sum().item() if rows == len(w_OI) else lost_O[0].item()
            if lost < best:
                of_granules = share_O[:rows].repeat_interleave(columns)[:, None]
                best, chosen = lost, (here, Clipped(of_granules, of_granules))
        return chosen

    def _inputs(self, act: ActSpec, absmax_I: Tensor) -> list[tuple[ActSpec, Affine]]:
        """All formats and ranges to try for the input."""
        tried = []
        for grid in _formats(act.spec, self.activation_format):
            here = replace(act, spec=replace(act.spec, grid=grid))
            tried += [(here, input_range(here.spec, absmax_I, *chosen)) for chosen in self._ranges(here.spec)]
        return tried


class _Errors:
    """``|b q^T - y|^2`` for rows q that stand for rows of ``a``: restored rows of a weight, or quantized tokens.

    Where b has more rows than columns, they come from its Gram matrix G, in terms of ``d = q - a`` so that little cancels:
    ``d G d^T - 2 d b^T r + |r|^2`` with ``r = y - b a^T``.

    Args:
        a_NI: the exact rows.
        b_MI: what they are multiplied by, as it is now.
        y_MN: the exact product.
    """

    def __init__(self, a_NI: Tensor, b_MI: Tensor, y_MN: Tensor):
        self.a_NI, self.b_MI, self.y_MN = a_NI, b_MI, y_MN
        self.gram_II = None
        if len(b_MI) > b_MI.shape[1]:
            rest_MN = y_MN - b_MI @ a_NI.T
            self.gram_II, self.mixed_NI, self.rest_N = b_MI.T @ b_MI, rest_MN.T @ b_MI, rest_MN.square().sum(0)

    def of(self, q_RI: Tensor, rows: slice = slice(None)) -> Tensor:
        """``[R]``, for rows that stand for ``rows`` of ``a``."""
        if self.gram_II is None:
            return (q_RI @ self.b_MI.T).sub_(self.y_MN[:, rows].T).square_().sum(1)
        d_RI = q_RI - self.a_NI[rows]
        return (d_RI @ self.gram_II).sub_(self.mixed_NI[rows], alpha=2).mul_(d_RI).sum(1).add_(self.rest_N[rows])


def _best_input(
    x_TI: Tensor, tried: Sequence[tuple[ActSpec, Affine]], w_OI: Tensor, y_TO: Tensor
) -> tuple[ActSpec, Affine]:
    """The format and range whose output errs least; the first of equals.

    Tokens come in parts. A candidate is given up once its sum exceeds the least whole one, so the first part puts the
    candidates in order.
    """
    errors, size = _Errors(x_TI, w_OI, y_TO.T), -(-len(x_TI) // _PARTS)
    parts = [slice(start, start + size) for start in range(0, len(x_TI), size)]

    def error(i: int, part: slice) -> float:
        return errors.of(fake_quantize_activation(x_TI[part], *tried[i]), part).sum(dtype=torch.float64).item()

    sums = [error(i, parts[0]) for i in range(len(tried))]
    least, best = float("inf"), 0
    for i in sorted(range(len(tried)), key=sums.__getitem__):
        for part in parts[1:]:
            if not sums[i] <= least:
                break
            sums[i] += error(i, part)
        if sums[i] < least or (sums[i] == least and i < best):
            least, best = sums[i], i
    return tried[best]


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


def _clip(share: float) -> Clipped:
    each = torch.full((1, 1), share)
    return Clipped(each, each)


def _restored(w_OI: Tensor, spec: Spec, clip: Clipped | Fixed | None) -> Tensor:
    """The weight as rounding to nearest will store it."""
    return fake_quantize(w_OI, spec, clip)


_Choice = tuple[LinearFormat, Clipped | Fixed | None, Affine | None]


def _same(a: _Choice, b: _Choice) -> bool:
    """Whether a round changed nothing; then further rounds change nothing either."""
    clips = [clip.lo_share_G1 if isinstance(clip, Clipped) else None for _, clip, _ in (a, b)]
    scales = [None if params is None else params.scale for _, _, params in (a, b)]
    return a[0] == b[0] and all(
        x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in (clips, scales)
    )
