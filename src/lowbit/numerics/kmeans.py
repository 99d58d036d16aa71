"""Optimal weighted k-means of numbers on a line, a row at a time.

In one dimension clusters are runs of the sorted values, so the best k of them are found by dynamic programming: the cost of
the first j values in c runs is the least, over where the last run begins, of the cost before it and of the run itself.
Prefix sums give a run's cost in constant time, and where the last run begins never moves left as j grows, so each layer
is filled by divide and conquer in O(n log n). Lloyd's rounds, which the field uses, depend on their start and stop at a
local optimum; this does neither.

The recursion is sequential and branches on every value, which torch cannot express; numba compiles it.
Shapes: G row (granule), K value within a row, C cluster.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor


def kmeans_rows(x_GK: Tensor, weight_GK: Tensor | None, clusters: int) -> Tensor:
    """Centroids ``[G, C]`` float64, rising, that minimize ``sum weight * (x - nearest centroid)**2`` of each row.

    Args:
        x_GK: finite values.
        weight_GK: at least 0; None for all ones. A value of weight 0 has no say, nor has one below 1e-13 of its row's sum,
            which sums in float64 could not tell apart; a row of zeros counts as all ones.
        clusters: C; a row of fewer distinct values repeats its largest centroid, and is exact.
    """
    x = x_GK.detach().to("cpu", torch.float64).numpy()
    w = np.ones_like(x) if weight_GK is None else weight_GK.detach().to("cpu", torch.float64).numpy()
    out = np.empty((len(x), clusters))
    threads = max(1, torch.get_num_threads())
    cuts = np.linspace(0, len(x), 4 * threads + 1).astype(int) if threads > 1 else np.array([0, len(x)])
    with ThreadPoolExecutor(threads) as pool:  # the compiled function lets go of the interpreter's lock
        list(
            pool.map(
                lambda i: _rows(x[cuts[i] : cuts[i + 1]], w[cuts[i] : cuts[i + 1]], out[cuts[i] : cuts[i + 1]]),
                range(len(cuts) - 1),
            )
        )
    return torch.from_numpy(out).to(x_GK.device)


@numba.njit(nogil=True, cache=True)
def _rows(x_GK, w_GK, out_GC):
    for g in range(len(x_GK)):
        _row(x_GK[g], w_GK[g], out_GC[g])


@numba.njit(nogil=True, cache=True)
def _row(x_K, w_K, out_C):
    order = np.argsort(x_K)
    least = 1e-13 * w_K.sum()
    everyone = least <= 0
    # Distinct values with their summed weights; values without a say are left out.
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
    # Prefix sums of weight, weighted value and square, about the mean: differences of large sums would cancel.
    middle = (values[:n] * weights[:n]).sum() / weights[:n].sum()
    total, first, second = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        v = values[i] - middle
        total[i + 1] = total[i] + weights[i]
        first[i + 1] = first[i] + weights[i] * v
        second[i + 1] = second[i] + weights[i] * v * v
    start = np.zeros((clusters, n + 1), dtype=np.int32)  # where the last of c + 1 runs over j values begins
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
    """Of the run of values ``i .. j - 1``."""
    if j - i < 2:
        return 0.0
    s = first[j] - first[i]
    return max(0.0, second[j] - second[i] - s * s / (total[j] - total[i]))


@numba.njit(nogil=True, cache=True)
def _layer(total, first, second, before, now, start, c, n):
    """Fills ``now[j]``, j over ``c .. n``: the least cost of the first j values in c + 1 runs, none of them empty."""
    # A stack of open ranges of j (both ends included), each with the range in which the last run can begin.
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
