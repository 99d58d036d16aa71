"""GPU kernels in Triton, and the layers they support. Importing this does not import triton.

The kernels read the canonical codes as on disk, so a layer can move between devices without a second form. They decode a
tile of the weight in registers, in float32 like the reference, and multiply

* one vector: elementwise in float32;
* more vectors: with matrix instructions, both sides in the dtype of the input, sums in float32;
* quantized integers, with integer weights of one scale for each row: with integer matrix instructions.

``launch.py`` prepares the arguments; ``device.py`` is the code that the GPU runs. With TRITON_INTERPRET=1, set before
triton is imported, the same code runs slowly on a CPU in numpy; tests without a GPU use this.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from math import prod

import torch
from torch import Tensor

from lowbit.kernels.ops import Kernel, PackedLinear, reference, register
from lowbit.kernels.triton.shares import shared_by
from lowbit.numerics import BinaryCoded, Codebook, Float, Int, Normal, Spec, Table

_OLDEST = (8, 0)  # oldest compute capability that triton compiles for; ROCm devices have other numbers, from 9 up


def interpreted() -> bool:
    """Whether the kernels run (or would run) in triton's interpreter, also on CPU tensors."""
    device = sys.modules.get("lowbit.kernels.triton.device")
    if device is not None:  # triton decided when it was imported
        return device.INTERPRETED
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def why_not(layer: PackedLinear, rows: int) -> str | None:
    """The reason why no Triton kernel can run ``layer``; None if one can."""
    reason = missing_for(layer.device)
    if reason is not None:
        return reason
    if not isinstance(layer.spec.grid, Int | Float | Normal | Table | Codebook | BinaryCoded):
        return f"weights are {type(layer.spec.grid).__name__}, which has no Triton kernel"
    if shared_by(layer.spec, layer.shape) is None:
        return f"parameters are {layer.spec.granularity}, Triton kernels take groups within a row, or blocks"
    if layer.threshold:
        return "channels over a threshold stay in floating point, which has no Triton kernel"
    if _parameters(layer.spec, layer.shape) >= 2**31:
        return "there are more parameters than 32-bit indices reach"
    return None


def missing_for(device: torch.device) -> str | None:
    """The reason why no Triton kernel runs on ``device``; None if it can."""
    if device.type == "cpu" and not interpreted():
        return "written for GPUs, the layer is on cpu; TRITON_INTERPRET=1 runs it there, for tests"
    if device.type not in ("cpu", "cuda"):
        return f"triton runs on CUDA and ROCm devices only, the layer is on {device.type}"
    missing = _missing(interpreted()) or (_too_old(device.index) if device.type == "cuda" else None)
    return None if missing is None else f"{missing}; the weight is decoded at every call instead"


def _parameters(spec: Spec, shape: tuple[int, int]) -> int:
    """Size of the largest field of the parameters, in numbers, or in bits if they are codes."""
    return prod(spec.granularity.param_shape(shape)) * max(
        field.width * (field.bits or 1) for field in spec.grid.fields
    )


@functools.cache
def _missing(interpreted: bool) -> str | None:
    """The missing software, if any."""
    package = importlib.util.find_spec("triton")
    if package is None or package.origin is None:  # not installed, or a folder of that name
        return "triton is not installed (pip install 'lowbit[gpu]')"
    if not interpreted and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton builds its launchers with a C compiler and there is none (install gcc, or set CC)"
    return None


@functools.cache
def _too_old(index: int | None) -> str | None:
    if interpreted():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST:
        return None
    return f"triton compiles for compute capability 8.0 and newer, this GPU has {capability[0]}.{capability[1]}"


def run(x: Tensor, layer: PackedLinear) -> Tensor:
    """The product with the packed weight plus the side terms: x ``[..., I]`` floating, ``[..., O]`` in its dtype.

    If x needs a gradient the reference runs, because torch can differentiate it.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return reference(x, layer)
    from lowbit.kernels.triton import launch  # imports triton

    return launch.linear(x, layer)


register(Kernel("triton", why_not, run))
