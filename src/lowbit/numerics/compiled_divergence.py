"""Two models' logits compared by compiled code, with the gradient of their divergence, in two or three passes over cached rows.

torch takes about ten passes, and makes five arrays of the logits' size. Sums of 512 values are in float32, sums of those in float64.

Shapes: N token, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.compiled import address, library, solver_set


class Compared(NamedTuple):
    """How the distributions of N tokens differ, float64 ``[N]`` each; ``agree`` is bool ``[N]``.

    Attributes:
        kl, reverse_kl: KL(p || q) and KL(q || p), in nats. NaN if a logit is.
        log_p, log_q: the logarithms of the sums of exponentials: a token's log probability is its logit less this.
        agree: whether the first of the largest logits is the same token's.
    """

    kl: Tensor
    reverse_kl: Tensor
    log_p: Tensor
    log_q: Tensor
    agree: Tensor


def compare(
    p_NV: Tensor, q_NV: Tensor, reverse: float = 0.0, gradient_NV: Tensor | None = None, weight: float = 1.0
) -> Compared | None:
    """Compares the logits ``p`` of an original with the logits ``q`` of a model; None if compiled code cannot.

    Args:
        p_NV, q_NV: float32 on the CPU.
        reverse: share of KL(q || p) in what the gradient is of; the rest is KL(p || q).
        gradient_NV: is filled with the gradient for ``q``, times ``weight``; float32, contiguous.
    """
    isa = solver_set(p_NV, q_NV, gradient_NV)
    if isa is None or p_NV.dim() != 2 or p_NV.shape != q_NV.shape or not p_NV.numel():
        return None
    assert library is not None and (gradient_NV is None or gradient_NV.is_contiguous())
    p_NV, q_NV = p_NV.contiguous(), q_NV.contiguous()
    found_N4 = torch.empty(len(p_NV), 4, dtype=torch.float64)
    same_N = torch.empty(len(p_NV), dtype=torch.bool)
    library.compare(
        isa, p_NV.data_ptr(), q_NV.data_ptr(), *p_NV.shape, found_N4.data_ptr(), same_N.data_ptr(), address(gradient_NV),
        reverse, weight, torch.get_num_threads(),
    )  # fmt: skip
    kl_N, reverse_N, log_p_N, log_q_N = found_N4.T
    return Compared(kl_N, reverse_N, log_p_N, log_q_N, same_N & ~kl_N.isnan())
