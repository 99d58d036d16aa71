"""A 95 % confidence interval for a mean over tokens, from the spread between windows.

Tokens of one window are not independent (a strange passage is strange throughout), so an interval that counts each
token as a sample is too narrow. Here each window is one sample. The mean is the ratio sum(x_w) / sum(n_w), and its
standard error is the ratio estimator's,

    se^2 = W / (W - 1) * sum_w (x_w - mean * n_w)^2 / (sum_w n_w)^2.

The half width is se times Student's t with W - 1 degrees of freedom, which matters for few windows. A bootstrap over
windows needs no formula, but is too narrow for the usual handful of windows. Neither sees that neighbouring windows of
one article are alike, or that another text gives other figures.

The interval describes one model on this kind of text. Compare two models on the same windows by their KL divergence:
its interval is far narrower than the difference of two perplexities.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]


def mean_and_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, Interval | None]:
    """The mean of a per-token quantity and its 95 % interval.

    Args:
        sums: [W] float64, the quantity summed over each window's tokens.
        counts: [W] float64, number of tokens of each window.

    Returns:
        The mean and (low, high). The interval is None with fewer than two windows or a mean that is not finite.
    """
    mean = float(sums.sum() / counts.sum())
    windows = len(sums)
    if windows < 2 or not math.isfinite(mean):
        return mean, None
    residuals = sums - mean * counts
    error = math.sqrt(windows / (windows - 1) * float((residuals**2).sum())) / float(counts.sum())
    half = student_t(windows - 1) * error
    return mean, (mean - half, mean + half)


def exp(value: float) -> float:
    """exp, with infinity for results beyond a float; NaN stays NaN."""
    return math.inf if value > 709 else math.exp(value)


def student_t(freedom: int, probability: float = 0.975) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees of freedom, else to 0.2 % (Abramowitz and Stegun 26.7.5)."""
    assert freedom >= 1 and 0.5 <= probability < 1
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        central = 2 * probability - 1
        return central * math.sqrt(2 / (1 - central**2))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
