"""Work that takes a while and notes that it began, and work whose process dies, in a module of its own that other processes import
at once."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Slow:
    """Writes a line to ``place``/started, waits, and answers."""

    place: Path
    seconds: float

    def run(self, progress):
        with (self.place / "started").open("a") as file:
            file.write("begun\n")
        time.sleep(self.seconds)
        return {"answer": str(self.place)}


def dies(request: bytes, i: int) -> None:
    """A worker's death in place of :func:`lowbit.stages.spread.solve_block`."""
    os.kill(os.getpid(), signal.SIGKILL)


def dies_once(mark: Path, request: bytes, i: int) -> object:
    """:func:`lowbit.stages.spread.solve_block`; the worker that finds the file ``mark`` removes it and dies."""
    from lowbit.stages.spread import solve_block

    try:
        mark.unlink()
    except FileNotFoundError:
        return solve_block(request, i)
    return dies(request, i)
