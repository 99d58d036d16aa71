"""A connection to a Ray cluster. Extra ``ray``.

Work that is sent there imports this package and opens models by their paths, so machines share a file system: the model and this
package have the same paths everywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL = "local"
"""The address that stands for a cluster that is started on this machine."""
RETRIES = 3
"""Times that work is started again whose worker or machine was lost."""


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
def connected(address: str) -> Iterator[Any]:
    """The module ``ray``, connected to a cluster; left as it was found.

    Args:
        address: ``auto``, ``host:port`` or ``ray://…``, or :data:`LOCAL`. A process that is connected already stays so.

    Raises:
        ValueError: no Ray, or no such cluster.
    """
    ray = imported()
    if ray.is_initialized():
        yield ray
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
        yield ray
    finally:
        ray.shutdown()


def check_fits(ray: Any, what: str, threads: int, memory: int, advice: str) -> None:
    """Refuses work that would wait for ever.

    Args:
        what: names the work, as the subject of a sentence.
        threads: processors that it takes.
        memory: bytes that it takes.
        advice: what to do, as the end of a sentence.

    Raises:
        ValueError: no machine of the cluster has both.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(has.get("CPU", 0) >= threads and has.get("memory", 0) >= memory for has in machines):
        return
    most = max((has.get("memory", 0) for has in machines), default=0)
    raise ValueError(
        f"{what} takes {threads} processors and about {memory / 1e9:.2f} GB, and no machine of the cluster has both (the most memory "
        f"is {most / 1e9:.2f} GB): {advice}"
    )
