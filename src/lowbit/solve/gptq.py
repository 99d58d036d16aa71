"""The column solver: rounds one column of a weight after another and moves each error onto the columns still to come.

For the layer-output loss ``tr((Q - W) H (Q - W)^T)``, H the Gram matrix of the inputs, rounding column j costs least
when the later columns absorb its error along row j of the Cholesky factor of H^-1 (GPTQ, arXiv:2210.17323; LDLQ of
arXiv:2307.13304 is the same recursion). All rows share H, so the loop runs over columns and is vectorized over rows.

Three things are done differently from the authors' code (IST-DASLab/gptq). A group's grid is placed on weights that
carry all corrections so far; there, a group that starts inside a lazy block misses the corrections of that block
(``stale_groups=True`` brings this back). Fits are told the diagonal of H as each column's importance: a search for the
range that ignores it clips what matters most where one input channel is huge. And dead channels get the mean diagonal,
not 1, so that the solution does not depend on the scale of H at all.

Shapes: O output channel, I input channel, in the order they are visited once inside the loop. The loop holds matrices
column-major (W_IO), so that one column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowbit.numerics import (
    Clipped,
    Fit,
    Gram,
    Grid,
    MinMax,
    Params,
    PerChannel,
    PerTensor,
    PerToken,
    QTensor,
    Spec,
    Statistic,
    fit_raw,
    tagged,
)
from lowbit.solve.base import Solution
from lowbit.solve.columns import Tiling, by_band_and_diagonal, by_diagonal, lazy_blocks
from lowbit.solve.factor import inverse_factor
from lowbit.solve.nearest import Nearest
from lowbit.transforms import Permute


@tagged
@dataclass(frozen=True)
class Gptq:
    """Second-order rounding, column by column.

    Args:
        fit: places the grid on each granule; the importance of a column is its diagonal entry of H.
        order: ``"none"``, columns as they come. ``"act"``, by falling diagonal of H; with groups that are not static
            the groups are formed over the new order, the weight is stored in it and the layer permutes its input.
            ``"group"``, by falling diagonal inside each group and groups by their largest: groups stay what they
            were, so nothing is paid at run time.
        static_groups: place all grids before the first column, on the weights as given, instead of when the first
            column of a group is reached.
        stale_groups: place a group's grid on weights without the corrections of the current block, as the authors'
            code does. For comparison only.
        damp: share of the mean diagonal that is added to the diagonal.
        block: columns between two updates of the rest of the matrix. Changes speed, not results (but with
            ``stale_groups``).
    """

    fit: Fit = MinMax()
    order: Literal["none", "act", "group"] = "none"
    static_groups: bool = False
    stale_groups: bool = False
    damp: float = 0.01
    block: int = 128

    def __post_init__(self):
        if self.order not in ("none", "act", "group"):
            raise ValueError(f"order is 'none', 'act' or 'group', found {self.order!r}")
        if self.static_groups and self.stale_groups:
            raise ValueError("static groups are placed before the first column: stale_groups cannot be asked with them")
        if self.damp < 0 or self.block < 1:
            raise ValueError(f"damp is at least 0 and block at least 1, found {self.damp} and {self.block}")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Gram()})

    def solve(
        self, w_OI: Tensor, spec: Spec, stats: Mapping[Statistic, Tensor], clip: Clipped | None = None
    ) -> Solution:
        H = stats[Gram()]
        _check(w_OI, H)
        self.check(spec, clip is not None)
        tiling = Tiling.of(spec.granularity, w_OI)
        diag = H.diagonal()
        dead = diag == 0
        stored, visit = self._orders(diag, tiling)  # columns as on disk, and the order in which those are visited
        U, notes = _factor(H, stored[visit], self.damp)
        if U is None:
            rounded = Nearest(self.fit).solve(w_OI, spec, {}, clip)
            return replace(rounded, notes=(*notes, "rounded to nearest"))
        if dead.any():
            notes = (*notes, f"{int(dead.sum())} of {len(dead)} input channels were never active: weights set to zero")
        W = w_OI.to(torch.float64 if w_OI.dtype == torch.float64 else torch.float32).masked_fill(dead, 0)
        q = self._solve_columns(W[:, stored], U.to(W.dtype), visit, diag[stored].to(W.dtype), tiling, spec, clip)
        pre = () if torch.equal(stored, _as_they_come(diag)) else (Permute(stored),)
        return Solution(q, pre=pre, notes=notes)

    @property
    def moves_groups(self) -> bool:
        return self.order == "act" and not self.static_groups

    def check(self, spec: Spec, clipped: bool) -> None:
        if isinstance(spec.granularity, PerToken):
            raise ValueError("PerToken() is for activations; a weight is quantized PerChannel(), PerGroup(size), ...")
        grouped = not isinstance(spec.granularity, PerChannel | PerTensor)
        if grouped and clipped and self.moves_groups:
            raise ValueError(
                "the clipping is chosen for groups of neighbouring columns, but order='act' forms other groups; "
                "use static_groups=true, order='group', or leave the clipping out"
            )
        if grouped and spec.stats is not None and not self.static_groups:
            # Two columns of groups over many rows: a second-level granule must not reach from one into the other.
            if spec.stats.granularity.param_shape((2, 2**20))[0] != 2:
                raise ValueError(
                    f"{spec.stats.granularity} of the scales spans several groups of columns, which are solved "
                    "one after another; use PerChannel() or PerGroup(size) for the scales, or static_groups=true"
                )

    def _orders(self, diag: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
        same = _as_they_come(diag)
        if self.order == "group":
            return same, by_band_and_diagonal(diag, tiling.band_I)
        if self.order == "act":
            by_diag = by_diagonal(diag)
            return (same, by_diag) if self.static_groups or tiling.wide == 1 else (by_diag, same)
        return same, same

    def _solve_columns(
        self, w_OI: Tensor, U: Tensor, visit: Tensor, diag: Tensor, tiling: Tiling, spec: Spec, clip: Clipped | None
    ) -> QTensor:
        """Columns of ``w_OI`` and ``diag`` as they will be stored, U as they are visited."""
        rows, wide = len(w_OI), tiling.wide
        band = tiling.band_I[visit].tolist()
        width = tiling.band_I.bincount().tolist()
        placed: dict[int, Params] = {}  # of each band, as fitted
        by_row: dict[int, Params] = {}  # the same as stored, repeated for each row
        if self.static_groups:
            params = fit_raw(w_OI, spec, clip or self.fit, diag.expand_as(w_OI))
            placed = {b: params._make(None if p is None else p[b::wide] for p in params) for b in range(wide)}

        def params_at(i: int, W: Tensor) -> Params:
            b = band[i]
            if b not in by_row:
                if b not in placed:
                    fit = clip.rows(slice(b, None, wide)) if clip else self.fit
                    here = slice(i, i + width[b])
                    placed[b] = tiling.place(W[here].T, spec, fit, diag[visit[here]])  # on all corrections so far
                by_row[b] = tiling.of_rows(spec.as_stored(placed[b]), rows)
            return by_row[b]

        runs = [self.block] * (len(band) // self.block) + [len(band) % self.block]
        if not self.stale_groups and not self.static_groups:
            runs = [width[b] for b in dict.fromkeys(band)]
        W = w_OI[:, visit].T.contiguous()
        codes_IO = _recursion(W, U, spec.grid, lazy_blocks(runs, self.block), params_at, self.stale_groups)
        codes_OI = torch.empty_like(codes_IO.T, memory_format=torch.contiguous_format)
        codes_OI[:, visit] = codes_IO.T
        return QTensor.fitted(codes_OI, _side_by_side([placed[b] for b in range(wide)]), spec)


def _recursion(
    W: Tensor,
    U: Tensor,
    grid: Grid,
    blocks: list[tuple[int, int]],
    params_at: Callable[[int, Tensor], Params],
    stale: bool,
) -> Tensor:
    """Algorithm 1 of arXiv:2210.17323, on W ``[I, O]`` (used up); U is its Cholesky(H^-1)^T. Returns codes ``[I, O]``."""
    Q = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for i1, i2 in blocks:
        Err = torch.empty_like(W[i1:i2])
        seen = W.clone() if stale else W
        for i in range(i1, i2):
            params = params_at(i, seen)
            w = W[i, :, None]
            codes = grid.encode(w, params)
            err = (w - grid.decode(codes, params))[:, 0] / U[i, i]
            W[i:i2].addmm_(U[i, i:i2, None], err[None], alpha=-1)  # the block's later columns, at once
            Q[i], Err[i - i1] = codes[:, 0], err
        W[i2:].addmm_(U[i1:i2, i2:].T, Err, alpha=-1)  # all other columns, once a block
    return Q


def _side_by_side(bands: list[Params]) -> Params:
    """Parameters of all bands, leading axis strips, as one set: G is strips x bands, row-major."""
    both = zip(*bands, strict=True)
    return bands[0]._make(None if parts[0] is None else torch.stack(parts, 1).flatten(0, 1) for parts in both)


def _as_they_come(diag: Tensor) -> Tensor:
    return torch.arange(len(diag), device=diag.device)


def _factor(H: Tensor, take: Tensor, damp: float) -> tuple[Tensor | None, tuple[str, ...]]:
    """Cholesky(H^-1)^T of the columns in the order ``take``, with notes; None where there is none. H is not changed."""
    if not torch.isfinite(H).all():
        return None, ("NaN or Inf in the Gram matrix",)
    dead = H.diagonal() == 0
    if dead.all():
        return None, ("no input was ever different from zero",)
    typical = H.diagonal()[~dead].mean().item()
    H = H[take][:, take]
    H.diagonal().masked_fill_(dead[take], typical)
    return inverse_factor(H, damp)


def _check(w_OI: Tensor, H: Tensor) -> None:
    if not torch.isfinite(w_OI).all():
        raise ValueError(f"cannot quantize {int((~torch.isfinite(w_OI)).sum())} weights that are NaN or Inf")
    if H.shape != (w_OI.shape[1], w_OI.shape[1]):
        raise ValueError(
            f"a weight of {w_OI.shape[1]} input channels needs a square Gram matrix, found {list(H.shape)}"
        )
