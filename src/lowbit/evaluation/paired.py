"""Scores over items, with standard errors and intervals, and the same items answered by two models.

A score's own interval says what other items of this kind would give. Whether a quantized model answers worse than its original is
another question, with a sharper answer: both read the same items, so only items that they answer differently count.

* Standard error of a mean: the sample's standard deviation over the root of the number of items, as lm-eval has it.
* Interval of a share: Wilson's score interval (JASA 22, 1927); of other means: Student's t.
* Interval of the difference of two shares on the same items: Bonett and Price (J. Educ. Behav. Stat. 37, 2012), Wald's interval with
  one item added to either kind of change.
* Test: McNemar's, exact: if neither model is better, an item that changes is lost or gained with probability 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lowbit.evaluation.intervals import Interval, exp, mean_and_interval

_Z = 1.959963984540054  # of a normal distribution's middle 95 %


@dataclass(frozen=True)
class Paired:
    """A metric of a model beside its original's, on the same items. Items count from 0.

    Attributes:
        original: the original's value.
        difference: the mean of the model's values less that of the original's, with its 95 % interval.
        lost: items that only the original answers right; empty for a metric that is not right or wrong.
        gained: items that only this model answers right.
        p_value: McNemar's exact test, two-sided; None for a metric that is not right or wrong.
    """

    original: float
    difference: float
    interval: Interval | None
    lost: tuple[int, ...] = ()
    gained: tuple[int, ...] = ()
    p_value: float | None = None


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    Attributes:
        name: such as ``acc``.
        value: over all items; the mean of ``values`` for every metric but perplexity.
        stderr, interval: of the value; the interval is 95 %. None with fewer than two items.
        values: of each item, 1 or 0 where it is right or wrong.
        against: beside the original, where one was measured.
    """

    name: str
    value: float
    stderr: float | None
    interval: Interval | None
    values: tuple[float, ...] = field(repr=False)
    against: Paired | None = None


@dataclass(frozen=True)
class TaskScore:
    """One task.

    Attributes:
        task: its name.
        protocol: whose prompts and whose scoring.
        items: how many were asked.
        sha256: of their texts and answers, so that only the same items are compared.
        metrics: the figures.
        cut: items of which tokens did not fit into the model's positions.
        broken: items for which the model gave NaN; they count as wrong.
    """

    task: str
    protocol: str
    items: int
    sha256: str
    metrics: tuple[Metric, ...]
    cut: int = 0
    broken: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data; values that are right or wrong are 1 and 0."""
        metrics = {metric.name: _plain(metric) for metric in self.metrics}
        return {key: value for key, value in vars(self).items() if key != "metrics"} | {"metrics": metrics}


def metric_of(name: str, values: Sequence[float]) -> Metric:
    """The mean of ``values``, one for each item."""
    found = np.asarray(values, dtype=np.float64)
    mean, interval = mean_and_interval(found, np.ones(len(found)))
    stderr = None if len(found) < 2 else float(found.std(ddof=1)) / math.sqrt(len(found))
    if _binary(found):
        interval = wilson(int(found.sum()), len(found))
    return Metric(name, mean, stderr, interval, tuple(found.tolist()))


def perplexity_of(name: str, nats: Sequence[float]) -> Metric:
    """exp of the mean negative log-likelihood, lm-eval's perplexity over items; ``values`` are the log-likelihoods.

    NaN if one of them is, infinity where it is beyond a float.
    """
    mean = metric_of(name, nats)
    value = exp(-mean.value)
    around = mean.interval and (exp(-mean.interval[1]), exp(-mean.interval[0]))
    return replace(
        mean, value=value, interval=around, stderr=None if mean.stderr is None else value * mean.stderr
    )  # by the delta method


def against(score: TaskScore, original: TaskScore) -> TaskScore:
    """``score`` with each metric beside the original's.

    Raises:
        ValueError: scores of different items, or an original that gave NaN.
    """
    if score.sha256 != original.sha256:
        raise ValueError(f"task {score.task}: the two models answered different items")
    if original.broken:
        raise ValueError(
            f"task {score.task}: the original model gave NaN for {original.broken} of {original.items} items: check its files, "
            "or leave it out"
        )
    others = {metric.name: metric for metric in original.metrics}
    metrics = [replace(metric, against=paired(metric, others[metric.name])) for metric in score.metrics]
    return replace(score, metrics=tuple(metrics))


def paired(metric: Metric, original: Metric) -> Paired:
    """The comparison item by item. Both have values of the same items."""
    ours, theirs = np.asarray(metric.values), np.asarray(original.values)
    difference = float((ours - theirs).mean())
    if not (_binary(ours) and _binary(theirs)):
        return Paired(original.value, difference, mean_and_interval(ours - theirs, np.ones(len(ours)))[1])
    lost, gained = np.flatnonzero(ours < theirs), np.flatnonzero(ours > theirs)
    return Paired(
        original=original.value,
        difference=difference,
        interval=_of_difference(len(lost), len(gained), len(ours)),
        lost=tuple(lost.tolist()),
        gained=tuple(gained.tolist()),
        p_value=mcnemar(len(lost), len(gained)),
    )


def mcnemar(lost: int, gained: int) -> float:
    """The two-sided p-value that a fair coin gives so unequal a division of ``lost + gained`` items, or a more unequal one."""
    changed, fewer = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(changed, i) for i in range(fewer + 1)) / 2**changed)


def wilson(right: int, items: int) -> Interval:
    """The 95 % score interval of a share of ``items``."""
    share, z2 = right / items, _Z**2
    middle = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = _Z / (1 + z2 / items) * math.sqrt(share * (1 - share) / items + z2 / (4 * items**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _of_difference(lost: int, gained: int, items: int) -> Interval:
    less, more = (lost + 1) / (items + 2), (gained + 1) / (items + 2)
    half = _Z * math.sqrt((less + more - (more - less) ** 2) / (items + 2))
    return max(-1.0, more - less - half), min(1.0, more - less + half)


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _plain(metric: Metric) -> dict[str, Any]:
    values = [int(value) if value in (0, 1) else value for value in metric.values]
    beside = None if metric.against is None else dict(vars(metric.against))
    return {key: value for key, value in vars(metric).items() if key != "name"} | {"values": values, "against": beside}
