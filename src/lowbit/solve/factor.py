"""The triangular factor for the column recursion, from a Gram matrix that may be badly conditioned.

Calibration can give matrices that mean little (fewer tokens than channels), matrices that rounding made indefinite, and
NaN. A matrix of few tokens is shrunk first. The damping rises in steps until a factor exists, and a note names the damping
that was needed.

Shapes: I input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIP = 256
"""Rows or columns that are copied or multiplied together where a matrix is changed in place."""
_FLOAT64_UP_TO = 8192
"""Most channels for a factor in float64; for wider weights its time and memory would exceed the rest of the solve."""
_DOUBT = 32
"""Tokens at which half of what correlations seem to tell is believed."""


def shrinkage(h_II: Tensor, tokens: int) -> float:
    """The share s for the Gram matrix of few tokens, which becomes ``(1 - s) H + s mean(diag H) I``.

    A solver that believes in the correlations of a few tokens moves errors to where other tokens feel them more. The share
    s is that of the oracle approximating shrinkage (OAS, arXiv:0907.4698), found from H and the number of tokens alone:
    near 1 for channels that are independent (the solver then rounds to nearest), and small where a few directions hold
    most of the energy, which few tokens show well. That formula takes inputs for Gaussian; ``1 - s`` is therefore reduced
    to ``T / (T + 32)`` of it at T tokens, because a few heavy-tailed tokens look like strong correlations.

    Args:
        h_II: the Gram matrix, neither zero nor NaN; not changed.
        tokens: how many it was summed over.
    """
    I, trace = len(h_II), h_II.diagonal().sum(dtype=torch.float64).item()
    energy = sum(rows.square().sum(dtype=torch.float64).item() for rows in h_II.split(STRIP))
    spread = (tokens + 1 - 2 / I) * (energy - trace**2 / I)
    share = min(1.0, ((1 - 2 / I) * energy + trace**2) / spread) if spread > 0 else 1.0
    return 1 - (1 - share) * tokens / (tokens + _DOUBT)


def gathered(h_II: Tensor, order_I: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """Fills ``out`` with ``scale * H[order][:, order]``, in the dtype of ``out``, with a few rows in memory beside it."""
    for rows, into in zip(order_I.split(STRIP), out.split(STRIP), strict=True):
        into.copy_(h_II.index_select(0, rows).index_select(1, order_I).mul_(scale))
    return out


def factor_bytes(width: int) -> int:
    """Bytes that :func:`inverse_factor` holds for a matrix of ``width`` channels, the result included: one matrix, which
    rounding to float32 leaves in its place, and strips."""
    return width * (_dtype(width).itemsize * width + 8 * STRIP)


def _dtype(width: int) -> torch.dtype:
    return torch.float64 if width <= _FLOAT64_UP_TO else torch.float32


def inverse_factor(
    h_II: Tensor,
    damp: float,
    *,
    order_I: Tensor | None = None,
    scale: float = 1.0,
    diag_I: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper triangular U with ``U^T U = (H + d I)^-1``.

    d starts at ``damp * mean(diag H)``. If that fails, ``damp`` rises in steps of 0.01 to ``damp + 0.04``; then
    ``1e-6 * max(diag H)`` is added, and ten times more in each step up to a tenth of the maximum.

    U is the inverse of the upper R with ``R R^T = H + d I`` (a Cholesky factor of the reversed matrix). The usual way,
    Cholesky of the inverse, finds the same U with one more factorization that can fail.

    Everything happens in one matrix: H is copied once, reversed, and then factored, inverted and reversed in place.

    Args:
        h_II: the Gram matrix, symmetric; not changed.
        damp: share of the mean diagonal.
        order_I: order of the channels in which H is read, int64; None: as they are.
        scale: factor of H outside its diagonal.
        diag_I: what stands for the diagonal of H, in the order in which H is read; None: its own.
        dtype: of U; None: that of the factorization, float64 up to 8,192 channels, else float32.

    Returns:
        U, or None if every damping fails; and notes on a raised damping.
    """
    order = torch.arange(len(h_II), device=h_II.device) if order_I is None else order_I
    diag = (h_II.diagonal()[order] if diag_I is None else diag_I).to(_dtype(len(h_II)))
    lifts = [(damp + 0.01 * k) * diag.mean() for k in range(5)]
    descriptions = [f"damping raised to {damp + 0.01 * k:.2f}" for k in range(5)]
    for k in range(6):
        lifts.append(lifts[4] + 10.0 ** (k - 6) * diag.max())
        descriptions.append(
            f"damping raised to {damp + 0.04:.2f} and {10.0 ** (k - 6):.0e} of the largest diagonal added"
        )
    matrix = torch.empty(h_II.shape, dtype=diag.dtype, device=h_II.device)
    for k, lift in enumerate(lifts):
        gathered(h_II, order.flip(0), matrix, scale)
        matrix.diagonal().copy_((diag + lift).flip(0))
        if _invert_factor(matrix.T):  # its columns are contiguous, as LAPACK needs them
            _reverse(matrix.view(-1))
            U = (matrix if dtype is None or dtype == matrix.dtype else _cast(matrix, dtype)).T
            return U, (f"Gram matrix not positive definite: {descriptions[k]}",) if k else ()
    return None, ("Gram matrix not positive definite at any damping",)


_PIECE = 2**16
"""Elements that are moved together where a matrix is reversed or rounded in its place."""
_LEAF = 128
"""Side up to which a triangular matrix is inverted as if it were full."""


def _invert_factor(h_II: Tensor) -> bool:
    """Replaces H, whose columns are contiguous, by the inverse of its lower Cholesky factor; False, and anything, if it has none."""
    info = torch.empty((), dtype=torch.int32, device=h_II.device)
    torch.linalg.cholesky_ex(h_II, out=(h_II, info))
    if info.item() != 0:
        return False
    _invert_lower(h_II)
    return all(bool(torch.isfinite(columns.sum())) for columns in h_II.split(STRIP, 1))


def _invert_lower(L: Tensor) -> None:
    """Inverts a lower triangular matrix in place, by halves: of ``[[A, 0], [B, D]]`` the lower left quarter becomes
    ``-D^-1 B A^-1``. Strips of it are multiplied in an order in which each reads only what is not overwritten yet."""
    n, half = len(L), len(L) // 2
    if n <= _LEAF:
        one = torch.eye(n, dtype=L.dtype, device=L.device)
        L.copy_(torch.linalg.solve_triangular(L, one, upper=False))
        return
    A, B, D = L[:half, :half], L[half:, :half], L[half:, half:]
    _invert_lower(A)
    _invert_lower(D)
    for start in reversed(range(0, len(B), STRIP)):
        end = min(start + STRIP, len(B))
        B[start:end] = D[start:end, :end] @ B[:end]
    for start in range(0, half, STRIP):
        strip = slice(start, min(start + STRIP, half))
        B[:, strip] = (B[:, start:] @ A[start:, strip]).neg_()


def _reverse(flat: Tensor) -> None:
    """Reverses a vector in place. Of a matrix laid out in one, that reverses rows and columns."""
    n, piece = len(flat), _PIECE
    for start in range(0, n // 2, piece):
        end = min(start + piece, n // 2)
        front, back = flat[start:end], flat[n - end : n - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def _cast(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous matrix in ``dtype``: in the memory of ``matrix`` if it fits there."""
    if dtype.itemsize > matrix.dtype.itemsize:
        return matrix.to(dtype)
    old, piece = matrix.view(-1), _PIECE
    new = old.view(dtype)[: len(old)]
    for start in range(0, len(old), piece):
        new[start : start + piece] = old[start : start + piece].to(dtype)
    return new.view(matrix.shape)


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
