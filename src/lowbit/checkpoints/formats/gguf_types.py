"""Which of GGUF's types holds a packed weight as it is, and the weight in it.

A weight in the format of a type is stored as it is. Integers with plain scales fit too, where their levels are among those of a
type and their groups are whole blocks: codes are moved to the type's middle, and a scale is repeated for each of its blocks. The
numbers are the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.checkpoints.formats.base import group_size
from lowbit.layouts import pack, unpack
from lowbit.layouts.ggml import BLOCK_TYPES, IQ4_LEVELS, BlockType
from lowbit.numerics import Int, PerGroup, SignedScale, Spec, Table

_PLAIN = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
"""Types of integers around zero by bits."""


def type_of(spec: Spec, shape: tuple[int, int], preferred: str | None = None) -> BlockType | str:
    """The smallest type that holds a weight of ``shape`` in ``spec`` as it is, or the ``preferred`` one of two; the reason where
    there is none."""
    own = [kind for kind in BLOCK_TYPES.values() if kind.spec == _with_signs(spec)]
    for kind in sorted(own, key=lambda kind: kind.name != preferred):
        if shape[1] % kind.elements == 0:
            return kind
        return f"blocks of {kind.name} are {kind.elements} inputs, which do not divide {shape[1]}"
    grid = spec.grid
    if not isinstance(grid, Int) or grid.real_zero or spec.stats is not None:
        return "its weights are integers with plain scales, or in one of its own formats (--format gguf:q4_k_m)"
    levels = (0 if grid.symmetric else 2**grid.bits - 1, 2**grid.bits - 1)
    low, high = (grid.middle, levels[1] - grid.middle) if grid.symmetric else levels
    bits = next((bits for bits in _PLAIN if low <= 2 ** (bits - 1) and high < 2 ** (bits - 1)), None)
    if bits is None or grid.bits == 1:
        return f"it has integers around zero of up to 8 bits, which {grid.bits} bits with {_zero(grid)} do not fit"
    size = group_size(spec, shape[1])
    if size is None or shape[1] % 32 or (size < shape[1] and size % 32):
        return (
            f"its blocks are 32 inputs with one scale, these weights ({shape[1]} inputs) are {spec.granularity}; "
            "--group-size 32 or a multiple of it fits"
        )
    return BLOCK_TYPES[_PLAIN[bits]]


def _with_signs(spec: Spec) -> Spec:
    """A table whose scales have either sign in place of one whose scales are positive, which holds fewer numbers."""
    signed = isinstance(spec.grid, Table) and not spec.grid.absmax and replace(spec.grid, signed=True) == IQ4_LEVELS
    return replace(spec, grid=IQ4_LEVELS) if signed else spec


def _zero(grid: Int) -> str:
    return "no level at zero" if grid.bits == 1 else "zero points"


def encode(
    spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor], preferred: str | None = None
) -> tuple[BlockType, Tensor]:
    """The type, and the rows of the weight in it, uint8 ``[O, bytes]``. :func:`type_of` gives a type.

    Raises:
        ValueError: a scale that float16 does not hold.
    """
    kind = type_of(spec, shape, preferred)
    assert isinstance(kind, BlockType)
    if kind.spec == _with_signs(spec):
        return kind, kind.encode(tensors, shape)
    grid, (rows, columns) = spec.grid, shape
    middle = kind.spec.grid
    assert isinstance(grid, Int) and isinstance(middle, SignedScale)
    size = group_size(spec, columns) or columns
    codes = unpack(tensors["codes"], grid.bits, columns)
    group = torch.arange(columns) // size
    if grid.symmetric:
        codes = codes + int(middle.middle - grid.middle)
    else:
        zero = unpack(tensors["zero"], grid.bits, tensors["scale"].numel()).view(rows, -1)
        codes = codes + middle.middle - zero[:, group]
    scale = _halves(tensors["scale"][:, group[::32]], (codes == middle.middle).view(rows, -1, 32).all(2))
    return kind, kind.encode({"codes": pack(codes, middle.bits), "scale": scale}, shape)


def _halves(scale: Tensor, unused: Tensor) -> Tensor:
    """Scales in float16, and zeros where every number of the block is zero and so any scale serves."""
    half = scale.half()
    exact = half.to(scale.dtype) == scale
    if not (exact | unused).all():
        worst = scale[~(exact | unused)][0].item()
        raise ValueError(
            f"a scale of {worst:.6g} ({scale.dtype}) is no number of float16, in which GGUF stores scales; quantize with "
            "scales in float16 (--embedding-bits 16 for an embedding)"
        )
    return half.masked_fill(~exact, 0)


def decode(kind: BlockType, data: Tensor, shape: tuple[int, int]) -> tuple[Spec, dict[str, Tensor]] | None:
    """The format and the buffers of a weight of type ``kind``; None where no packed layer holds its numbers.

    Integers whose scales are all positive are those of :class:`~lowbit.numerics.Int`, which has the fastest kernels.
    """
    tensors = kind.decode(data, shape)
    positive = bool((tensors["scale"].float() > 0).all()) if kind.spec.stats is None else False
    if isinstance(kind.spec.grid, SignedScale) and positive:
        return Spec(Int(kind.spec.grid.bits, symmetric=True), PerGroup(32)), tensors
    if isinstance(kind.spec.grid, Table) and not (positive or kind.spec.grid.signed):
        return None
    return kind.spec, tensors
