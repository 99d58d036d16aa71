"""Coordinate descent over codes: lowers the loss of a solved weight further, one column of codes at a time.

These are QuIP's greedy passes (arXiv:2307.13304) in a form that never raises the loss. Let ``S = Q - W``. The best value of
column j, with all others fixed, is ``q_j - (S H)_j / H_jj`` in each row, and the nearest code to it is the best code. The
authors' code clips codes after a whole pass; S then disagrees with clipped codes and the loss can rise. Here the grid
clips in each step, and S follows the codes.

Law: a pass never raises ``tr(S H S^T)``, with H damped as in the solver. Shapes: O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.numerics import Grid, Params
from lowbit.solve.kept import Kept


def descend(
    codes_IO: Tensor,
    W: Tensor,
    H: Tensor,
    damp: float,
    params_of: Callable[[int], Params],
    grid: Grid,
    kept: Kept | None,
    passes: int,
    block: int = 128,
) -> None:
    """Improves ``codes_IO`` in place, in at most ``passes`` passes over all columns; it stops when a pass changes nothing.

    Args:
        codes_IO: uint8 ``[I, O]``, changed.
        W: the target ``[I, O]``.
        H: ``[I, I]``, not damped, in the same order.
        damp: share of the mean diagonal that is added to the diagonal of H.
        params_of: parameters of a column, one set for each row.
        grid: decodes the codes.
        kept: weights stored outside the codes; not changed.
        passes: most passes.
        block: columns between two updates of S H; changes speed only.
    """
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    n = len(W) if kept is None else kept.rounded
    S = torch.stack([grid.decode(codes_IO[i, :, None], params_of(i))[:, 0] for i in range(len(W))]) - W
    if kept is not None:
        S += kept.value
    for _ in range(passes):
        changed = False
        for i1 in range(0, n, block):
            i2 = min(i1 + block, n)
            SH = H[i1:i2] @ S  # for the columns of this block; each change updates it
            for j in range(i1, i2):
                params = params_of(j)
                before = S[j] + W[j]
                codes = grid.encode((before - SH[j - i1] / H[j, j])[:, None], params)
                if kept is not None:
                    codes = torch.where(kept.mask[j, :, None], codes_IO[j, :, None], codes)
                after = grid.decode(codes, params)[:, 0]
                if kept is not None:
                    after += kept.value[j]
                if torch.equal(codes[:, 0], codes_IO[j]):
                    continue
                changed = True
                SH.addmm_(H[i1:i2, j, None], (after - before)[None])
                codes_IO[j], S[j] = codes[:, 0], after - W[j]
        if not changed:
            return
