"""Coordinate descent over codes: after a solver, lower the loss further by changing one column of codes at a time.

QuIP's greedy passes (arXiv:2307.13304) in a form that cannot get worse. With ``S = Q - W`` the best value of column j, all
others fixed, is ``q_j - (S H)_j / H_jj`` for each row on its own, and the nearest code to it is the best code. The
authors' code clips codes only after a whole pass, so that S and the codes disagree wherever a code is clipped, and the
loss can rise; here the clip is the grid's own, in the step, and S follows the codes.

Law: a pass never raises ``tr(S H S^T)``, H damped as the solver had it. Shapes: O output channel, I input channel.
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
    """Improves ``codes_IO`` in place, at most ``passes`` times over all columns, fewer where a pass changes nothing.

    Args:
        W: ``[I, O]``, what the codes should come close to; H ``[I, I]``, not damped yet, in the same order.
        params_of: a column's parameters, a set for each row.
        kept: what codes do not represent; stays as it is.
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
            SH = H[i1:i2] @ S  # up to date for the columns of this block, and kept so within it
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
