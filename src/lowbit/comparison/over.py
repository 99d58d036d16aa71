"""Figures over several measurements: the mean of a record's tasks, and rows that differ in their seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from lowbit.comparison.results import Record
from lowbit.evaluation.intervals import student_t


def mean_accuracy(record: Mapping[str, Any]) -> float | None:
    """The mean over a record's tasks of ``acc_norm``, or of ``acc`` where a task has no other, as papers average them."""
    metrics = [_metric(task) for task in (record.get("tasks") or {}).values()]
    return fmean(metric["value"] for metric in metrics) if metrics else None


def accuracy_change(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """The mean over tasks of the change from the original on the same items, and half its 95 % interval.

    Tasks are independent, so the squares of their intervals add. None without an original.
    """
    beside = [_metric(task)["against"] for task in (record.get("tasks") or {}).values()]
    if not beside or any(each is None for each in beside):
        return None
    halves = [(each["interval"][1] - each["interval"][0]) / 2 for each in beside]
    return fmean(each["difference"] for each in beside), math.hypot(*halves) / len(halves)


def over_seeds(records: Sequence[Record]) -> list[str]:
    """For each row that was measured with several seeds: its mean ln ratio, the 95 % interval over seeds, and their number."""
    groups: dict[str, list[float]] = {}
    for record in records:
        label, seed, number = record["label"].rpartition(", seed ")
        value = record.get("log_perplexity_difference")
        if seed and number.isdecimal() and value is not None:
            groups.setdefault(label, []).append(value)
    return [_spread(label, values) for label, values in groups.items() if len(values) > 1]


def _spread(label: str, values: list[float]) -> str:
    if len(set(values)) == 1:
        return f"{label} {values[0]:.4f} (the same with every seed)"
    half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{label} {fmean(values):.4f} ± {half:.4f} ({len(values)} seeds)"


def _metric(task: Mapping[str, Any]) -> Mapping[str, Any]:
    metrics = task["metrics"]
    return metrics["acc_norm"] if "acc_norm" in metrics else metrics["acc"]
