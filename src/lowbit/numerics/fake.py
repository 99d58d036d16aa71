"""Quantization as searches and learning see it: floating, and differentiable.

Law: with the same fit, :func:`fake_quantize` is the dequantized :class:`~lowbit.numerics.QTensor`, bit for bit in float32. What a
solver adds to that (errors fed back, weights kept apart, a fit weighed by importance) is not simulated.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.numerics.binary_coding import Alternating
from lowbit.numerics.fit import Fit, KMeans, MinMax
from lowbit.numerics.grids.base import Grid, RangeGrid, straight_through
from lowbit.numerics.qtensor import quantize
from lowbit.numerics.spec import Spec


def usual_fit(grid: Grid) -> Fit:
    """What places ``grid`` where no recipe says how: the first of the plain fits that can."""
    return next(fit for fit in (MinMax(), KMeans(), Alternating()) if fit.why_not(grid) is None)


def fake_quantize(x: Tensor, spec: Spec, fit: Fit | None = None) -> Tensor:
    """``x`` ``[..., I]`` as ``spec`` restores it, in the dtype of ``x``.

    Gradients reach ``x``, straight through the rounding, and, on grids that ranges place, the parameters of ``fit`` (None:
    :func:`usual_fit`), straight through the rounding to how they are stored. Where a parameter does not fit its storage, or ``x``
    is not finite, the result on such a grid is not finite either.
    """
    fit = fit or usual_fit(spec.grid)
    if not isinstance(spec.grid, RangeGrid):
        return straight_through(quantize(x.detach(), spec, fit).dequantize().to(x.dtype), x)
    shape, x_GK = tuple(x.shape), spec.granularity.split(x)
    placed = fit(x_GK, spec.grid)  # pyright: ignore[reportArgumentType]
    raw = placed._make(None if p is None else p.detach() for p in placed)
    stored = spec.as_stored(raw, spec.granularity.param_shape(shape)[1], check=False)
    pairs = zip(stored, placed, strict=True)
    params = placed._make(None if p is None or s is None else straight_through(s, p) for s, p in pairs)
    return spec.granularity.join(spec.grid.fake(x_GK, params), shape)  # pyright: ignore[reportArgumentType]
