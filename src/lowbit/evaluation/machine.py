"""The machine on which figures were measured."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from lowbit.kernels import native


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, system, threads, torch, and the compiled kernels that run here."""
    return {
        "cpu": cpu_name(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instruction_sets": native.instruction_sets(),
    }
