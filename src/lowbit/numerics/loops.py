"""Loops over single numbers that torch cannot express, compiled by numba: :func:`rows_of_means`, :func:`count_below`,
:func:`to_nearest` and :func:`gradients_of_nearest`.

They are imported where one of them runs. numba takes as long to import as torch, most runs need none of them, and vLLM, which
imports other parts of this package, fails at what numba leaves among the modules.
"""

from __future__ import annotations

import numba
import numpy as np

_RUN = 2**12
"""Values that stay in the processor's cache while all midpoints are compared with them."""


@numba.njit(nogil=True, cache=True)
def count_below(values, midpoints, counts):
    """Adds to ``counts`` how many of ``midpoints`` are below each of ``values``."""
    for start in range(0, len(values), _RUN):
        value, count = values[start : start + _RUN], counts[start : start + _RUN]
        for j in range(len(midpoints)):
            midpoint = midpoints[j]
            for i in range(len(value)):  # this form compiles to vector instructions
                count[i] += np.int32(1) if value[i] > midpoint else np.int32(0)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def to_nearest(x_GK, scale, by_row, midpoints, levels, out_GK):
    """Writes the nearest level times the scale: ``levels[count of midpoints below x / scale] * scale``; NaN where x is.

    ``scale`` has one element for each row, or, unless ``by_row``, for each column.
    """
    ratio, count = np.empty(_RUN, dtype=x_GK.dtype), np.empty(_RUN, dtype=np.int32)
    for g in range(x_GK.shape[0]):
        for start in range(0, x_GK.shape[1], _RUN):
            x, out = x_GK[g, start : start + _RUN], out_GK[g, start : start + _RUN]
            n = len(x)
            if by_row:
                for i in range(n):
                    ratio[i] = x[i] / scale[g]
            else:
                for i in range(n):
                    ratio[i] = x[i] / scale[start + i]
            count[:n] = 0
            for j in range(len(midpoints)):
                midpoint = midpoints[j]
                for i in range(n):
                    count[i] += np.int32(1) if ratio[i] > midpoint else np.int32(0)
            for i in range(n):
                level = levels[count[i]] if ratio[i] == ratio[i] else ratio[i]
                out[i] = level * (scale[g] if by_row else scale[start + i])


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})  # sums in vector registers
def gradients_of_nearest(x_GK, scale, by_row, lowest, highest, y_GK, g_GK, of_x_GK, of_scale):
    """Writes what ``x`` and adds what ``scale`` gain where :func:`to_nearest` wrote ``y`` and its gradient is ``g``: the rounding
    passes straight through between the ``lowest`` and the ``highest`` level, and what is beyond them moves with the scale alone.
    """
    for g in range(x_GK.shape[0]):
        x, y, grad, of_x = x_GK[g], y_GK[g], g_GK[g], of_x_GK[g]
        if by_row:
            total, s = np.float32(0), scale[g]
            for k in range(len(x)):
                ratio = x[k] / s
                inside = (ratio >= lowest) & (ratio <= highest)
                of_x[k] = grad[k] if inside else np.float32(0)
                total += grad[k] * (y[k] - (x[k] if inside else np.float32(0)))
            of_scale[g] += total / s
        else:
            for k in range(len(x)):
                ratio = x[k] / scale[k]
                inside = (ratio >= lowest) & (ratio <= highest)
                of_x[k] = grad[k] if inside else np.float32(0)
                of_scale[k] += grad[k] * (y[k] - (x[k] if inside else np.float32(0))) / scale[k]


@numba.njit(nogil=True, cache=True)
def rows_of_means(x_GK, w_GK, out_GC):
    """The centroids of each row, see :func:`lowbit.numerics.kmeans.kmeans_rows`."""
    for g in range(len(x_GK)):
        _row(x_GK[g], w_GK[g], out_GC[g])


@numba.njit(nogil=True, cache=True)
def _row(x_K, w_K, out_C):
    order = np.argsort(x_K)
    least = 1e-13 * w_K.sum()
    everyone = least <= 0
    # Distinct values with their summed weights, without the values that are ignored.
    values, weights, n = np.empty(len(x_K)), np.empty(len(x_K)), 0
    for i in order:
        weight = 1.0 if everyone else w_K[i]
        if not everyone and weight <= least:
            continue
        if n and values[n - 1] == x_K[i]:
            weights[n - 1] += weight
        else:
            values[n], weights[n] = x_K[i], weight
            n += 1
    clusters = len(out_C)
    if n <= clusters:
        for c in range(clusters):
            out_C[c] = values[min(c, n - 1)]
        return
    # Prefix sums of weight, weighted value and square around the mean; without it, differences of large sums would cancel.
    middle = (values[:n] * weights[:n]).sum() / weights[:n].sum()
    total, first, second = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        v = values[i] - middle
        total[i + 1] = total[i] + weights[i]
        first[i + 1] = first[i] + weights[i] * v
        second[i + 1] = second[i] + weights[i] * v * v
    start = np.zeros((clusters, n + 1), dtype=np.int32)  # start of the last of c + 1 runs over j values
    before, now = np.empty(n + 1), np.empty(n + 1)
    for j in range(n + 1):
        before[j] = _cost(total, first, second, 0, j)
    for c in range(1, clusters):
        _layer(total, first, second, before, now, start[c], c, n)
        before, now = now, before
    j = n
    for c in range(clusters - 1, -1, -1):
        i = start[c, j]
        out_C[c] = middle + (first[j] - first[i]) / (total[j] - total[i])
        j = i


@numba.njit(nogil=True, cache=True, inline="always")
def _cost(total, first, second, i, j):
    """Cost of the run of values ``i .. j - 1``."""
    if j - i < 2:
        return 0.0
    s = first[j] - first[i]
    return max(0.0, second[j] - second[i] - s * s / (total[j] - total[i]))


@numba.njit(nogil=True, cache=True)
def _layer(total, first, second, before, now, start, c, n):
    """Fills ``now[j]`` for j in ``c .. n``: the least cost of the first j values in c + 1 runs, none of them empty."""
    # A stack of open ranges of j (both ends included), each with the possible starts of the last run.
    stack = np.empty((128, 4), dtype=np.int32)
    stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = c + 1, n, c, n - 1
    depth = 1
    now[: c + 1] = np.inf
    while depth:
        depth -= 1
        low, high, i_low, i_high = stack[depth]
        j = (low + high) // 2
        best, at = np.inf, i_low
        for i in range(i_low, min(i_high, j - 1) + 1):
            cost = before[i] + _cost(total, first, second, i, j)
            if cost < best:
                best, at = cost, i
        now[j], start[j] = best, at
        if low < j:
            stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = low, j - 1, i_low, at
            depth += 1
        if j < high:
            stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = j + 1, high, at, i_high
            depth += 1
