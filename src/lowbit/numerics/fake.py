"""Quantization as searches and learning see it: floating, and differentiable.

Law: with the same fit, :func:`fake_quantize` is the dequantized :class:`~lowbit.numerics.QTensor`, up to the rounding of scales
to their storage dtype. What a solver adds to that (errors fed back, weights kept apart, a fit weighed by importance) is not
simulated.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.numerics.binary_coding import Alternating
from lowbit.numerics.fit import Fit, KMeans, MinMax
from lowbit.numerics.grids.base import Grid, RangeGrid
from lowbit.numerics.qtensor import quantize
from lowbit.numerics.spec import Spec


def usual_fit(grid: Grid) -> Fit:
    """What places ``grid`` where no recipe says how: the first of the plain fits that can."""
    return next(fit for fit in (MinMax(), KMeans(), Alternating()) if fit.why_not(grid) is None)


def fake_quantize(x: Tensor, spec: Spec, fit: Fit | None = None) -> Tensor:
    """``x`` ``[..., I]`` as ``spec`` restores it, in the dtype of ``x``.

    Gradients reach ``x``, straight through the rounding, and, on grids that ranges place, the parameters of ``fit`` (None:
    :func:`usual_fit`).
    """
    fit = fit or usual_fit(spec.grid)
    if not isinstance(spec.grid, RangeGrid):
        restored = quantize(x.detach(), spec, fit).dequantize().to(x.dtype)
        return x + (restored - x).detach()
    x_GK = spec.granularity.split(x)
    return spec.granularity.join(spec.grid.fake(x_GK, fit(x_GK, spec.grid)), tuple(x.shape))  # pyright: ignore[reportArgumentType]
