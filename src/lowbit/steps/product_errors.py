"""Squared errors of a product, for many roundings of one factor.

Shapes: N row of the factor that is rounded, M row of the other, R some of the N rows, I inner dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rows = slice | Tensor


class ProductErrors:
    """``|b q^T - e a^T|^2`` for rows q that stand for rows of ``a``: restored rows of a weight, or quantized tokens.

    All is in terms of ``d = q - a``, so that little cancels, with ``r = (e - b) a^T``: ``|b d^T - r|^2``. Where b has more rows than
    columns, this comes from its Gram matrix G, as ``d G d^T - 2 d b^T r + |r|^2``.

    Args:
        a_NI: the exact rows.
        b_MI: what they are multiplied by, as it is now.
        exact_MI: e, the exact values of ``b``; may be ``b`` itself.
        dtype: of the factors of products; sums are in float32.
    """

    def __init__(self, a_NI: Tensor, b_MI: Tensor, exact_MI: Tensor, dtype: torch.dtype = torch.float32):
        self.a_NI, self.dtype = a_NI, dtype
        b = b_MI.to(dtype)
        rest_NM = None if exact_MI is b_MI else a_NI.to(dtype) @ (exact_MI - b_MI).to(dtype).T
        self.by_gram = len(b_MI) > b_MI.shape[1]
        self.factor_IC = b.T @ b if self.by_gram else b.T.contiguous()
        self.rest_NM = self.mixed_NI = self.rest_N = None
        if rest_NM is not None and self.by_gram:
            self.mixed_NI, self.rest_N = 2 * (rest_NM @ b).float(), rest_NM.float().square().sum(1)
        elif rest_NM is not None:
            self.rest_NM = rest_NM.float()

    def of(self, q_RI: Tensor, rows: Rows = slice(None)) -> Tensor:
        """``[R]``, for rows that stand for ``rows`` of ``a``."""
        d_RI = q_RI - self.a_NI[rows]
        moved_RC = (d_RI.to(self.dtype) @ self.factor_IC).float()
        if self.rest_NM is not None:
            moved_RC.sub_(self.rest_NM[rows])
        if not self.by_gram:
            return moved_RC.square_().sum(1)
        if self.mixed_NI is None or self.rest_N is None:
            return moved_RC.mul_(d_RI).sum(1)
        return moved_RC.sub_(self.mixed_NI[rows]).mul_(d_RI).sum(1).add_(self.rest_N[rows])
