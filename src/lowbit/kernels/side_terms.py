"""Side terms in compiled code, where sparse weights cost time in proportion to their number.

The torch form of each term (:mod:`lowbit.numerics.side_terms`) is the specification. It runs on other devices, without
compiled code, in float64, and if the input needs a gradient. torch also computes whole columns and low-rank corrections,
which are small matrix products; only the compiled step adds columns itself.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.numerics import KeptColumns, SideTerm, Sparse


def why_not(term: SideTerm) -> str | None:
    """The reason why compiled code cannot read ``term`` (its kind, or tensors not as stored); None if it can."""
    if not isinstance(term, Sparse | KeptColumns):
        return f"a side term of type {type(term).__name__}, which needs its own products"
    stored = term.value.dtype == torch.float16 and term.value.device.type == "cpu"
    if isinstance(term, Sparse):
        stored = stored and term.row_start.dtype == torch.int32 and term.column.dtype in (torch.int16, torch.int32)
    else:
        stored = stored and term.index.dtype == torch.int32
    if not stored or not all(part.is_contiguous() for part in vars(term).values()):
        return "a side term that is not as it is stored"
    return None


def row_arguments(term: Sparse | KeptColumns) -> tuple[int, int, int, int, int, int]:
    """A term as arguments of the compiled code; the term must outlive their use."""
    if isinstance(term, Sparse):
        return native.row_arguments(term.value, term.column, term.row_start)
    return native.row_arguments(term.value, term.index)


def add(y: Tensor, x: Tensor, terms: tuple[SideTerm, ...], isa: str = "") -> Tensor:
    """``y + x @ (sum of terms).T``, for layers that are packed for compiled code.

    Args:
        y: ``[..., O]``; may be changed in place.
        x: ``[..., I]``.
        terms: the layer's side terms.
        isa: one of :func:`~lowbit.kernels.native.instruction_sets`; empty: this machine's best.

    Returns:
        ``[..., O]`` in the dtype of y.
    """
    for term in terms:
        learns = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        if learns or not isinstance(term, Sparse) or why_not(term) or y.dtype not in native.DTYPES:
            y = y + term.apply(x, y.shape[-1])
        elif torch.compiler.is_compiling():
            y = torch.ops.lowbit.sparse_rows(y, x, term.row_start, term.column, term.value, isa)
        else:
            y = _add(y.contiguous(), x, term, isa)
    return y


def _add(y: Tensor, x: Tensor, term: Sparse, isa: str) -> Tensor:
    """Changes the contiguous ``y`` in place."""
    x_TI = x.reshape(-1, x.shape[-1])
    x_TI = (x_TI if x.dtype in native.DTYPES else x_TI.float()).contiguous()
    native.add_rows(isa or native.instruction_sets()[0], x_TI, y.view(-1, y.shape[-1]), row_arguments(term))
    return y


def _added(y: Tensor, x: Tensor, row_start: Tensor, column: Tensor, value: Tensor, isa: str) -> Tensor:
    """The body of the operator ``lowbit::sparse_rows``, which does not change ``y``."""
    return _add(y.clone(memory_format=torch.contiguous_format), x, Sparse(row_start, column, value), isa)


torch.library.define(
    "lowbit::sparse_rows", "(Tensor y, Tensor x, Tensor row_start, Tensor column, Tensor value, str isa) -> Tensor"
)
torch.library.impl("lowbit::sparse_rows", "CPU", _added)


@torch.library.register_fake("lowbit::sparse_rows")
def _shape_only(y: Tensor, x: Tensor, row_start: Tensor, column: Tensor, value: Tensor, isa: str) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)
