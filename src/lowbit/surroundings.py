"""The process around the package's work: torch settings that its caller made for other work, and freed memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def own_settings() -> Iterator[None]:
    """While open, float32 is the default dtype and the CPU the default device, gradients are computed, and there is neither
    inference mode nor autocast.

    Also a decorator: ``@own_settings()``. Every function of the public interface that computes is under it, so its results
    have the same bits whatever its caller set. Tensors that the caller made in inference mode cannot take part in
    learning; :func:`usable` copies them.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    # A device context looks at every call, so there is one only where it is needed.
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu") if elsewhere else nullcontext(),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def usable(x: torch.Tensor) -> torch.Tensor:
    """``x`` detached, and copied if it was made in inference mode."""
    return x.clone() if x.is_inference() else x.detach()


def return_free_memory() -> None:
    """Gives memory that has been freed back to the operating system, where the C library can (glibc).

    Its allocator does not fit an aligned block into the hole that one of the same size left, so a walk that frees and
    allocates a block at a time grows by about half a block each time without this: measured over 30 blocks of 14 MB,
    280 MB more instead of 30.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
