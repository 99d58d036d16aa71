"""A file that is there whole or not at all: a full disk or a kill leaves nothing that looks finished, and what was there stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` write a file with another name of the same suffix beside ``path``, which then becomes ``path``.

    A device or a pipe, such as /dev/stdout, is written as it is, and a link stays one.

    Raises:
        OSError: it cannot be written; its message names ``path``.
    """
    with naming(path):
        if path.exists() and not path.is_file():
            write(path)
            return
        target = path.resolve()
        unfinished = target.with_name(f".writing-{target.name}")
        try:
            write(unfinished)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has every OSError name ``path``: that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def write_whole_text(path: Path, text: str) -> None:
    """:func:`write_whole` with a text, in UTF-8."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
