"""Where a checkpoint is to be written: nothing that exists is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

_FILES = (".gguf", ".safetensors")
"""Endings of files that lie in a directory."""


class OutputError(ValueError):
    """The target cannot be used as given; the message says what was found and what to do."""


def check_target(out: Path) -> Path:
    """The directory that ``out`` names, links resolved.

    Raises:
        OutputError: it is named as a file; it exists and is not an empty directory; or it is one that cannot be replaced by a finished directory
            (a mount, the current directory, a parent that cannot be written).
    """
    out = out.resolve()
    if out.suffix in _FILES:
        raise OutputError(f"{out}: -o names a directory, in which the files are written; leave out {out.suffix}")
    if out.is_file():
        raise OutputError(f"{out} is a file; choose a directory with -o DIR")
    if out.is_dir():
        if any(out.iterdir()):
            raise OutputError(
                f"{out} exists and is not empty; nothing is overwritten: remove it or choose another -o DIR"
            )
        what = "a mount point" if os.path.ismount(out) else "the current directory" if out == Path.cwd() else None
        if what is not None:
            raise OutputError(
                f"{out} is {what}, which cannot be replaced; choose a new directory in it: -o {out / 'NAME'}"
            )
    _check_parent(out, "DIR")
    return out


def check_new_file(out: Path, suffixes: tuple[str, ...], what: str) -> None:
    """Checks before any work that a file can be written, with the directories that lead to it.

    Args:
        out: the file.
        suffixes: how its name may end.
        what: the file's kind, with its article.

    Raises:
        OutputError: it exists, its name ends otherwise, or no directory can be made for it.
    """
    if out.exists():
        raise OutputError(f"{out} exists; nothing is overwritten: remove it or choose another -o FILE")
    if out.suffix not in suffixes:
        raise OutputError(f"{out}: {what} ends in {' or '.join(suffixes)}")
    _check_parent(out.resolve(), "FILE")


def _check_parent(out: Path, what: str) -> None:
    parent = next(each for each in out.parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be made: {parent} cannot be written; choose another -o {what}")
