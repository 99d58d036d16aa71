"""Directories for temporary files that do not outlive their runs for long, even where a run was killed."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

MARK = "lowbit-scratch.lock"
"""A file that its run holds locked. A directory with one that nobody holds was left by a run that was killed."""


@contextmanager
def scratch_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new directory ``<prefix>-...``, removed at the end. Those that killed runs have left are removed first.

    Args:
        prefix: what the name begins with; only directories of the same prefix are looked at.
        parent: where; None: the system's directory for temporary files.
    """
    place = Path(tempfile.gettempdir()) if parent is None else parent
    for mark in place.glob(f"{glob.escape(prefix)}-*/{MARK}"):
        try:
            with FileLock(mark, timeout=0):
                pass
        except (Timeout, OSError):
            continue  # its run goes on, or it is another user's
        shutil.rmtree(mark.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}-", dir=place, ignore_cleanup_errors=True) as folder:
        with FileLock(Path(folder) / MARK):
            yield Path(folder)
