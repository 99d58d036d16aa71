"""Optimal weighted k-means of numbers, row by row; and k-means of points by Lloyd's rounds.

In one dimension clusters are runs of the sorted values, so dynamic programming finds the best k: the cost of the first j
values in c runs is the least sum, over the starts of the last run, of its cost and the cost of the runs before it. Prefix
sums give the cost of a run in constant time. The start of the last run never moves left as j grows, so divide and conquer
fills each layer in O(n log n). Lloyd's rounds, the usual method, depend on their start and stop at a local optimum; this
does neither.

The recursion is sequential and branches on every value, which torch cannot express (:mod:`lowbit.numerics.loops`). In more
dimensions clusters are not runs; :func:`kmeans_points` takes Lloyd's rounds from several starts.
Shapes: G row (granule), K value within a row, C cluster; N point, F feature, S start.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def kmeans_rows(x_GK: Tensor, weight_GK: Tensor | None, clusters: int) -> Tensor:
    """Centroids that minimize ``sum weight * (x - nearest centroid)**2`` of each row.

    Args:
        x_GK: finite values.
        weight_GK: at least 0; None: all ones. Values whose weight is 0 or below 1e-13 of their row's sum are ignored, because
            sums in float64 cannot resolve them; a row of zeros counts as all ones.
        clusters: C; a row with fewer distinct values is exact and repeats its largest centroid.

    Returns:
        ``[G, C]`` float64, rising along each row.
    """
    from lowbit.numerics.loops import rows_of_means  # numba is slow to import

    x = x_GK.detach().to("cpu", torch.float64).numpy()
    w = np.ones_like(x) if weight_GK is None else weight_GK.detach().to("cpu", torch.float64).numpy()
    out = np.empty((len(x), clusters))
    threads = max(1, torch.get_num_threads())
    cuts = np.linspace(0, len(x), 4 * threads + 1).astype(int) if threads > 1 else np.array([0, len(x)])
    with ThreadPoolExecutor(threads) as pool:  # the compiled function releases the interpreter's lock
        list(
            pool.map(
                lambda i: rows_of_means(x[cuts[i] : cuts[i + 1]], w[cuts[i] : cuts[i + 1]], out[cuts[i] : cuts[i + 1]]),
                range(len(cuts) - 1),
            )
        )
    return torch.from_numpy(out).to(x_GK.device)


def kmeans_points(x_NF: Tensor, clusters: int, seed: int, starts: int = 10, rounds: int = 300) -> Tensor:
    """The cluster of each point: the best of several runs of Lloyd's rounds from k-means++ starts.

    No cluster is empty: points that coincide are divided. Clusters are numbered by the mean of their first feature, then
    of the others, so their numbers do not depend on the start.

    Args:
        x_NF: finite values; computed in float64.
        clusters: C, 1 to N.
        seed: of the random starts.
        starts: number of runs.
        rounds: most rounds.

    Returns:
        Cluster numbers, int64 ``[N]``.

    Raises:
        ValueError: more clusters than points.
    """
    if not 1 <= clusters <= len(x_NF):
        raise ValueError(f"{len(x_NF)} points have 1 to {len(x_NF)} clusters, found {clusters}")
    x = x_NF.detach().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    centre_SCF = _plus_plus(x, clusters, starts, generator)
    label_SN, before = torch.empty(0), None
    for _ in range(rounds):
        label_SN = _distances(centre_SCF, x).argmin(1)
        if before is not None and torch.equal(label_SN, before):
            break
        before = label_SN
        centre_SCF = _means(x, label_SN, centre_SCF)
    lost_S = (x - centre_SCF.gather(1, label_SN[..., None].expand(-1, -1, x.shape[1]))).square().sum((1, 2))
    best = int(lost_S.argmin())
    label_N = _none_empty(x, label_SN[best], centre_SCF[best])
    mean_CF = _means(x, label_N[None], centre_SCF[best][None])[0]
    order = sorted(range(clusters), key=lambda c: mean_CF[c].tolist())
    return torch.tensor(order).argsort()[label_N].to(x_NF.device)


def _distances(centre_SCF: Tensor, x_NF: Tensor) -> Tensor:
    """``[S, C, N]``, from differences: with matrix products, near ties would depend on the number of threads."""
    x_SNF = x_NF.expand(len(centre_SCF), -1, -1)
    return torch.cdist(centre_SCF, x_SNF, compute_mode="donot_use_mm_for_euclid_dist")


def _plus_plus(x_NF: Tensor, clusters: int, starts: int, generator: torch.Generator) -> Tensor:
    """First centres ``[S, C, F]`` by greedy k-means++: each is the best of a few points drawn with a probability
    proportional to their squared distance to the earlier centres."""
    every, trials = torch.arange(starts), 2 + int(math.log(clusters))
    chosen_SF = x_NF[torch.randint(len(x_NF), (starts,), generator=generator)]
    centres = [chosen_SF]
    nearest_SN = (x_NF - chosen_SF[:, None]).square().sum(-1)
    for _ in range(clusters - 1):
        weight_SN = torch.where(nearest_SN.sum(1, keepdim=True) > 0, nearest_SN, torch.ones_like(nearest_SN))
        at_SL = torch.rand(starts, trials, generator=generator, dtype=x_NF.dtype) * weight_SN.sum(1, keepdim=True)
        drawn_SL = torch.searchsorted(weight_SN.cumsum(1), at_SL, right=True).clamp(max=len(x_NF) - 1)
        tried_SLN = (x_NF - x_NF[drawn_SL][:, :, None]).square().sum(-1).minimum(nearest_SN[:, None])
        best_S = tried_SLN.sum(-1).argmin(1)
        centres.append(x_NF[drawn_SL[every, best_S]])
        nearest_SN = tried_SLN[every, best_S]
    return torch.stack(centres, 1)


def _means(x_NF: Tensor, label_SN: Tensor, centre_SCF: Tensor) -> Tensor:
    """The mean of each cluster; a cluster without points stays where it is."""
    starts, clusters, features = centre_SCF.shape
    at = label_SN[..., None].expand(-1, -1, features)
    total = torch.zeros_like(centre_SCF).scatter_add_(1, at, x_NF.expand(starts, -1, -1))
    count = torch.zeros(starts, clusters, 1, dtype=x_NF.dtype)
    count.scatter_add_(1, label_SN[..., None], torch.ones(*label_SN.shape, 1, dtype=x_NF.dtype))
    return torch.where(count > 0, total / count.clamp(min=1), centre_SCF)


def _none_empty(x_NF: Tensor, label_N: Tensor, centre_CF: Tensor) -> Tensor:
    """Gives each empty cluster the point farthest from its centre, among points that share their cluster."""
    label_N = label_N.clone()
    for c in range(len(centre_CF)):
        if not (label_N == c).any():
            far_N = (x_NF - centre_CF[label_N]).square().sum(1)
            alone_N = label_N.bincount(minlength=len(centre_CF))[label_N] == 1
            label_N[far_N.masked_fill(alone_N, -1).argmax()] = c
    return label_N
