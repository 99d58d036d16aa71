"""Rows as tasks of a Ray cluster. Extra ``ray``.

A row asks for as many processors as it has threads and for the memory that ``plan`` foresees, so Ray puts rows side by side where they
fit. On its machine a row runs in a process of its own, as without Ray. A worker or machine that is lost costs its row's work; Ray
starts the row again, elsewhere if need be. Machines share a file system: the model, the scratch directory and this package have the
same paths everywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lowbit.comparison.results import Record
from lowbit.comparison.workers import Assignment, Report, run_one

LOCAL = "local"
RETRIES = 3
"""Times that a row is started again whose worker or machine was lost."""
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
        ray = imported()
        with _connected(ray, self.address):
            _check_fits(ray, assignments, threads)
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


def imported() -> Any:
    """The module ``ray``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("Ray is not installed: pip install 'lowbit[ray]', or leave --ray out") from error
    return ray


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Ray, connected; left as it was found."""
    if ray.is_initialized():
        yield
        return
    path = os.pathsep.join(entry for entry in sys.path if entry)  # what can be imported here can be imported there
    try:
        ray.init(
            address=None if address == LOCAL else address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            **({"include_dashboard": False} if address == LOCAL else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"no Ray cluster at {address} ({error}): start one with `ray start --head`, or use --ray local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_fits(ray: Any, assignments: Sequence[Assignment], threads: int) -> None:
    """Refuses a row that would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for each in assignments:
        if not any(has.get("CPU", 0) >= threads and has.get("memory", 0) >= each.memory for has in machines):
            most = max((has.get("memory", 0) for has in machines), default=0)
            raise ValueError(
                f"row {each.label!r} takes {threads} processors and about {each.memory / 1e9:.2f} GB, and no machine of the cluster has "
                f"both (the most memory is {most / 1e9:.2f} GB): use fewer --threads, a larger machine, or leave the row out (--only)"
            )


def _figures(ray: Any, reference: Any) -> Record:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return {"error": f"lost with its machine {RETRIES + 1} times ({type(error).__name__})"}
