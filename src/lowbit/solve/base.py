"""The contract of a weight solver, which turns a weight matrix into codes.

A solver gets one matrix, its format, and statistics of its input. It knows no layer and no model, so any solver serves
any linear layer. It does not change its arguments, because layers that read one input share one Gram matrix. Warnings (a
fallback, dead channels) are returned as notes, because only the caller knows the layer's name.

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lowbit.numerics import Clipped, Fit, Fixed, PerToken, QTensor, SideTerm, Spec, Statistic
from lowbit.solve.outliers import OutlierRule
from lowbit.transforms import ChannelTransform

FEW_TOKENS = (
    "fewer calibration tokens than input channels: little can be learned from its input; use more calibration text"
)
"""The note of a layer that a solver of its inputs, or a step before it, knows too little about."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A solved weight.

    Args:
        q: codes, and parameters exactly as stored.
        pre: channel transforms that the layer applies to its input, in order, before the product; usually empty.
        post: channel transforms that the layer applies to its output, in order, before the bias.
        side: terms added to the decoded ``q``.
        notes: sentences that the report must show under the layer's name.
    """

    q: QTensor
    pre: tuple[ChannelTransform, ...] = ()
    post: tuple[ChannelTransform, ...] = ()
    side: tuple[SideTerm, ...] = ()
    notes: tuple[str, ...] = ()


_WEIGHT_COPIES = 3  # float32 copies of the weight in memory at once


class Solver:
    """A weight solver. Subclasses are frozen, comparable dataclasses; all work happens in :meth:`solve`.

    Args:
        fit: places the grid unless an earlier step did.
        outliers: rules for weights that stay in float16.
        damp: see :class:`~lowbit.solve.Gptq`; unused by solvers that invert no matrix.
    """

    fit: Fit
    outliers: OutlierRule | tuple[OutlierRule, ...] | None = None
    damp: float = 0.0

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics of the layer's input, or of its weight, that ``solve`` reads."""
        return frozenset()

    @property
    def moves_groups(self) -> bool:
        """Whether the solver forms groups in its own order of columns, which the layer then stores."""
        return False

    @property
    def rescales(self) -> bool:
        """Whether it gives a layer scales of its own that the format does not know. What an earlier step found out about the
        scaled input or output does not hold then, and rounding to the format alone does not simulate the result."""
        return False

    def transforms(self, shape: tuple[int, int]) -> tuple[tuple[ChannelTransform, ...], tuple[ChannelTransform, ...]]:
        """The ``pre`` and ``post`` of every solution for a weight of ``shape`` (O, I), with values that mean nothing. What only
        some solutions have is not among them."""
        return (), ()

    def memory(self, rows: int, columns: int) -> int:
        """Approximate bytes for solving a weight of ``rows`` x ``columns``, without the weight and the statistics."""
        return _WEIGHT_COPIES * 4 * rows * columns

    def check(self, spec: Spec, clipped: bool) -> None:
        """Checks that this solver can reach ``spec``.

        Args:
            spec: the format.
            clipped: an earlier step chooses a range for each granule.

        Raises:
            ValueError: it cannot, for any weight.
        """

    def solve(
        self, w_OI: Tensor, spec: Spec, stats: Mapping[Statistic, Tensor], clip: Clipped | Fixed | None = None
    ) -> Solution:
        """Codes for ``w_OI`` in ``spec``.

        Args:
            w_OI: floating; float64 is solved in float64, everything else in float32.
            spec: the format to reach.
            stats: at least the statistics in ``needs``.
            clip: a range chosen earlier for each granule (row-major); it replaces the solver's own fit.

        Raises:
            ValueError: NaN or Inf in the weight, or a format that this solver cannot reach; the message says why.
        """
        raise NotImplementedError


def check_weight(spec: Spec, fit: Fit | None) -> None:
    """The checks that all solvers share.

    Args:
        spec: the format.
        fit: the solver's fit; None: an earlier step chose the ranges.

    Raises:
        ValueError: a granularity of activations, or a fit that cannot place the grid.
    """
    if isinstance(spec.granularity, PerToken):
        raise ValueError("PerToken() is for activations; a weight is quantized PerChannel(), PerGroup(size), ...")
    why_not = None if fit is None else fit.why_not(spec.grid)
    if why_not is not None:
        raise ValueError(f"{why_not}; choose another fit or another grid")
