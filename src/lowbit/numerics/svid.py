"""A matrix as signs times a rank-one matrix of magnitudes (OneBit, arXiv:2402.11295, section 3.3).

Shapes: O row (output channel), I column (input channel).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 200


def sign_value_factors(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of ``w = sign(w) * (h g^T)`` with the least squared error (SVID).

    They are the leading singular pair of ``|w|``, which has no negative entry (Perron and Frobenius), so this is the singular
    value decomposition of ``|w|`` and its factorization into nonnegative matrices of rank one at once. The multiplicative
    updates of the latter are the power iteration that runs here. It is deterministic, and a matrix of magnitudes has one large
    singular value, so a few rounds are enough.

    Args:
        w_OI: finite; float64 is factored in float64, everything else in float32.

    Returns:
        ``h`` ``[O]`` and ``g`` ``[I]``, of the same length in the Euclidean sense, nowhere negative; zero where a whole row or
        column is.
    """
    a_OI = w_OI.detach().to(torch.promote_types(w_OI.dtype, torch.float32)).abs()
    size = a_OI.amax().clamp(min=torch.finfo(a_OI.dtype).tiny)  # squares of tiny and huge weights must be numbers
    a_OI = a_OI / size
    g_I = _unit(a_OI.sum(0))
    close = 4 * torch.finfo(a_OI.dtype).eps
    for _ in range(_ROUNDS):
        before, h_O = g_I, _unit(a_OI @ g_I)
        g_I = _unit(h_O @ a_OI)
        if (g_I - before).norm() <= close:
            break
    h_O = a_OI @ g_I
    root = (h_O.norm() * size).sqrt()
    return _unit(h_O) * root, g_I * root


def _unit(v: Tensor) -> Tensor:
    length = v.norm()
    return v / length if length > 0 else v
