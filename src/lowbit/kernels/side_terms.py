"""Side terms by compiled code: what single weights add to a product costs as much as they store.

The torch form of each term (:mod:`lowbit.numerics.side_terms`) is the specification, and runs wherever this does not: on other
devices, where there is no compiled code, in float64, and where a gradient is asked of the input. Whole columns and corrections
of low rank are small products of matrices, which torch does well; the compiled step adds columns too.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.numerics import KeptColumns, SideTerm, Sparse


def why_not(term: SideTerm) -> str | None:
    """Why compiled code does not read ``term``: a kind that it does not know, or parts that are not as they are stored."""
    if not isinstance(term, Sparse | KeptColumns):
        return f"a side term of type {type(term).__name__}, which takes products of its own"
    stored = term.value.dtype == torch.float16 and term.value.device.type == "cpu"
    if isinstance(term, Sparse):
        stored = stored and term.row_start.dtype == torch.int32 and term.column.dtype in (torch.int16, torch.int32)
    else:
        stored = stored and term.index.dtype == torch.int32
    if not stored or not all(part.is_contiguous() for part in vars(term).values()):
        return "a side term that is not as it is stored"
    return None


def check(term: SideTerm, shape: tuple[int, int]) -> None:
    """Raises ValueError where a term of a layer ``[O, I]`` points outside of it: a torn file would have memory read."""
    rows, columns = shape
    at = term.column if isinstance(term, Sparse) else term.index if isinstance(term, KeptColumns) else torch.zeros(0)
    if at.numel() and not 0 <= int(at.amin()) <= int(at.amax()) < columns:
        raise ValueError(
            f"a side term names channels {int(at.amin())} to {int(at.amax())} of {columns}: the file is damaged"
        )
    if isinstance(term, Sparse):
        start = term.row_start
        whole = len(start) == rows + 1 and start[0] == 0 and (start.diff() >= 0).all()
        if not whole or not len(term.value) == len(at) == int(start[-1]):
            raise ValueError(f"a side term's {len(at)} weights are not those of {rows} rows: the file is damaged")
    if isinstance(term, KeptColumns) and tuple(term.value.shape) != (rows, len(at)):
        raise ValueError(
            f"a side term keeps {list(term.value.shape)} where {[rows, len(at)]} belong: the file is damaged"
        )


def row_arguments(term: Sparse | KeptColumns) -> tuple[int, int, int, int, int]:
    """A term as the compiled code takes it; the term has to outlive its use."""
    if isinstance(term, Sparse):
        return native.row_arguments(term.value, term.column, term.row_start)
    return native.row_arguments(term.value, term.index)


def add(y: Tensor, x: Tensor, terms: tuple[SideTerm, ...], isa: str = "") -> Tensor:
    """``y + x @ (sum of terms).T`` for x ``[..., I]``: ``[..., O]`` in the dtype of y, which may be changed in place.

    For layers that are packed for compiled code; an empty ``isa`` is this machine's best.
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
    """``y``, contiguous and changed in place."""
    x_TI = x.reshape(-1, x.shape[-1])
    x_TI = (x_TI if x.dtype in native.DTYPES else x_TI.float()).contiguous()
    native.add_rows(isa or native.instruction_sets()[0], x_TI, y.view(-1, y.shape[-1]), row_arguments(term))
    return y


def _added(y: Tensor, x: Tensor, row_start: Tensor, column: Tensor, value: Tensor, isa: str) -> Tensor:
    """The body of the operator ``lowbit::sparse_rows``, which leaves ``y`` as it is."""
    return _add(y.clone(memory_format=torch.contiguous_format), x, Sparse(row_start, column, value), isa)


torch.library.define(
    "lowbit::sparse_rows", "(Tensor y, Tensor x, Tensor row_start, Tensor column, Tensor value, str isa) -> Tensor"
)
torch.library.impl("lowbit::sparse_rows", "CPU", _added)


@torch.library.register_fake("lowbit::sparse_rows")
def _shape_only(y: Tensor, x: Tensor, row_start: Tensor, column: Tensor, value: Tensor, isa: str) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)
