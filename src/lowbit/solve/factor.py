"""The triangular factor for the column recursion, from a Gram matrix that may be badly conditioned.

Calibration can give matrices that mean little (fewer tokens than channels), matrices that rounding made indefinite, and
NaN. A matrix of few tokens is shrunk first. The damping rises in steps until a factor exists, and a note names the damping
that was needed.

Shapes: I input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT64_UP_TO = 8192
"""Most channels for a factor in float64; for wider weights its time and memory would exceed the rest of the solve."""
_DOUBT = 32
"""Tokens at which half of what correlations seem to tell is believed."""


def shrunk(h_II: Tensor, tokens: int) -> tuple[Tensor, float]:
    """The Gram matrix of few tokens, moved towards a multiple of the identity: ``(1 - s) H + s mean(diag H) I``.

    A solver that believes in the correlations of a few tokens moves errors to where other tokens feel them more. The share
    s is that of the oracle approximating shrinkage (OAS, arXiv:0907.4698), found from H and the number of tokens alone:
    near 1 for channels that are independent (the solver then rounds to nearest), and small where a few directions hold
    most of the energy, which few tokens show well. That formula takes inputs for Gaussian; ``1 - s`` is therefore reduced
    to ``T / (T + 32)`` of it at T tokens, because a few heavy-tailed tokens look like strong correlations.

    Args:
        h_II: the Gram matrix, neither zero nor NaN; not changed.
        tokens: how many it was summed over.

    Returns:
        The new matrix, without dead channels, and s.
    """
    I, trace = len(h_II), h_II.diagonal().sum(dtype=torch.float64).item()
    energy = h_II.square().sum(dtype=torch.float64).item()
    spread = (tokens + 1 - 2 / I) * (energy - trace**2 / I)
    share = min(1.0, ((1 - 2 / I) * energy + trace**2) / spread) if spread > 0 else 1.0
    share = 1 - (1 - share) * tokens / (tokens + _DOUBT)
    h_II = h_II * (1 - share)
    h_II.diagonal().add_(share * trace / I)
    return h_II, share


def inverse_factor(h_II: Tensor, damp: float) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper triangular U with ``U^T U = (H + d I)^-1``.

    d starts at ``damp * mean(diag H)``. If that fails, ``damp`` rises in steps of 0.01 to ``damp + 0.04``; then
    ``1e-6 * max(diag H)`` is added, and ten times more in each step up to a tenth of the maximum.

    U is the inverse of the upper R with ``R R^T = H + d I`` (a Cholesky factor of the reversed matrix). The usual way,
    Cholesky of the inverse, finds the same U with one more factorization that can fail.

    Args:
        h_II: the Gram matrix; not changed.
        damp: share of the mean diagonal.

    Returns:
        U, or None if every damping fails; and notes on a raised damping.
    """
    dtype = torch.float64 if h_II.shape[0] <= _FLOAT64_UP_TO else torch.float32
    h_II = h_II.to(dtype, copy=True)
    diag = h_II.diagonal().clone()
    lifts = [(damp + 0.01 * k) * diag.mean() for k in range(5)]
    descriptions = [f"damping raised to {damp + 0.01 * k:.2f}" for k in range(5)]
    for k in range(6):
        lifts.append(lifts[4] + 10.0 ** (k - 6) * diag.max())
        descriptions.append(
            f"damping raised to {damp + 0.04:.2f} and {10.0 ** (k - 6):.0e} of the largest diagonal added"
        )
    for k, lift in enumerate(lifts):
        h_II.diagonal().copy_(diag + lift)
        U = _reversed_cholesky_inverse(h_II)
        if U is not None:
            return U, (f"Gram matrix not positive definite: {descriptions[k]}",) if k else ()
    return None, ("Gram matrix not positive definite at any damping",)


def _reversed_cholesky_inverse(h_II: Tensor) -> Tensor | None:
    L, info = torch.linalg.cholesky_ex(h_II.flip(0, 1))
    if info.item() != 0:
        return None
    inverse = torch.zeros_like(L)
    _invert_lower(L, inverse)
    return inverse.flip(0, 1) if bool(torch.isfinite(inverse.sum())) else None


_LEAF = 128
"""Side up to which a triangular matrix is inverted as if it were full."""


def _invert_lower(L: Tensor, inverse: Tensor) -> None:
    """Fills ``inverse``, which is zero, with that of a lower triangular matrix, by halves: a third of the work of solving for a
    full one."""
    n, half = len(L), len(L) // 2
    if n <= _LEAF:
        one = torch.eye(n, dtype=L.dtype, device=L.device)
        inverse.copy_(torch.linalg.solve_triangular(L, one, upper=False))
        return
    first, second = slice(half), slice(half, n)
    _invert_lower(L[first, first], inverse[first, first])
    _invert_lower(L[second, second], inverse[second, second])
    inverse[second, first].addmm_(inverse[second, second] @ L[second, first], inverse[first, first], alpha=-1)


def asymmetric_target(w_IO: Tensor, d_II: Tensor, U: Tensor, share: float) -> Tensor:
    """``W + share * W D H^-1``: the target for a weight whose inputs differ from those of the original model.

    Let x be the input after quantized blocks and x' the input in the original model. Then ``sum_t |Q x_t - W x'_t|^2`` is
    ``tr((Q - W*) H (Q - W*)^T)`` plus a constant, with ``W* = W (I + D H^-1)`` and ``D = sum_t (x'_t - x_t) x_t^T``. A
    solver of the second loss therefore solves the first. GPTAQ (arXiv:2504.02692) instead corrects each column inside the
    recursion, which uses only a part of D.

    Args:
        w_IO: ``[I, O]``.
        d_II: D, see :class:`~lowbit.numerics.CrossGram`.
        U: as :func:`inverse_factor` returns it.
        share: 0 to 1, the alpha of GPTAQ; below 1 it guards against overfitting the calibration text.
    """
    return w_IO + share * (U.T @ (U @ (d_II.T @ w_IO)))
