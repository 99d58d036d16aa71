"""Activations of a calibration set: in memory up to a limit, in memory-mapped files beyond it.

`[N, T, d]` for every block boundary is what a walk must hold beside one block. Whether an array fits is decided once,
when it is allocated; afterwards both kinds are plain tensors and nothing else needs to know.

A file is reserved in full before it is mapped, because a write into a hole of a full disk kills the process with a
signal instead of raising. It is unlinked as soon as it is mapped, so that the operating system reclaims it however the
process ends, `kill -9` included; that is why the directory looks empty while space is in use.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor


class ActivationStore:
    """Hands out tensors by name, in RAM while the live ones take at most `limit_bytes`, else mapped from `directory`.

    The directory is made when first needed. A context manager: leaving it frees everything. Needs POSIX.
    """

    def __init__(self, limit_bytes: int, directory: str | os.PathLike[str]):
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes = {limit_bytes}; expected 0 (files only) or more.")
        self.limit_bytes = limit_bytes
        self.directory = Path(directory)
        self._live: dict[str, Tensor] = {}
        self._kept = itertools.count()
        self._maps: dict[str, mmap.mmap] = {}

    @property
    def ram_bytes(self) -> int:
        """Bytes of live allocations in RAM."""
        return sum(tensor.nbytes for name, tensor in self._live.items() if name not in self._maps)

    @property
    def disk_bytes(self) -> int:
        """Bytes of live allocations in files."""
        return sum(self._live[name].nbytes for name in self._maps)

    def on_disk(self, name: str) -> bool:
        """Whether a live allocation is a mapped file."""
        return name in self._maps

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of uninitialized values, live until `free(name)`. Raises ValueError when the disk is full."""
        if name in self._live:
            raise ValueError(f"activations {name!r} are already allocated; free them first.")
        size = prod(shape) * dtype.itemsize
        if size and self.ram_bytes + size > self.limit_bytes:
            self._maps[name] = self._map_file(name, size)
            self._live[name] = torch.frombuffer(self._maps[name], dtype=dtype).view(*shape)
        else:
            self._live[name] = torch.empty(tuple(shape), dtype=dtype)
        return self._live[name]

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in an allocation of its own, live until the store is closed."""
        return self.allocate(f"kept {next(self._kept)}", tensor.shape, tensor.dtype).copy_(tensor)

    def __getitem__(self, name: str) -> Tensor:
        """The live allocation of that name; KeyError when there is none."""
        return self._live[name]

    def free(self, name: str) -> None:
        """Forgets an allocation. Its memory or disk space returns when the caller's last reference is gone."""
        del self._live[name]
        self._maps.pop(name, None)

    def trim(self) -> None:
        """Lets the operating system drop the mapped pages from memory; values stay, in the files."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Forgets every allocation."""
        for name in list(self._live):
            self.free(name)

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map_file(self, name: str, size: int) -> mmap.mmap:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory, prefix="activations-") as file:
                _reserve(file.fileno(), size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            why = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else f"cannot be used ({error})"
            raise ValueError(
                f"{self.directory} {why}: activations {name!r} need {size} bytes there ({self.ram_bytes} of "
                f"{self.limit_bytes} bytes of memory are in use). Free space, choose another directory, raise the "
                "memory limit, or use fewer or shorter samples."
            ) from error


def _reserve(descriptor: int, size: int) -> None:
    """Makes a file `size` bytes long with its blocks allocated; OSError when there is no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(2**20)  # macOS has no such call; writing is what allocates there
    for start in range(0, size, len(zeros)):
        os.write(descriptor, zeros[: min(len(zeros), size - start)])
