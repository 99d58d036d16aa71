"""The candidate with the least sum of errors over samples, found without all sums.

Candidates are compared on a part of the samples, which doubles from round to round. A candidate leaves the race once chance
cannot explain its lag: the sum of its differences from the leader, with those that are still to come taken as the mean of
those seen, exceeds four standard errors (six where they are of few samples). Where samples are alike, few candidates see more than the first part. Those that stay
to the end are compared by whole sums.

A rule of chance can err: a candidate that lags on every sample seen, and would win by some that were not, is lost. Samples that
differ from the others for a known reason therefore come first and count as they are (``apart``), and the others in an order
that spreads every part over the text (:func:`spread`). ``certain`` keeps all candidates: only whole sums decide, and a
candidate is given up when its sum exceeds the least whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

_SURE = (
    (16, 4.0),
    (8, 6.0),
)  # samples at least, and standard errors that chance does not exceed; fewer samples show nothing

Errors = Callable[[int, slice, float], Tensor]
"""``errors(i, part, beyond)``: errors of candidate i on the samples ``part``, at least one for each, in float64. Once their sum
exceeds ``beyond``, the rest may be left out."""


class Result(NamedTuple):
    """``winner``, and how many samples each candidate saw before it left."""

    winner: int
    saw: list[int]


def spread(count: int) -> list[int]:
    """The numbers below ``count`` in an order of which every beginning is spread evenly over all of them."""
    golden = (sqrt(5) - 1) / 2
    return sorted(range(count), key=lambda i: (i * golden) % 1)


def race(
    count: int,
    samples: int,
    errors: Errors,
    *,
    first: int,
    apart: int = 0,
    kept: Container[int] = (),
    certain: bool = False,
) -> Result:
    """The candidate whose errors have the least sum: the first of equals, NaN last.

    Args:
        count: candidates, at least one.
        samples: at least one.
        first: samples of the first round; 0, with ``certain``: there is no first round.
        apart: so many samples from the start say nothing of the others.
        kept: candidates that stay to the end, so that the winner is never worse than they are.
        certain: see the module docstring. There are two rounds then; the first only puts the candidates in order.
    """
    total = [0.0] * count
    seen: list[list[Tensor]] = [[] for _ in range(count)]
    rivals, saw = list(range(count)), [samples] * count

    def rank(i: int) -> tuple[bool, float]:
        return not total[i] >= 0, total[i]

    for part in _parts(samples, first, certain):
        least, last = inf, part.stop == samples
        for i in sorted(rivals, key=rank):
            if last and total[i] > least:
                continue
            found = errors(i, part, least - total[i] if last else inf)
            seen[i].append(found)
            total[i] += sum(found.tolist())
            if last and total[i] >= 0:
                least = min(least, total[i])
        if not last and not certain and part.stop > apart:
            leader = min(rivals, key=rank)
            share = (samples - part.stop) / (part.stop - apart)
            lags = {i: torch.cat(seen[i]) - torch.cat(seen[leader]) for i in rivals}
            for i in rivals:
                if i not in kept and hopeless(lags[i], apart, share):
                    saw[i] = part.stop
            rivals = [i for i in rivals if saw[i] == samples]
    return Result(min(rivals, key=rank), saw)


def _parts(samples: int, first: int, certain: bool) -> Iterator[slice]:
    start, stop = 0, first
    while 0 < stop < samples:
        yield slice(start, stop)
        start, stop = stop, samples if certain else 2 * stop
    yield slice(start, samples)


def hopeless(lag: Tensor, apart: int, share: float) -> bool:
    """Whether a candidate that lags by ``lag`` on the samples seen will not win.

    Args:
        lag: of one error for each sample, or several; those of the first ``apart`` samples come first, one each.
        share: samples still to come, as a multiple of those seen that speak for them.
    """
    known = lag[apart:]
    sure = next((errors for samples, errors in _SURE if len(known) >= samples), None)
    if sure is None:
        return False
    ahead = share * len(known)
    doubt = known.std().item() * sqrt(ahead * ahead / len(known) + ahead)
    return lag.sum().item() + ahead * known.mean().item() > sure * doubt
