"""GPU kernels in Triton: which layers they take. Importing this imports no triton, and needs none.

They read the canonical codes as they are on disk, so that a layer runs where it was moved to, without a second form. A tile
of the weight is decoded in registers, in float32 as the reference decodes it, and multiplied

* one vector: elementwise in float32;
* more of them: by the matrix instructions, both sides in the dtype of the input, sums in float32;
* integers as the recipe quantizes them, against integers with one scale a row: by the integer matrix instructions.

``launch.py`` prepares the arguments, ``device.py`` is what the GPU runs. With TRITON_INTERPRET=1 set before triton is
imported, the same code runs on a CPU in numpy, slowly, which is how it is tested where there is no GPU.
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

_OLDEST = (8, 0)  # compute capability that triton compiles for; a ROCm device has numbers of its own, from 9 up


def interpreted() -> bool:
    """Whether the kernels run (or would, if none has yet) in triton's interpreter, on CPU tensors too."""
    device = sys.modules.get("lowbit.kernels.triton.device")
    if device is not None:  # what triton was told when it compiled or did not compile is settled
        return device.INTERPRETED
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def why_not(layer: PackedLinear, rows: int) -> str | None:
    """Why no Triton kernel runs ``layer``."""
    if layer.device.type == "cpu" and not interpreted():
        return "written for GPUs, the layer is on cpu; TRITON_INTERPRET=1 runs it there, for tests"
    if layer.device.type not in ("cpu", "cuda"):
        return f"triton is asked for CUDA and ROCm devices only, the layer is on {layer.device.type}"
    missing = _missing(interpreted()) or (_too_old(layer.device.index) if layer.device.type == "cuda" else None)
    if missing is not None:
        return f"{missing}; the weight is decoded at every call instead"
    if not isinstance(layer.spec.grid, Int | Float | Normal | Table | Codebook | BinaryCoded):
        return f"weights are {type(layer.spec.grid).__name__}, which has no Triton kernel"
    if shared_by(layer.spec, layer.shape) is None:
        return f"parameters are {layer.spec.granularity}, Triton kernels take groups within a row, or blocks"
    if layer.threshold:
        return "channels over a threshold stay in floating point, which has no Triton kernel"
    if _parameters(layer.spec, layer.shape) >= 2**31:
        return "there are more parameters than 32-bit indices reach"
    return None


def _parameters(spec: Spec, shape: tuple[int, int]) -> int:
    """Numbers, or bits where they are codes, of the largest field of the parameters."""
    return prod(spec.granularity.param_shape(shape)) * max(
        field.width * (field.bits or 1) for field in spec.grid.fields
    )


@functools.cache
def _missing(interpreted: bool) -> str | None:
    """What this machine lacks."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # nothing, or a folder of that name
        return "triton is not installed (pip install 'lowbit[gpu]')"
    if not interpreted and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton builds its launchers with a C compiler and there is none (install gcc, or set CC)"
    return None


@functools.cache
def _too_old(index: int | None) -> str | None:
    if interpreted():
        return None
    found = torch.cuda.get_device_capability(index)
    if found >= _OLDEST:
        return None
    return f"triton compiles for compute capability 8.0 and newer, this GPU has {found[0]}.{found[1]}"


def run(x: Tensor, layer: PackedLinear) -> Tensor:
    """The product with the packed weight, and the side terms: x ``[..., I]`` floating, ``[..., O]`` in its dtype.

    Where a gradient is asked for, the reference runs: it decodes the weight, and torch knows the rest.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return reference(x, layer)
    from lowbit.kernels.triton import launch  # imports triton

    return launch.linear(x, layer)


register(Kernel("triton", why_not, run))
