"""Outlier rules: which weights stay in float16 next to the codes. Solvers give methods with outliers this one hook.

A rule can answer three questions; most answer one:

* ``columns``: which whole input channels are never rounded? The column solver visits them last, so they absorb the errors
  of all other columns. They are stored as ``KeptColumns``.
* ``elements``: which single weights are kept, before rounding starts? They are stored as ``Sparse``.
* ``watch``: which single weights are kept while the columns are rounded (a :class:`Watch`)? Only the column solver asks.

The fit of the grid ignores kept weights (``columns.place``). A kept weight has the code of zero and stores the difference
to that code's value (``numerics.side_terms``). Codes therefore stay in place: groups, layouts and kernels do not know
outliers, and kept columns may lie inside a group, which some authors' code does not allow.

Shapes: O output channel, I input channel, K column of one band, k kept column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowbit.numerics import (
    AbsMax,
    ClipSearch,
    Fisher,
    Fit,
    Gram,
    Grid,
    KeptColumns,
    Params,
    SideTerm,
    Sparse,
    Spec,
    Statistic,
    TruncationSearch,
    quantize,
    serializable,
    stored_bits,
)

Stats = Mapping[Statistic, Tensor]


Place = Callable[[Tensor], Iterator[tuple[Tensor, Params]]]
"""``place(some_FN)`` fits each of F choices of N columns of a band. It yields, for some choices at a time, their weights
``[O * f, N]``, every row f times, and parameters, one set for each of these rows."""


class Watch(Protocol):
    """The part of a rule inside the column loop. ``u`` is the diagonal of U; errors are ``e = (w - q) / u``."""

    def unfit(self, w_OK: Tensor, u_K: Tensor, grid: Grid, place: Place) -> Tensor | None:
        """Weights of a band that its fit must ignore, bool ``[O, K]``; None: it ignores none.

        Args:
            w_OK: the band.
            u_K: its part of the diagonal of U.
            grid: the grid.
            place: fits choices of columns of ``w_OK`` alone.
        """
        ...

    @property
    def tau(self) -> float:
        """A weight is kept if the square of the scaled error that rounding it would leave exceeds this."""
        ...


class OutlierRule:
    """See the module docstring. Subclasses are frozen dataclasses and override the questions that they answer."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    live: ClassVar[bool] = False
    """Whether the rule watches the column loop."""

    def columns(self, w_OI: Tensor, spec: Spec, fit: Fit, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """Kept columns, int64 ``[k]``, and notes for the report."""
        return torch.zeros(0, dtype=torch.int64, device=w_OI.device), ()

    def elements(self, w_OI: Tensor, taken_OI: Tensor, stats: Stats) -> Tensor:
        """Further kept weights, in addition to ``taken``; both bool ``[O, I]``."""
        return torch.zeros_like(taken_OI)

    def watch(self, w_OI: Tensor, u_I: Tensor) -> Watch | None:
        """The part of a live rule in the column loop; columns are in the order of visits."""
        return None


@serializable
@dataclass(frozen=True)
class WeakColumns(OutlierRule):
    """Keeps the columns with the largest ``H_jj * sum_i (w_ij - q_ij)^2``, q rounded to nearest (OWQ, arXiv:2306.02272).

    Args:
        count: columns kept in each matrix.
        target_bits: alternative to ``count``: as many columns as fit into this number of bits for each weight. Codes,
            parameters and kept columns of the matrix are counted together.
    """

    count: int | None = None
    target_bits: float | None = None
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram()})

    def __post_init__(self):
        if (self.count is None) == (self.target_bits is None):
            raise ValueError(f"weak columns need either count or target_bits, found {self}")
        if self.count is not None and self.count < 0:
            raise ValueError(f"the count of kept columns is at least 0, found {self.count}")

    def columns(self, w_OI: Tensor, spec: Spec, fit: Fit, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        count, notes = self.budget(spec, (w_OI.shape[0], w_OI.shape[1]))
        sensitivity_I = stats[Gram()].diagonal() * perturbation(w_OI, spec, fit)
        return sensitivity_I.topk(count).indices.sort().values, notes

    def budget(self, spec: Spec, shape: tuple[int, int]) -> tuple[int, tuple[str, ...]]:
        """The number of kept columns of a matrix ``(O, I)``, and notes on it."""
        rows, columns = shape
        if self.count is not None:
            return min(self.count, columns), ()
        assert self.target_bits is not None
        codes, column, weights = stored_bits(spec, shape), 16 * rows + 32, rows * columns
        count = int(min(max((self.target_bits * weights - codes) / column, 0), columns))
        if count:
            return count, ()
        used, each = codes / weights, column / weights
        return 0, (
            f"no column kept: of {self.target_bits:g} bits the codes and their scales take {used:.3f}, and a column would take "
            f"{each:.3f}; from {used + each:.3f} bits on one is kept",
        )


@serializable
@dataclass(frozen=True)
class LeaveOneOut(OutlierRule):
    """Keeps weights whose rounding would cost too much, and fits each grid without them (SpQR, arXiv:2306.03078).

    A weight is kept if its scaled squared error, when its column is rounded, exceeds
    ``tau = threshold * mean_j(Var_i(w_ij) / U_jj^2)`` (section 4 of the paper, as in its code). Earlier, the fit of a group
    leaves out a weight if that lowers the error of all others by more than tau.

    Args:
        threshold: relative, as above; a larger one keeps fewer weights.
        simplified: leave no weight out of the fit; this saves K fits for a band of K columns.
    """

    threshold: float = 0.2
    simplified: bool = False
    live: ClassVar[bool] = True

    def __post_init__(self):
        if self.threshold < 0:
            raise ValueError(f"an outlier threshold is at least 0, found {self.threshold}")

    def watch(self, w_OI: Tensor, u_I: Tensor) -> Watch:
        spread = w_OI.var(0, correction=min(1, len(w_OI) - 1))
        return _LeaveOneOut(self.threshold * (spread / u_I.square()).mean().item(), self.simplified)


@dataclass(frozen=True)
class _LeaveOneOut:
    tau: float
    simplified: bool

    def unfit(self, w_OK: Tensor, u_K: Tensor, grid: Grid, place: Place) -> Tensor | None:
        width = w_OK.shape[1]
        if self.simplified or width == 1:
            return None

        def cost_OF(some_FN: Tensor) -> Tensor:
            costs, at = [], 0
            for w, params in place(some_FN):
                shape = len(w_OK), len(w) // len(w_OK), w.shape[1]
                u = u_K[some_FN[at : at + shape[1]]]
                costs.append(((grid.decode(grid.encode(w, params), params) - w).view(shape) / u).square_().sum(2))
                at += shape[1]
            return torch.cat(costs, 1)

        everyone = torch.arange(width, device=w_OK.device)
        others = torch.stack([everyone[everyone != k] for k in range(width)])
        return cost_OF(everyone[None]) - cost_OF(others) > self.tau


@serializable
@dataclass(frozen=True)
class ReachingColumns(OutlierRule):
    """Keeps the columns whose input reaches ``threshold`` on the calibration text (LLM.int8(), arXiv:2208.07339).

    That method finds the columns at run time and multiplies them by the original weight. To have every original column
    available, a checkpoint would store all weights twice; this rule keeps the columns that calibration finds.
    """

    threshold: float = 6.0
    needs: ClassVar[frozenset[Statistic]] = frozenset({AbsMax()})

    def __post_init__(self):
        if not self.threshold > 0:
            raise ValueError(f"a threshold for columns is above 0, found {self.threshold}")

    def columns(self, w_OI: Tensor, spec: Spec, fit: Fit, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        return (stats[AbsMax()] >= self.threshold).nonzero()[:, 0], ()


@dataclass(frozen=True)
class _Largest(OutlierRule):
    """Keeps the ``share`` of a matrix's weights with the largest score."""

    share: float

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(f"the share of kept weights is at least 0 and below 1, found {self.share}")

    def elements(self, w_OI: Tensor, taken_OI: Tensor, stats: Stats) -> Tensor:
        score = self.score(w_OI, stats).masked_fill(taken_OI, -1).flatten()
        mask = torch.zeros_like(score, dtype=torch.bool)
        mask[score.topk(int(self.share * score.numel())).indices] = True
        return mask.view_as(taken_OI) & ~taken_OI

    def score(self, w_OI: Tensor, stats: Stats) -> Tensor:
        """At least 0, ``[O, I]``."""
        raise NotImplementedError


@serializable
@dataclass(frozen=True)
class RangeOutliers(_Largest):
    """Keeps the weights of largest magnitude, a ``share`` of each matrix (SqueezeLLM, arXiv:2306.07629).

    The authors keep magnitudes above ``max(|q1 - t IQR|, |q3 + t IQR|)`` and tune t for the wanted share. In one matrix
    these are the same weights.
    """

    share: float = 0.0045

    def score(self, w_OI: Tensor, stats: Stats) -> Tensor:
        return w_OI.abs()


@serializable
@dataclass(frozen=True)
class Sensitive(_Largest):
    """Keeps the weights with the largest Fisher information, a ``share`` of each matrix (SqueezeLLM, arXiv:2306.07629)."""

    share: float = 0.0005
    needs: ClassVar[frozenset[Statistic]] = frozenset({Fisher()})

    def score(self, w_OI: Tensor, stats: Stats) -> Tensor:
        return stats[Fisher()]


Outliers = OutlierRule | tuple[OutlierRule, ...] | None
"""The type of a solver's field ``outliers``: none, one rule, or several in order. A rule sees the choices before it."""


def rules_of(outliers: Outliers) -> tuple[OutlierRule, ...]:
    return () if outliers is None else (outliers,) if isinstance(outliers, OutlierRule) else outliers


@dataclass(frozen=True, eq=False)
class Chosen:
    """The choices of the rules before rounding.

    Args:
        columns: kept columns, int64 ``[k]``, rising.
        elements: kept weights outside these columns, bool ``[O, I]``; None if no rule chose any.
        notes: for the report.
    """

    columns: Tensor
    elements: Tensor | None
    notes: tuple[str, ...] = ()

    def out_of_fits(self, w_OI: Tensor) -> Tensor | None:
        """All kept weights, bool ``[O, I]``; None if there are none."""
        if self.elements is None and not len(self.columns):
            return None
        mask = torch.zeros_like(w_OI, dtype=torch.bool) if self.elements is None else self.elements.clone()
        mask[:, self.columns] = True
        return mask


def choose(rules: tuple[OutlierRule, ...], w_OI: Tensor, spec: Spec, fit: Fit, stats: Stats) -> Chosen:
    """Asks every rule for whole columns, then every rule for elements."""
    column_I = torch.zeros(w_OI.shape[1], dtype=torch.bool, device=w_OI.device)
    notes: tuple[str, ...] = ()
    for rule in rules:
        columns, new_notes = rule.columns(w_OI, spec, fit, stats)
        column_I[columns], notes = True, (*notes, *new_notes)
    if not rules:
        return Chosen(column_I.nonzero()[:, 0], None)
    taken = column_I.expand_as(w_OI)
    for rule in rules:
        taken = taken | rule.elements(w_OI, taken, stats)
    elements = taken & ~column_I
    return Chosen(column_I.nonzero()[:, 0], elements if elements.any() else None, notes)


def perturbation(w_OI: Tensor, spec: Spec, fit: Fit) -> Tensor:
    """``sum_i (w_ij - q_ij)^2`` of each column j with all of ``w_OI`` rounded to nearest, ``[I]``.

    Range searches are coarser here: the order of the columns is nearly the same, and a full search would cost as much as
    the rest of the solve.
    """
    fit = ClipSearch(steps=20) if isinstance(fit, ClipSearch | TruncationSearch) else fit
    return (w_OI - quantize(w_OI, spec, fit).dequantize().to(w_OI.dtype)).square().sum(0)


def side_terms(
    columns: Tensor, column_values: Tensor, elements_OI: Tensor | None, values_OI: Tensor | None
) -> tuple[SideTerm, ...]:
    """The terms to store.

    Args:
        columns: kept columns, int64 ``[k]``.
        column_values: added to the decoded codes there, ``[O, k]``.
        elements_OI: kept weights outside these columns, bool.
        values_OI: added to the decoded codes there.
    """
    terms: list[SideTerm] = []
    if len(columns):
        terms.append(KeptColumns.of(column_values, columns))
    if elements_OI is not None and values_OI is not None and elements_OI.any():
        terms.append(Sparse.of(values_OI, elements_OI))
    return tuple(terms)
