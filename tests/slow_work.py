"""Work that takes a while and notes that it began, in a module of its own that other processes import at once."""

from __future__ import annotations

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
