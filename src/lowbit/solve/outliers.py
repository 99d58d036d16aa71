"""Which weights stay in float16 beside the codes: the one hook that a solver gives to methods with outliers.

A rule answers up to three questions, and most answer one:

* ``columns``: which whole input channels are never rounded. The column solver visits them last, so that they absorb what
  every other column lost; they come back as ``KeptColumns``.
* ``elements``: which single weights are kept, chosen before anything is rounded. They come back as ``Sparse``.
* ``watch``: the same, chosen while the columns are rounded (a :class:`Watch`). Only the column solver can ask this.

Whatever is kept is hidden from the fit of the grid (``columns.place``), has the code of zero, and is stored as what must
be added to that code's value (``numerics.side``). Codes therefore stay where they are: groups, layouts and kernels do
not know of outliers, and a format that could not be grouped in its authors' code (kept columns in the middle of a group)
can be grouped here.

Shapes: O output channel, I input channel, K column of one band, k kept column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class Watch(Protocol):
    """What a rule does inside the column loop. ``u``: diagonal of U, by which errors are scaled: ``e = (w - q) / u``."""

    def unfit(self, w_OK: Tensor, u_K: Tensor, grid: Grid, place: Callable[[Tensor], Params]) -> Tensor | None:
        """Which weights of a band its grid should not be placed on, bool ``[O, K]``; None for no opinion.

        ``place(columns)``: the parameters, one set a row, that the fit gives on these columns of ``w_OK`` alone.
        """
        ...

    def keep(self, e_O: Tensor) -> Tensor:
        """Which weights of a column are kept, from the scaled errors that rounding them would leave; bool ``[O]``."""
        ...


class OutlierRule:
    """See the module docstring. Subclasses are frozen dataclasses and override what they answer."""

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    live: ClassVar[bool] = False
    """Whether the rule watches the column loop."""

    def columns(self, w_OI: Tensor, spec: Spec, fit: Fit, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """Kept columns, int64 ``[k]``, and notes for the report."""
        return torch.zeros(0, dtype=torch.int64, device=w_OI.device), ()

    def elements(self, w_OI: Tensor, taken_OI: Tensor, stats: Stats) -> Tensor:
        """Kept weights other than those already ``taken``; both bool ``[O, I]``."""
        return torch.zeros_like(taken_OI)

    def watch(self, w_OI: Tensor, u_I: Tensor) -> Watch | None:
        """For a live rule: its part of the loop. Columns in the order of visits."""
        return None


@serializable
@dataclass(frozen=True)
class WeakColumns(OutlierRule):
    """Keeps the columns that rounding would hurt most: ``H_jj * sum_i (w_ij - q_ij)^2``, q to nearest (arXiv:2306.02272).

    Args:
        count: columns kept in each matrix.
        target_bits: instead: as many as fit, in each matrix by its own true bits: codes, parameters and kept columns
            together take at most so many bits a weight.
    """

    count: int | None = None
    target_bits: float | None = None
    needs: ClassVar[frozenset[Statistic]] = frozenset({Gram()})

    def __post_init__(self):
        if (self.count is None) == (self.target_bits is None):
            raise ValueError(f"weak columns need a count or target_bits, one of the two; found {self}")
        if self.count is not None and self.count < 0:
            raise ValueError(f"the count of kept columns is at least 0, found {self.count}")

    def columns(self, w_OI: Tensor, spec: Spec, fit: Fit, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        count, notes = self.budget(spec, (w_OI.shape[0], w_OI.shape[1]))
        sensitivity_I = stats[Gram()].diagonal() * perturbation(w_OI, spec, fit)
        return sensitivity_I.topk(count).indices.sort().values, notes

    def budget(self, spec: Spec, shape: tuple[int, int]) -> tuple[int, tuple[str, ...]]:
        """How many columns of a matrix ``(O, I)`` are kept, and what there is to say about it."""
        rows, columns = shape
        if self.count is not None:
            return min(self.count, columns), ()
        assert self.target_bits is not None
        codes, column, weights = stored_bits(spec, shape), 16 * rows + 32, rows * columns
        count = int(min(max((self.target_bits * weights - codes) / column, 0), columns))
        if count:
            return count, ()
        here, each = codes / weights, column / weights
        said = f"of {self.target_bits:g} bits the codes take {here:.3f}, and a column would take {each:.3f}"
        return 0, (f"no column kept: {said}",)


@serializable
@dataclass(frozen=True)
class LeaveOneOut(OutlierRule):
    """Keeps weights whose rounding would cost too much, and places each grid as if they were not there (arXiv:2306.03078).

    A weight is kept when, at its turn, its scaled squared error is over ``tau = threshold * mean_j(Var_i(w_ij) / U_jj^2)``
    (section 4 of the paper, as its code has it). Before that, a weight is left out of the fit of its group when the error
    of all others falls by more than tau once the grid is placed without it. A larger threshold keeps less.

    Args:
        threshold: relative, as above.
        simplified: do not test the fit; a band of K columns saves K fits.
    """

    threshold: float = 0.2
    simplified: bool = False
    live: ClassVar[bool] = True

    def __post_init__(self):
        if self.threshold < 0:
            raise ValueError(f"the threshold of outliers is at least 0, found {self.threshold}")

    def watch(self, w_OI: Tensor, u_I: Tensor) -> Watch:
        spread = w_OI.var(0, correction=min(1, len(w_OI) - 1))
        return _LeaveOneOut(self.threshold * (spread / u_I.square()).mean().item(), self.simplified)


@dataclass(frozen=True)
class _LeaveOneOut:
    tau: float
    simplified: bool

    def unfit(self, w_OK: Tensor, u_K: Tensor, grid: Grid, place: Callable[[Tensor], Params]) -> Tensor | None:
        width = w_OK.shape[1]
        if self.simplified or width == 1:
            return None

        def cost_O(columns: Tensor) -> Tensor:
            w, params = w_OK[:, columns], place(columns)
            return ((grid.decode(grid.encode(w, params), params) - w) / u_K[columns]).square().sum(1)

        everyone = torch.arange(width, device=w_OK.device)
        others = [cost_O(everyone[everyone != k]) for k in range(width)]
        return cost_O(everyone)[:, None] - torch.stack(others, 1) > self.tau

    def keep(self, e_O: Tensor) -> Tensor:
        return e_O.square() > self.tau


@serializable
@dataclass(frozen=True)
class ReachingColumns(OutlierRule):
    """Keeps the columns whose input reaches ``threshold`` on the calibration text (LLM.int8(), arXiv:2208.07339).

    That method multiplies such columns by the original weight, and knows them at run time only. To have every column at
    hand then, all would have to be stored twice; these are the ones that calibration has seen.
    """

    threshold: float = 6.0
    needs: ClassVar[frozenset[Statistic]] = frozenset({AbsMax()})

    def __post_init__(self):
        if not self.threshold > 0:
            raise ValueError(f"columns reach a threshold over 0, found {self.threshold}")

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
    """Keeps the weights of largest magnitude, a ``share`` of each matrix (arXiv:2306.07629).

    The authors bound magnitudes by ``max(|q1 - t IQR|, |q3 + t IQR|)`` and tune t until the wanted share lies beyond. For
    one matrix that is the share itself.
    """

    share: float = 0.0045

    def score(self, w_OI: Tensor, stats: Stats) -> Tensor:
        return w_OI.abs()


@serializable
@dataclass(frozen=True)
class Sensitive(_Largest):
    """Keeps the weights of largest Fisher information, a ``share`` of each matrix (arXiv:2306.07629)."""

    share: float = 0.0005
    needs: ClassVar[frozenset[Statistic]] = frozenset({Fisher()})

    def score(self, w_OI: Tensor, stats: Stats) -> Tensor:
        return stats[Fisher()]


Outliers = OutlierRule | tuple[OutlierRule, ...] | None
"""What a solver's field ``outliers`` may be: nothing, a rule, or several in order, each seeing what those before took."""


def rules_of(outliers: Outliers) -> tuple[OutlierRule, ...]:
    return () if outliers is None else (outliers,) if isinstance(outliers, OutlierRule) else outliers


@dataclass(frozen=True, eq=False)
class Chosen:
    """What rules chose before anything is rounded. columns: int64 ``[k]``, rising; elements: bool ``[O, I]``, none of them
    in a kept column, or None where no rule chose any."""

    columns: Tensor
    elements: Tensor | None
    notes: tuple[str, ...] = ()

    def out_of_fits(self, w_OI: Tensor) -> Tensor | None:
        """Everything kept, bool ``[O, I]``, or None."""
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
        columns, said = rule.columns(w_OI, spec, fit, stats)
        column_I[columns], notes = True, (*notes, *said)
    if not rules:
        return Chosen(column_I.nonzero()[:, 0], None)
    taken = column_I.expand_as(w_OI)
    for rule in rules:
        taken = taken | rule.elements(w_OI, taken, stats)
    elements = taken & ~column_I
    return Chosen(column_I.nonzero()[:, 0], elements if elements.any() else None, notes)


def perturbation(w_OI: Tensor, spec: Spec, fit: Fit) -> Tensor:
    """``sum_i (w_ij - q_ij)^2`` of each column j when all of ``w_OI`` is rounded to nearest, ``[I]``.

    A fit that searches ranges searches more coarsely here: columns come out in nearly the same order, and the search would
    cost as much as all else.
    """
    fit = ClipSearch(steps=20) if isinstance(fit, ClipSearch | TruncationSearch) else fit
    return (w_OI - quantize(w_OI, spec, fit).dequantize().to(w_OI.dtype)).square().sum(0)


def side_terms(
    columns: Tensor, column_values: Tensor, elements_OI: Tensor | None, values_OI: Tensor | None
) -> tuple[SideTerm, ...]:
    """The terms to store: what must be added to the decoded codes, ``[O, k]`` at ``columns``, ``[O, I]`` at ``elements``."""
    terms: list[SideTerm] = []
    if len(columns):
        terms.append(KeptColumns.of(column_values, columns))
    if elements_OI is not None and values_OI is not None and elements_OI.any():
        terms.append(Sparse.of(values_OI, elements_OI))
    return tuple(terms)
