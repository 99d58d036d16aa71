"""The triangular factor that the column recursion runs on, from a Gram matrix that may be anything but well-behaved.

Calibration gives singular matrices (fewer tokens than channels), matrices that rounding made indefinite, and at times
NaN. A ladder of remedies is climbed until a factor exists, and every rung used is told.

Shapes: I input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT64_UP_TO = 8192
"""Channels up to which the factor is computed in float64: beyond, its time and memory outgrow the rest of the solve."""


def inverse_factor(h_II: Tensor, damp: float) -> tuple[Tensor | None, tuple[str, ...]]:
    """U, upper triangular with ``U^T U = (H + d I)^-1``, and notes on how d differs from ``damp * mean(diag H)``.

    The rungs: damping ``damp``, then in steps of 0.01 up to ``damp + 0.04``; then in addition ``1e-6 * max(diag H)``,
    and ten times more up to a tenth of the maximum. None where even that fails. ``h_II`` is not changed.

    U is the inverse of the upper R with ``R R^T = H + d I`` (a Cholesky factor of the reversed matrix). The usual way,
    Cholesky of the inverse, finds the same U with one more factorization that can fail.
    """
    dtype = torch.float64 if h_II.shape[0] <= _FLOAT64_UP_TO else torch.float32
    h_II = h_II.to(dtype, copy=True)
    diag = h_II.diagonal().clone()
    lifts = [(damp + 0.01 * k) * diag.mean() for k in range(5)]
    said = [f"damping raised to {damp + 0.01 * k:.2f}" for k in range(5)]
    for k in range(6):
        lifts.append(lifts[4] + 10.0 ** (k - 6) * diag.max())
        said.append(f"damping raised to {damp + 0.04:.2f} and {10.0 ** (k - 6):.0e} of the largest diagonal added")
    for k, lift in enumerate(lifts):
        h_II.diagonal().copy_(diag + lift)
        U = _reversed_cholesky_inverse(h_II)
        if U is not None:
            return U, (f"Gram matrix not positive definite: {said[k]}",) if k else ()
    return None, ("Gram matrix not positive definite at any damping",)


def _reversed_cholesky_inverse(h_II: Tensor) -> Tensor | None:
    L, info = torch.linalg.cholesky_ex(h_II.flip(0, 1))
    if info.item() != 0:
        return None
    one = torch.eye(len(h_II), dtype=h_II.dtype, device=h_II.device)
    U = torch.linalg.solve_triangular(L.flip(0, 1), one, upper=True)
    return U if bool(torch.isfinite(U).all()) else None


def asymmetric_target(w_IO: Tensor, d_II: Tensor, U: Tensor, share: float) -> Tensor:
    """``W + share * W D H^-1``: the weight that a solver should aim at when the inputs it will see are not the original's.

    With inputs x behind quantized blocks and x' of the original model, ``sum_t |Q x_t - W x'_t|^2`` is
    ``tr((Q - W*) H (Q - W*)^T)`` and a constant, with ``W* = W (I + D H^-1)``, ``D = sum_t (x'_t - x_t) x_t^T``. So any
    solver of the second loss solves the first. GPTAQ (arXiv:2504.02692) corrects column by column inside the recursion
    instead, which uses a part of D only; ``share`` is its alpha, and guards against fitting the calibration text.

    Args:
        w_IO: ``[I, O]``.
        U: as :func:`inverse_factor` returns it.
    """
    return w_IO + share * (U.T @ (U @ (d_II.T @ w_IO)))
