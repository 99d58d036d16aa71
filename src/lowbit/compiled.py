"""The compiled code of this installation (``kernels/cpu``), for every layer that calls it.

``library`` is None where lowbit was installed without a C++ compiler. All compiled loops run in torch's own pool of threads.
"""

from __future__ import annotations

import ctypes
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

library: Any
try:
    library = import_module("lowbit._cpu")
except ImportError:  # installed where there was no compiler
    library = None

ENVIRONMENT = "LOWBIT_KERNELS"
"""The environment variable that forces a kernel: ``reference`` is torch, an instruction set its compiled code."""


def forced() -> str | None:
    """The kernel that the environment variable LOWBIT_KERNELS forces; None if it is not set."""
    return os.environ.get(ENVIRONMENT) or None


def instruction_sets() -> list[str]:
    """Names of the compiled kernels that this CPU runs, the widest first; empty without compiled code."""
    return [] if library is None else library.instruction_sets()


def solver_set(*tensors: Tensor | None) -> str | None:
    """The instruction set for the inner loops of fits and solvers; None: torch runs them.

    torch runs them where there is no compiled code, where LOWBIT_KERNELS is ``reference``, and if a tensor is not float32 on
    the CPU.
    """
    if library is None or forced() == "reference" or torch.compiler.is_compiling():
        return None
    if any(t is not None and (t.dtype != torch.float32 or t.device.type != "cpu") for t in tensors):
        return None
    sets = instruction_sets()
    name = forced()
    return name if name in sets else sets[0]


def address(tensor: Tensor | None) -> int:
    """Where the numbers of a tensor lie, which must outlive their use; 0 without one."""
    return 0 if tensor is None else tensor.data_ptr()


def _torch_pool() -> tuple[int, int, int]:
    """Addresses of ``GOMP_parallel``, ``omp_get_num_threads`` and ``omp_get_thread_num`` in torch's OpenMP runtime; zeros if
    it is not found.

    LLVM's and Intel's runtimes have the same entries. Only libraries that are already loaded count.
    """
    candidates: list[str | None] = [None]
    candidates += [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))]
    candidates += [str(path) for path in sorted(Path(torch.__file__).parent.parent.glob("torch.libs/lib*omp*"))]
    for name in candidates:
        try:
            library = ctypes.CDLL(name, mode=getattr(ctypes, "RTLD_NOLOAD", 4) if name else ctypes.DEFAULT_MODE)
            entries = library.GOMP_parallel, library.omp_get_num_threads, library.omp_get_thread_num
        except (OSError, AttributeError):
            continue
        parallel, size, number = (ctypes.cast(entry, ctypes.c_void_p).value or 0 for entry in entries)
        return parallel, size, number
    return 0, 0, 0


if library is not None:
    _pool = _torch_pool()
    library.use_pool(_pool[0])
    library.use_team(*_pool)
