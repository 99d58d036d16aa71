"""Rows as tasks of a Ray cluster. Extra ``ray``.

A row asks for as many processors as it has threads and for the memory that ``plan`` foresees, so Ray puts rows side by side where they
fit. On its machine a row runs in a process of its own, as without Ray. A worker or machine that is lost costs its row's work; Ray
starts the row again, elsewhere if need be. The scratch directory, too, has the same path everywhere (:mod:`lowbit.ray_cluster`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.comparison.results import Record
from lowbit.comparison.workers import Assignment, Report, run_one
from lowbit.ray_cluster import LOCAL, RETRIES, check_fits, connected

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class OnRay:
    """A cluster's address (``auto``, ``host:port`` or ``ray://…``), or ``local``: one that is started on this machine."""

    address: str = LOCAL

    def run(self, assignments: Sequence[Assignment], threads: int, report: Report) -> Iterator[tuple[int, Record]]:
        """Runs all assignments, and gives each result when it is there.

        Raises:
            ValueError: no Ray, no such cluster, or a row that no machine of the cluster has the processors or memory for.
        """
        with connected(self.address) as ray:
            for each in assignments:
                advice = "use fewer --threads, a larger machine, or leave the row out (--only)"
                check_fits(ray, f"row {each.label!r}", threads, each.memory, advice)
            task = ray.remote(run_one)
            waiting = {
                task.options(
                    num_cpus=threads,
                    memory=each.memory or None,
                    max_retries=RETRIES,
                    name=each.label,
                ).remote(each, threads, silent): i
                for i, each in enumerate(assignments)
            }
            done = 0
            while waiting:
                report(done, f"{len(waiting)} rows on Ray")
                ready, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
                for reference in ready:
                    done += 1
                    yield waiting.pop(reference), _figures(ray, reference)


def silent(share: float, what: str) -> None:
    """The progress of a row on another machine is not shown."""


def _figures(ray: Any, reference: Any) -> Record:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return {"error": f"lost with its machine {RETRIES + 1} times ({type(error).__name__})"}
