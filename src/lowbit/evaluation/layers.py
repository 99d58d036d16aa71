"""The distance of one layer's output from the original's: relative squared error, and the same in decibels."""

from __future__ import annotations

import math

from torch import Tensor

_PIECE = 1 << 20  # values that are held in float64 at once


def output_error(reference: Tensor, candidate: Tensor) -> float:
    """||reference - candidate||^2 / ||reference||^2 in float64. 0 is equal; 1 is as bad as zeros.

    Args:
        reference, candidate: outputs of one shape, any float dtype.

    Returns:
        The error; infinity if only the reference is all zero; NaN if either holds NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"outputs of one shape are compared, found {list(reference.shape)} and {list(candidate.shape)}"
        )
    noise = signal = 0.0
    for some, other in zip(*(x.detach().flatten().split(_PIECE) for x in (reference, candidate)), strict=True):
        exact = some.double()
        noise += float((exact - other.to(exact)).square().sum())
        signal += float(exact.square().sum())
    if signal == 0:
        return 0.0 if noise == 0 else math.nan if math.isnan(noise) else math.inf
    return noise / signal


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal to quantization noise ratio in dB, -10 log10(`output_error`). Infinity is equal; NaN stays NaN."""
    error = output_error(reference, candidate)
    if error == 0:
        return math.inf
    return -math.inf if error == math.inf else -10 * math.log10(error)
