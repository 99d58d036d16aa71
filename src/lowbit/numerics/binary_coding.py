"""The fit that places binary-coded grids.

Shapes: G granule, K element within a granule, Q base.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.grids import BinaryCoded
from lowbit.numerics.grids.base import Bases, Grid
from lowbit.numerics.serialize import serializable


@serializable
@dataclass(frozen=True)
class Alternating:
    """Bases by alternating least squares (arXiv:1802.00150, as LUT-GEMM uses it).

    The greedy start chooses one base after another, each the mean magnitude of the remainder. Each round then takes the
    best bases for the signs and the best signs for the bases. No half step raises the error: bases are exact least
    squares, and a granule keeps its old bases where the rounding of a nearly singular system would raise its error. The
    result depends on the start, so the fit also starts from evenly spaced levels, and each granule keeps the best result.

    Args:
        rounds: alternating rounds; 0: greedy only.
        starts: shares of the range over which the further starts spread their levels.
    """

    rounds: int = 15
    starts: tuple[float, ...] = (1.0, 0.8)

    def __post_init__(self):
        if self.rounds < 0:
            raise ValueError(f"rounds is at least 0, found {self.rounds}")

    def why_not(self, grid: Grid) -> str | None:
        return None if isinstance(grid, BinaryCoded) else f"alternating places binary-coded grids, not {grid}"

    def __call__(self, x_GK: Tensor, grid: BinaryCoded, importance_GK: Tensor | None = None) -> Bases:
        x = x_GK if x_GK.dtype == torch.float64 else x_GK.float()
        w = torch.ones_like(x) if importance_GK is None else importance_GK.to(x.dtype)
        w = torch.where(w.sum(1, keepdim=True) > 0, w, torch.ones_like(w))
        greedy = _greedy(x, w, grid)
        if not self.rounds or (grid.bits == 1 and not grid.offset):
            return greedy
        best, best_error = greedy, _error(x, w, grid, greedy)
        for start in (greedy, *(_even(x, grid, share) for share in self.starts)):
            bases, error = self._descend(x, w, grid, start)
            best, best_error = _better(bases, error, best, best_error)
        return best

    def _descend(self, x: Tensor, w: Tensor, grid: BinaryCoded, bases: Bases) -> tuple[Bases, Tensor]:
        error = _error(x, w, grid, bases)
        for _ in range(self.rounds):
            solved = _least_squares(x, w, grid, grid.signs(grid.encode(x, bases)))
            before = error
            bases, error = _better(solved, _error(x, w, grid, solved), bases, error)
            if not (error < before).any():
                break
        return bases, error


def _better(a: Bases, error_a: Tensor, b: Bases, error_b: Tensor) -> tuple[Bases, Tensor]:
    """For each granule the bases with the smaller error; b where both are equal."""
    wins = error_a < error_b
    offset = None if a.offset is None or b.offset is None else torch.where(wins, a.offset, b.offset)
    return Bases(torch.where(wins, a.alpha, b.alpha), offset), torch.where(wins, error_a, error_b)


def _even(x: Tensor, grid: BinaryCoded, share: float) -> Bases:
    """Evenly spaced levels over a ``share`` of the range."""
    lo, hi = torch.aminmax(x, dim=1, keepdim=True)
    middle = (hi + lo) / 2 if grid.offset else torch.zeros_like(hi)
    half = share * torch.maximum(hi - middle, middle - lo)
    powers = 2.0 ** torch.arange(grid.bits - 1, -1, -1, dtype=x.dtype, device=x.device)
    return Bases(half * powers / (2**grid.bits - 1), middle if grid.offset else None)


def _greedy(x: Tensor, w: Tensor, grid: BinaryCoded) -> Bases:
    share = w / w.sum(1, keepdim=True)
    offset = (share * x).sum(1, keepdim=True) if grid.offset else None
    rest, alphas = x if offset is None else x - offset, []
    for _ in range(grid.bits):
        alpha = (share * rest.abs()).sum(1, keepdim=True)
        alphas.append(alpha)
        rest = rest - torch.where(rest >= 0, alpha, -alpha)
    return Bases(torch.cat(alphas, 1), offset)


def _least_squares(x: Tensor, w: Tensor, grid: BinaryCoded, signs_GKQ: Tensor) -> Bases:
    B = signs_GKQ.to(x.dtype)
    if grid.offset:
        B = torch.cat([B, torch.ones_like(B[..., :1])], -1)
    weighted = B * w[..., None]
    A_GQQ, b_GQ1 = B.mT @ weighted, weighted.mT @ x[..., None]
    ridge = 1e-6 * A_GQQ.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    one = torch.eye(A_GQQ.shape[1], dtype=x.dtype, device=x.device)
    alpha = torch.linalg.solve(A_GQQ + ridge * one, b_GQ1)[..., 0]
    bases = alpha[:, : grid.bits].abs().sort(1, descending=True).values
    return Bases(bases, alpha[:, grid.bits :] if grid.offset else None)


def _error(x: Tensor, w: Tensor, grid: BinaryCoded, bases: Bases) -> Tensor:
    return (w * (grid.decode(grid.encode(x, bases), bases) - x).square()).sum(1, keepdim=True)
