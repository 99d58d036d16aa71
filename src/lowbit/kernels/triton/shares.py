"""The rectangles of weights that share parameters, for the Triton kernels. Does not import triton."""

from __future__ import annotations

from lowbit.numerics import Block, Flat, PerChannel, PerGroup, PerTensor, RowBands, Spec


def shared_by(spec: Spec, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the rectangle of weights that share parameters; None if it is not a rectangle."""
    match spec.granularity:
        case PerTensor():
            return shape
        case PerChannel():
            return 1, shape[1]
        case PerGroup(size):
            return 1, size
        case Flat(size) if shape[1] % size == 0:
            return 1, size
        case Block(rows, columns):
            return rows, columns
        case RowBands():
            return spec.granularity.height(shape), shape[1]
    return None
