"""Simulated quantization for searches and learning: floating and differentiable.

Law: with the same fit, :func:`fake_quantize` is the dequantized :class:`~lowbit.numerics.QTensor`, up to the rounding of
scales to their storage dtype. The work of a solver (error feedback, kept weights, importance) is not simulated.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.numerics.binary_coding import Alternating
from lowbit.numerics.fit import Fit, KMeans, MinMax
from lowbit.numerics.grids.base import Grid, RangeGrid
from lowbit.numerics.qtensor import quantize
from lowbit.numerics.spec import Spec


def usual_fit(grid: Grid) -> Fit:
    """The fit for ``grid`` when no recipe names one: the first plain fit that can place it."""
    return next(fit for fit in (MinMax(), KMeans(), Alternating()) if fit.why_not(grid) is None)


def fake_quantize(x: Tensor, spec: Spec, fit: Fit | None = None) -> Tensor:
    """``x`` as ``spec`` restores it, in the dtype of ``x``.

    Gradients pass the rounding straight through to ``x``. On grids that ranges place they also reach the parameters of
    ``fit``.

    Args:
        x: ``[..., I]``.
        spec: the format.
        fit: places the grid; None: :func:`usual_fit`.
    """
    fit = fit or usual_fit(spec.grid)
    if not isinstance(spec.grid, RangeGrid):
        restored = quantize(x.detach(), spec, fit).dequantize().to(x.dtype)
        return x + (restored - x).detach()
    x_GK = spec.granularity.split(x)
    return spec.granularity.join(spec.grid.fake(x_GK, fit(x_GK, spec.grid)), tuple(x.shape))  # pyright: ignore[reportArgumentType]
