"""Side terms: tensors that a packed linear stores next to its codes and adds to the decoded weight.

    W = decode(codes) + sum of side.dense(W.shape)

Terms are ADDITIVE. To keep a weight w in a term, write ``code = encode(0)`` in its place and store ``w - decode(code)``.
Every decoder (a dense one that adds, a fused one that never builds W) then gives the same sum, also on grids without an
exact zero. With the other usual convention, "replace where the sparse value is not zero", the result depends on the
decoder.

Values are stored in float16; the constructors ``of`` round to it. Shapes: O output channel, I input channel, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SideTerm(Protocol):
    """A frozen dataclass of tensors, which are all stored unchanged."""

    def dense(self, shape: tuple[int, int]) -> Tensor:
        """The term as a float32 matrix ``[O, I]``."""
        ...

    def apply(self, x: Tensor, out_features: int) -> Tensor:
        """``x @ dense.T`` for x ``[..., I]``: ``[..., O]`` in the dtype of x."""
        ...


@dataclass(frozen=True, eq=False)
class Sparse:
    """Single weights, as compressed rows.

    row_start: int32 ``[O + 1]``; column: ``[n]``, int16 up to 32768 columns, else int32; value: float16 ``[n]``.
    """

    row_start: Tensor
    column: Tensor
    value: Tensor

    @staticmethod
    def of(values_OI: Tensor, mask_OI: Tensor) -> Sparse:
        """The entries of ``values_OI`` where ``mask_OI`` is set, also those that are zero.

        Raises:
            ValueError: a value outside the range of float16.
        """
        rows, columns = mask_OI.nonzero(as_tuple=True)
        start = torch.zeros(len(mask_OI) + 1, dtype=torch.int32, device=mask_OI.device)
        start[1:] = mask_OI.sum(1).cumsum(0)
        narrow = torch.int16 if mask_OI.shape[1] <= 2**15 else torch.int32
        return Sparse(start, columns.to(narrow), _half(values_OI[rows, columns]))

    @property
    def row(self) -> Tensor:
        """Row of each value, int64 ``[n]``."""
        counts = self.row_start.diff().long()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def dense(self, shape: tuple[int, int]) -> Tensor:
        out = torch.zeros(shape, dtype=torch.float32, device=self.value.device)
        out[self.row, self.column.long()] = self.value.float()
        return out

    def apply(self, x: Tensor, out_features: int) -> Tensor:
        # This is the specification and not fast: torch's own sparse product is in beta and warns every user.
        return x @ self.dense((out_features, x.shape[-1])).to(x.dtype).T


@dataclass(frozen=True, eq=False)
class KeptColumns:
    """Whole input channels. index: int32 ``[k]``, rising; value: float16 ``[O, k]``."""

    index: Tensor
    value: Tensor

    @staticmethod
    def of(values_Ok: Tensor, index: Tensor) -> KeptColumns:
        """Columns ``values_Ok`` whose channel numbers are ``index``, in any order.

        Raises:
            ValueError: a value outside the range of float16.
        """
        order = index.argsort()
        return KeptColumns(index[order].to(torch.int32), _half(values_Ok[:, order]).contiguous())

    def dense(self, shape: tuple[int, int]) -> Tensor:
        out = torch.zeros(shape, dtype=torch.float32, device=self.value.device)
        out[:, self.index.long()] = self.value.float()
        return out

    def apply(self, x: Tensor, out_features: int) -> Tensor:
        return x[..., self.index.long()] @ self.value.to(x.dtype).T


@dataclass(frozen=True, eq=False)
class LowRank:
    """A correction ``b @ a``. a: float16 ``[R, I]``; b: float16 ``[O, R]``."""

    a: Tensor
    b: Tensor

    @staticmethod
    def of(a_RI: Tensor, b_OR: Tensor) -> LowRank:
        """The factors rounded to float16.

        Raises:
            ValueError: a value outside the range of float16, or factors of different ranks.
        """
        if a_RI.shape[0] != b_OR.shape[1]:
            raise ValueError(f"factors are [R, I] and [O, R], found {list(a_RI.shape)} and {list(b_OR.shape)}")
        return LowRank(_half(a_RI).contiguous(), _half(b_OR).contiguous())

    def dense(self, shape: tuple[int, int]) -> Tensor:
        return self.b.float() @ self.a.float()

    def apply(self, x: Tensor, out_features: int) -> Tensor:
        return (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T


def _half(value: Tensor) -> Tensor:
    stored = value.to(torch.float16)
    if not torch.isfinite(stored).all():
        raise ValueError(f"a kept weight of {value.abs().max().item():.3g} does not fit float16, in which it is stored")
    return stored
