"""Who runs the rows: a process of this machine, one after another, or a Ray cluster (:mod:`lowbit.comparison.on_ray`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lowbit.comparison import child
from lowbit.comparison.results import Record

Report = Callable[[float, str], None]
"""``report(works done, what)``; the first is fractional while a work runs."""


@dataclass(frozen=True)
class Assignment:
    """One row's work.

    Attributes:
        label: the row's.
        work: what is run.
        place: its own folder.
        memory: bytes that it will take, as planned.
    """

    label: str
    work: child.Work
    place: Path
    memory: int = 0


class Workers(Protocol):
    """``run`` gives each assignment's place in the sequence, and its figures when they are known."""

    def run(self, assignments: Sequence[Assignment], threads: int, report: Report) -> Iterator[tuple[int, Record]]: ...


class OneAfterAnother:
    """Each work in a new process of this machine, in their order."""

    def run(self, assignments: Sequence[Assignment], threads: int, report: Report) -> Iterator[tuple[int, Record]]:
        for i, each in enumerate(assignments):
            yield (
                i,
                run_one(each, threads, lambda share, what, i=i, each=each: report(i + share, f"{each.label}: {what}")),
            )


def run_one(assignment: Assignment, threads: int, progress: Any) -> Record:
    """One work in a process of its own."""
    assignment.place.mkdir(parents=True, exist_ok=True)
    progress(0.0, "starting")
    return child.run_in_child(assignment.work, threads, assignment.place / "log.txt", progress)
