"""The loops over columns: one rounds them and moves each error onto later columns, one descends over their codes.

Both work on runs of columns whose grids are placed. Inside a run every column first takes the corrections of the columns
before it; the rest of the matrix takes those of the whole run by one product. Compiled code does a run for strips of rows, in
parallel; torch does it column by column, and is the law.

Shapes: O output channel, I input channel in the order of visits, N column of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import compiled
from lowbit.numerics import Grid, Params
from lowbit.numerics.rounding import rounding
from lowbit.solve.columns import Bands
from lowbit.solve.kept import Kept


def recursion(
    W: Tensor,
    U: Tensor,
    blocks: list[tuple[int, int]],
    band: list[int],
    bands: Bands,
    place: Callable[[int, Tensor], None],
    stale: bool,
    kept: Kept | None,
) -> Tensor:
    """Algorithm 1 of arXiv:2210.17323.

    Args:
        W: the weight ``[I, O]``, overwritten.
        U: Cholesky(H^-1)^T.
        blocks: lazy blocks ``[i1, i2)`` of columns.
        band: the band of each column.
        bands: their grids.
        place: ``place(i, W)`` places the band of column i, which is not placed yet, on W.
        stale: place bands without the corrections of the current block.
        kept: weights that are not rounded.

    Returns:
        Codes, uint8 ``[I, O]``; columns outside the blocks are not filled.
    """
    Q = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for i1, i2 in blocks:
        Err = torch.empty_like(W[i1:i2])
        seen = W.clone() if stale else W
        i = i1
        while i < i2:
            if band[i] not in bands:
                place(i, seen)
            end = next((j for j in range(i + 1, i2) if band[j] not in bands), i2)
            run, grids = slice(i, end), Grids.of(bands, band[i:end])
            err = Err[i - i1 : end - i1]
            if not _compiled_run(W[run], U[run, run], grids, Q[run], err, kept, run):
                _run(W[run], U[run, run], grids, Q[run], err, kept, i)
            W[end:i2].addmm_(U[run, end:i2].T, err, alpha=-1)
            i = end
        W[i2:].addmm_(U[i1:i2, i2:].T, Err, alpha=-1)
    return Q


@dataclass(frozen=True, eq=False)
class Grids:
    """The grids of a run of columns.

    Args:
        grid: of all of them.
        params: of each of the run's bands, one set for each row.
        which: the number of each column's band.
    """

    grid: Grid
    params: list[Params]
    which: list[int]

    @staticmethod
    def of(bands: Bands, band: list[int]) -> Grids:
        """The grids of columns in these bands, which are placed."""
        number = {b: n for n, b in enumerate(dict.fromkeys(band))}
        return Grids(bands.spec.grid, [bands.of_rows(b) for b in number], [number[b] for b in band])


def _run(W: Tensor, U: Tensor, grids: Grids, Q: Tensor, Err: Tensor, kept: Kept | None, first: int) -> None:
    """Rounds a run of columns W ``[N, O]``, visited from ``first`` on; fills the codes Q and scaled errors Err ``[N, O]``."""
    grid = grids.grid
    for j, which in enumerate(grids.which):
        params, w = grids.params[which], W[j, :, None]
        codes = grid.encode(w, params)
        q = grid.decode(codes, params)
        if kept is not None:
            codes, q = kept.at(first + j, w, codes, q, grid, params)
        err = (w - q)[:, 0] / U[j, j]
        Q[j], Err[j] = codes[:, 0], err
        W[j + 1 :].addmm_(U[j, j + 1 :, None], err[None], alpha=-1)


def _compiled_run(W: Tensor, U: Tensor, grids: Grids, Q: Tensor, Err: Tensor, kept: Kept | None, run: slice) -> bool:
    """:func:`_run` in compiled code; False if it cannot round to the grid."""
    mask = value = None
    limit = -1.0
    if kept is not None:
        mask, value = kept.mask[run], kept.value[run]
        limit = -1.0 if kept.watch is None else kept.watch.tau
    return _columns(W, -U.T, U.diagonal(), grids, Q, Err, mask, value, limit) is not None


def descend(
    codes_IO: Tensor,
    W: Tensor,
    H: Tensor,
    damp: float,
    band: list[int],
    bands: Bands,
    kept: Kept | None,
    passes: int,
    block: int = 128,
) -> bool:
    """Coordinate descent over codes: lowers the loss of a solved weight further, one column of codes at a time.

    These are QuIP's greedy passes (arXiv:2307.13304) in a form that never raises the loss. Let ``S = Q - W``. The best value
    of column j, with all others fixed, is ``q_j - (S H)_j / H_jj`` in each row, and the nearest code to it is the best code.
    The authors' code clips codes after a whole pass; S then disagrees with clipped codes and the loss can rise. Here the grid
    clips in each step, and S follows the codes.

    Law: a pass never raises ``tr(S H S^T)``, with H damped as in the solver.

    Args:
        codes_IO: uint8 ``[I, O]``, improved in place, in at most ``passes`` passes; it stops when a pass changes nothing.
        W: the target ``[I, O]``.
        H: ``[I, I]``, not damped, in the same order.
        damp: share of the mean diagonal that is added to the diagonal of H.
        band: the band of each column.
        bands: their grids.
        kept: weights stored outside the codes; not changed.
        passes: most passes.
        block: columns between two updates of S H; changes speed only.

    Returns:
        Whether a code changed.
    """
    lift = damp * H.diagonal().mean()
    n = len(W) if kept is None else kept.rounded
    grid = bands.spec.grid
    S = torch.empty_like(W)
    for i, b in enumerate(band):
        torch.sub(grid.decode(codes_IO[i, :, None], bands.of_rows(b))[:, 0], W[i], out=S[i])
    if kept is not None:
        S += kept.value
    ever = False
    for _ in range(passes):
        changed = False
        for i1 in range(0, n, block):
            run = slice(i1, min(i1 + block, n))
            grids, mask = Grids.of(bands, band[run]), None if kept is None else kept.mask[run]
            damped = H[run].clone()
            damped.diagonal(i1).add_(lift)
            SH, h = damped @ S, damped[:, run]
            better = _columns(SH, h, h.diagonal(), grids, codes_IO[run], None, mask, None, -1.0, W[run], S[run])
            if better is None:
                better = _descend(SH, h, grids, codes_IO[run], mask, W[run], S[run])
            changed |= better
        ever |= changed
        if not changed:
            break
    return ever


def _descend(SH: Tensor, H: Tensor, grids: Grids, codes_NO: Tensor, mask: Tensor | None, W: Tensor, S: Tensor) -> bool:
    """One pass over a run of columns. SH, S and W ``[N, O]``, H ``[N, N]``; changes SH, S and the codes."""
    changed, grid = False, grids.grid
    for j, which in enumerate(grids.which):
        params, before = grids.params[which], S[j] + W[j]
        codes = grid.encode((before - SH[j] / H[j, j])[:, None], params)[:, 0]
        other = codes != codes_NO[j]
        if mask is not None:
            other &= ~mask[j]
        if not other.any():
            continue
        changed = True
        after = torch.where(other, grid.decode(codes[:, None], params)[:, 0], before)
        SH.addmm_(H[:, j, None], (after - before)[None])
        codes_NO[j], S[j] = torch.where(other, codes, codes_NO[j]), torch.where(other, after - W[j], S[j])
    return changed


def _columns(
    given: Tensor,
    mix_NN: Tensor,
    divisor_N: Tensor,
    grids: Grids,
    codes_NO: Tensor,
    moved_NO: Tensor | None,
    mask_NO: Tensor | None,
    value_NO: Tensor | None,
    limit: float,
    target_NO: Tensor | None = None,
    error_NO: Tensor | None = None,
) -> bool | None:
    """``columns`` of the compiled library (``kernels/cpu/solve.h``) on a run. Whether descent changed a code; None if compiled
    code does not run."""
    isa = compiled.solver_set(given, mix_NN, *(each for params in grids.params for each in params))
    placed = None if isa is None else rounding(grids.grid, grids.params)
    if placed is None:
        return None
    assert compiled.library is not None
    set_N = torch.tensor(grids.which, dtype=torch.int32)
    mix_NN, divisor_N = mix_NN.contiguous(), divisor_N.contiguous()
    rows = given.shape[1]
    matrices = given, codes_NO, moved_NO, mask_NO, value_NO, target_NO, error_NO
    assert all(m is None or m.stride() == (rows, 1) or len(m) == 1 for m in matrices), "columns are not contiguous"
    at = compiled.address
    return compiled.library.columns(
        isa, placed.grid, rows, len(given), rows, at(given), at(mix_NN), at(divisor_N), at(set_N), at(placed.scale),
        at(placed.zero), at(codes_NO), at(moved_NO), at(mask_NO), at(value_NO), limit, at(target_NO), at(error_NO),
        torch.get_num_threads(),
    )  # fmt: skip
