"""Where a checkpoint is to be written: nothing that exists is overwritten."""

from __future__ import annotations

from pathlib import Path


class OutputError(ValueError):
    """The target cannot be used as given; the message says what was found and what to do."""


def check_target(out: Path) -> None:
    """Raises OutputError unless ``out`` does not exist or is an empty directory."""
    if out.is_file():
        raise OutputError(f"{out} is a file; choose a directory with -o DIR")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not empty; nothing is overwritten: remove it or choose another -o DIR")
