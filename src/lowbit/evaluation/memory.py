"""Bytes of this process at its peak, of a checkpoint on disk, and of a model in memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth"})


@dataclass(frozen=True)
class DirectoryBytes:
    """Bytes of a checkpoint: of the files that hold tensors, and of all files (config, tokenizer and card too)."""

    weights: int
    total: int


def peak_rss() -> int:
    """The largest resident set of this process in bytes, since its start or since `reset_peak_rss` returned True."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    # kilobytes on Linux and the BSDs, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss() -> bool:
    """Makes `peak_rss` count from now.

    Returns:
        False if the system does not offer this (Linux does); then nothing changes.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    peak, now = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    # Some sandboxes accept the write and ignore it; the kernel's report shows that.
    return peak is not None and now is not None and peak <= now + 16 * 2**20


def directory_bytes(path: str | Path) -> DirectoryBytes:
    """Bytes of the files under `path` (a directory, or one file). Links are followed.

    Raises:
        ValueError: nothing is there.
    """
    root = Path(path)
    if not root.exists():
        raise ValueError(f"no checkpoint at {root}: give a directory or a file that exists")
    files = [root] if root.is_file() else [file for file in root.rglob("*") if file.is_file()]
    sizes = [(file.suffix in WEIGHT_SUFFIXES, file.stat().st_size) for file in files]
    return DirectoryBytes(sum(size for is_weights, size in sizes if is_weights), sum(size for _, size in sizes))


def model_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers. Shared storage (tied weights) counts once."""
    storages: dict[tuple, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages[_storage_key(tensor)] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _storage_key(tensor: Tensor) -> tuple:
    """A key that tensors on one storage share. Meta tensors have no address and share a key only with themselves."""
    address = tensor.untyped_storage().data_ptr()
    return (str(tensor.device), address or id(tensor))


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes, or None if there is no such file or field."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(values[0]) * 1024 if values else None
