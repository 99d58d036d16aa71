"""The column solver: rounds one column of a weight after another and moves each error onto the later columns.

The loss is the layer's output error ``tr((Q - W) H (Q - W)^T)``, with H the Gram matrix of the inputs. Rounding column j
costs least if the later columns absorb its error along row j of the Cholesky factor of H^-1 (GPTQ, arXiv:2210.17323; LDLQ
of arXiv:2307.13304 is the same recursion). All rows share H, so the loop runs over columns and is vectorized over rows.

Four things differ from the authors' code (IST-DASLab/gptq):

* A group's grid is placed on weights with all corrections so far. In the authors' code, a group that starts inside a lazy
  block misses the corrections of that block; ``stale_groups=True`` does the same.
* Fits get the diagonal of H as the importance of each column. A range search without it clips the most important weights
  when one input channel is very large.
* Dead channels get the mean diagonal, not 1, so the solution does not depend on the scale of H.
* H of fewer tokens than channels is shrunk (:func:`~lowbit.solve.factor.shrinkage`), and that is noted. Its dead channels keep
  their weights, because a few tokens do not prove that a channel is dead.

Outliers (``solve.outliers``) enter in three places only: kept columns are visited last and never rounded, grids are placed
without the kept weights, and a weight that the loop keeps leaves no error.

Shapes: O output channel, I input channel; inside the loop I is in the order of visits. The loop holds matrices
column-major (W_IO), so that one column is contiguous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lowbit.numerics import (
    Clipped,
    CrossGram,
    Fit,
    Fixed,
    Gram,
    MinMax,
    PerChannel,
    PerTensor,
    Spec,
    Statistic,
    Tokens,
    all_finite,
    arity,
    serializable,
)
from lowbit.solve.base import FEW_TOKENS, Solution, Solver, check_weight
from lowbit.solve.columns import Bands, Tiling, by_band_and_score, by_score, lazy_blocks
from lowbit.solve.factor import STRIP, asymmetric_target, factor_bytes, gathered, inverse_factor, shrinkage
from lowbit.solve.kept import Kept
from lowbit.solve.nearest import Nearest
from lowbit.solve.outliers import OutlierRule, choose, perturbation, rules_of
from lowbit.solve.recursion import descend, recursion
from lowbit.solve.refit import REFIT_BYTES, refit, why_no_refit
from lowbit.transforms import Permute


@serializable
@dataclass(frozen=True)
class Gptq(Solver):
    """Second-order rounding, column by column.

    Args:
        fit: places the grid on each granule; the importance of a column is its diagonal entry of H.
        order: order of the columns. ``"none"``: as given. ``"act"``: by falling ``rank``; groups that are not static are
            formed in the new order, the weight is stored in it, and the layer permutes its input. ``"group"``: by falling
            rank inside each group, groups by their largest rank; groups stay unchanged, so it costs nothing at run time.
        rank: the score of a column: ``"diagonal"`` of H, or ``"perturbation"``, the diagonal times the squared error of
            the column rounded to nearest (OWQ).
        static_groups: place all grids before the first column, on the weights as given, instead of each group's at its
            first column. So it is also where scales of several groups are quantized together.
        stale_groups: place a group's grid on weights without the corrections of the current block, as the authors'
            code does. For comparison only.
        damp: share of the mean diagonal that is added to the diagonal.
        block: columns between two updates of the rest of the matrix. It changes speed, and results only with
            ``stale_groups``.
        outliers: one rule or several for weights that stay in float16; see ``solve.outliers``.
        greedy_passes: rounds of coordinate descent over the codes afterwards (QuIP); a round never raises the loss.
        refits: rounds in which the scales are fitted to the codes (:func:`~lowbit.solve.refit.refit`) and the codes to the scales (one
            pass of coordinate descent) afterwards; a round never raises the loss. None: 2 where the scales are quantized again and can
            be fitted, as in llama.cpp's K types, because all of them are placed before the first column; else 0.
        asymmetric: 0 to 1, weight of the correction towards the original model's output; see :func:`asymmetric_target`.
    """

    fit: Fit = MinMax()
    order: Literal["none", "act", "group"] = "none"
    static_groups: bool = False
    stale_groups: bool = False
    damp: float = 0.01
    block: int = 128
    rank: Literal["diagonal", "perturbation"] = "diagonal"
    outliers: OutlierRule | tuple[OutlierRule, ...] | None = None
    greedy_passes: int = 0
    refits: int | None = None
    asymmetric: float = 0.0

    def __post_init__(self):
        if self.order not in ("none", "act", "group"):
            raise ValueError(f"order is 'none', 'act' or 'group', found {self.order!r}")
        if self.rank not in ("diagonal", "perturbation"):
            raise ValueError(f"rank is 'diagonal' or 'perturbation', found {self.rank!r}")
        if self.static_groups and self.stale_groups:
            raise ValueError("static groups are placed before the first column, so stale_groups cannot apply; use one")
        if self.damp < 0 or self.block < 1 or self.greedy_passes < 0 or (self.refits or 0) < 0:
            raise ValueError(
                "damp, greedy_passes and refits are at least 0 and block at least 1, "
                f"found {self.damp}, {self.greedy_passes}, {self.refits} and {self.block}"
            )
        if self.refits and self.outliers:
            raise ValueError("refits move scales under which kept weights were chosen; leave outliers or refits out")
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"asymmetric is a share between 0 and 1, found {self.asymmetric}")
        if sum(rule.live for rule in rules_of(self.outliers)) > 1:
            raise ValueError(
                "at most one outlier rule can choose while columns are rounded (LeaveOneOut); leave one out"
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        own: frozenset[Statistic] = frozenset({Gram(), Tokens()} | ({CrossGram()} if self.asymmetric else set()))
        return own.union(*(rule.needs for rule in rules_of(self.outliers)))

    @property
    def moves_groups(self) -> bool:
        return self.order == "act" and not self.static_groups

    def memory(self, rows: int, columns: int) -> int:
        weight, matrix = 4 * rows * columns, 4 * columns**2
        # The loop: the weight as it is corrected, its codes, and what goes on beside: kept weights and their mask, the
        # target of the descent, the placing of all grids at once.
        copies = 1.5 + 1.5 * bool(self.outliers) + bool(self.greedy_passes or self.refits) + 2.5 * self.static_groups
        loop = factor_bytes(columns) + copies * weight
        paired = factor_bytes(columns) + matrix + 3 * weight if self.asymmetric else 0
        descent = matrix + (3.5 + 1.5 * bool(self.outliers)) * weight if self.greedy_passes or self.refits else 0
        descent += (2 * matrix + 4 * weight + REFIT_BYTES) * bool(self.refits)
        return int(max(super().memory(rows, columns), loop, paired, descent))

    def check(self, spec: Spec, clipped: bool) -> None:
        check_weight(spec, None if clipped else self.fit)
        if arity(spec.grid) > 1:
            raise ValueError(
                f"{spec.grid} codes {arity(spec.grid)} neighbours of a row together, and a column solver fixes them one after "
                "another; use the solver Nearest, or a grid that codes each weight by itself"
            )
        grouped = not isinstance(spec.granularity, PerChannel | PerTensor)
        if grouped and clipped and self.moves_groups:
            raise ValueError(
                "the clipping is chosen for groups of neighbouring columns, but order='act' forms other groups; "
                "use static_groups=true, order='group', or leave the clipping out"
            )
        if self.refits and (reason := why_no_refit(spec)):
            raise ValueError(f"refits fit scales to codes, and {reason}; leave refits out")
        if self.moves_groups and _spans_groups(spec):
            assert spec.stats is not None
            raise ValueError(
                f"{spec.stats.granularity} of the scales{' (centred)' if spec.stats_centred else ''} spans several "
                "groups of columns, which order='act' forms one after another; use PerChannel() or PerGroup(size) for the "
                "scales, not centred, or static_groups=true, or order='group'"
            )

    def solve(
        self, w_OI: Tensor, spec: Spec, stats: Mapping[Statistic, Tensor], clip: Clipped | Fixed | None = None
    ) -> Solution:
        H = stats[Gram()]
        _check(w_OI, H)
        self.check(spec, clip is not None)
        diag = H.diagonal().clone()
        dead = diag == 0
        if not all_finite(H) or dead.all():
            why = "all inputs were always zero" if dead.all() else "NaN or Inf in the Gram matrix"
            return self._nearest(w_OI, spec, stats, clip, (why,))
        tokens, trust, notes = stats.get(Tokens()), 1.0, ()
        if tokens is not None and tokens.item() < len(H):
            share = shrinkage(H, int(tokens.item()))
            trust, notes = 1 - share, (FEW_TOKENS,)
            diag = diag * trust + share * diag.sum(dtype=torch.float64).item() / len(H)
            dead = torch.zeros_like(dead)
        W = w_OI.to(torch.float64 if w_OI.dtype == torch.float64 else torch.float32)
        W = W.masked_fill(dead, 0) if dead.any() else W
        fit = clip or self.fit
        tiling = Tiling.of(spec.granularity, W)
        chosen = choose(rules_of(self.outliers), W, spec, fit, stats)
        score = diag.to(W.dtype) * (perturbation(W, spec, fit) if self.rank == "perturbation" else 1)
        stored, visit = self._orders(score, tiling, chosen.columns)
        take = stored[visit]
        alive = diag[take].masked_fill_(dead[take], diag[take][~dead[take]].mean().item())
        U, damped = inverse_factor(H, self.damp, order_I=take, scale=trust, diag_I=alive, dtype=W.dtype)
        notes = (*notes, *damped)
        if U is None:
            return self._nearest(w_OI, spec, stats, clip, notes)
        W = _turned(W, take)
        if self.asymmetric:
            D = stats[CrossGram()]
            D = gathered(D, take, torch.empty_like(D, dtype=W.dtype))
            W = asymmetric_target(W, D, U, trust * self.asymmetric)
            del D
        bands = Bands(tiling, spec, fit, len(w_OI), diag.to(W.dtype)[stored])
        kept = Kept.of(W, chosen, take, rules_of(self.outliers), U.diagonal().clone())
        refits = self._rounds(spec)
        target = W.clone() if self.greedy_passes or refits else None
        codes_IO = self._round(W, U, visit, bands, kept)
        del U, W  # the largest of what is in memory
        if target is not None:
            H = gathered(H, take, torch.empty_like(H, dtype=target.dtype), trust)
            H.diagonal().copy_(alive)
            self._improve(codes_IO, target, H, tiling.band_I[visit], bands, kept, refits)
        codes = torch.empty_like(codes_IO.T, memory_format=torch.contiguous_format)
        codes[:, visit] = codes_IO.T
        q = bands.qtensor(codes)
        side = () if kept is None else kept.side_terms(visit)
        pre = () if torch.equal(stored, _as_they_come(score)) else (Permute(stored),)
        if dead.any():
            notes = (*notes, f"{int(dead.sum())} of {len(dead)} input channels were never active: weights set to zero")
        return Solution(q, pre=pre, side=side, notes=(*notes, *chosen.notes))

    def _rounds(self, spec: Spec) -> int:
        """Rounds of refits for a weight in ``spec``."""
        if self.refits is not None:
            return self.refits
        return 2 * (spec.stats is not None and self.outliers is None and why_no_refit(spec) is None)

    def _improve(
        self, codes_IO: Tensor, target: Tensor, H: Tensor, band_I: Tensor, bands: Bands, kept: Kept | None, refits: int
    ) -> None:
        """Coordinate descent over the codes, and scales fitted to them in turn."""
        band = band_I.tolist()
        if self.greedy_passes:
            descend(codes_IO, target, H, self.damp, band, bands, kept, self.greedy_passes)
        if not refits:
            return
        damped = H + torch.diag(self.damp * H.diagonal().mean().expand(len(H)))
        for _ in range(refits):
            bands.settle(refit(codes_IO, target, damped, band_I, bands.settled(), bands.spec))
            if not descend(codes_IO, target, H, self.damp, band, bands, kept, 1):
                break

    def _nearest(
        self,
        w_OI: Tensor,
        spec: Spec,
        stats: Mapping[Statistic, Tensor],
        clip: Clipped | Fixed | None,
        notes: tuple[str, ...],
    ) -> Solution:
        """The fallback without a usable H: rounding to nearest, with the outlier rules that do not need H."""
        rules = tuple(r for r in rules_of(self.outliers) if not r.live and Gram() not in r.needs)
        rounded = Nearest(self.fit, rules or None).solve(w_OI, spec, stats, clip)
        return replace(rounded, notes=(*notes, "rounded to nearest", *rounded.notes))

    def _orders(self, score: Tensor, tiling: Tiling, last: Tensor) -> tuple[Tensor, Tensor]:
        """The stored order of the columns, and the order of visits to the stored columns; ``last`` are visited last."""
        same, normal = _as_they_come(score), torch.ones_like(score, dtype=torch.bool)
        normal[last] = False
        order = same
        if self.order == "group":
            order = by_band_and_score(score.masked_fill(~normal, 0), tiling.band_I)
        elif self.order == "act":
            order = by_score(score)
        order = torch.cat([order[normal[order]], order[~normal[order]]])
        return (order, same) if self.moves_groups and tiling.wide > 1 else (same, order)

    def _round(self, W: Tensor, U: Tensor, visit: Tensor, bands: Bands, kept: Kept | None) -> Tensor:
        """Codes ``[I, O]``; fills ``bands`` and ``kept``.

        W ``[I, O]`` (overwritten), U and the codes are in the order of visits.
        """
        n = len(W) if kept is None else kept.rounded  # columns to round; later ones are kept whole
        grid, band = bands.spec.grid, bands.tiling.band_I[visit].tolist()
        width = Counter(band[:n])
        static = self.static_groups or _spans_groups(bands.spec)
        if static:
            back = visit.argsort()
            bands.place_all(W[back].T, None if kept is None else kept.mask[back].T)

        def place(i: int, W: Tensor) -> None:
            here = slice(i, i + width[band[i]])
            out = None if kept is None else kept.hidden(here, W, grid, bands, band[i], visit[here])
            bands.place(band[i], W[here].T, visit[here], out)  # W has all corrections so far

        runs = [self.block] * (n // self.block) + [n % self.block]
        if not self.stale_groups and not static:
            runs = [width[b] for b in dict.fromkeys(band[:n])]
        blocks = lazy_blocks(runs, self.block)
        codes_IO = recursion(W, U, blocks, band, bands, place, self.stale_groups, kept)
        for i in range(n, len(W)):
            assert kept is not None
            if band[i] not in bands:  # a band with only kept columns
                bands.place(band[i], torch.zeros_like(W[i : i + 1].T), visit[i : i + 1], None)
            w = W[i, :, None]
            codes_IO[i] = kept.at(i, w, codes_IO[i, :, None], w, grid, bands.of_rows(band[i]))[0][:, 0]
        return codes_IO


def _spans_groups(spec: Spec) -> bool:
    """Whether scales of several groups of columns are quantized together."""
    if isinstance(spec.granularity, PerChannel | PerTensor) or spec.stats is None:
        return False
    # With two columns of groups over many rows, a second-level granule must not span both.
    return spec.stats_centred or spec.stats.granularity.param_shape((2, 2**20))[0] != 2


def _turned(w_OI: Tensor, take_I: Tensor) -> Tensor:
    """``w_OI[:, take].T``, contiguous, with a few columns in memory beside it."""
    w_IO = w_OI.new_empty(w_OI.shape[1], w_OI.shape[0])
    for columns, into in zip(take_I.split(STRIP), w_IO.split(STRIP), strict=True):
        into.copy_(w_OI[:, columns].T)
    return w_IO


def _as_they_come(score_I: Tensor) -> Tensor:
    return torch.arange(len(score_I), device=score_I.device)


def _check(w_OI: Tensor, H: Tensor) -> None:
    if not all_finite(w_OI):
        raise ValueError(f"cannot quantize {int((~torch.isfinite(w_OI)).sum())} weights that are NaN or Inf")
    if H.shape != (w_OI.shape[1], w_OI.shape[1]):
        raise ValueError(
            f"a weight of {w_OI.shape[1]} input channels needs a square Gram matrix, found {list(H.shape)}"
        )
