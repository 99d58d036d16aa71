"""Simulated quantization for searches and learning: floating and differentiable.

Law: with the same fit, :func:`fake_quantize` is the dequantized :class:`~lowbit.numerics.QTensor`, bit for bit in
float32. The work of a solver (error feedback, kept weights, importance) is not simulated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.binary_coding import Alternating
from lowbit.numerics.fit import Fit, KMeans, MinMax, Unfitted
from lowbit.numerics.grids.base import Grid, LearnableGrid, straight_through
from lowbit.numerics.spec import Spec, quantize


def usual_fit(grid: Grid) -> Fit:
    """The fit for ``grid`` when no recipe names one: the first plain fit that can place it."""
    return next(fit for fit in (MinMax(), KMeans(), Alternating(), Unfitted()) if fit.why_not(grid) is None)


def limited(x: Tensor, limit: float | None) -> Tensor:
    """``x`` without gradients where its magnitude is ``limit`` or more."""
    return x if limit is None else torch.where(x.abs() < limit, x, x.detach())


def fake_quantize(x: Tensor, spec: Spec, fit: Fit | None = None, *, through_fit: bool = True) -> Tensor:
    """``x`` as ``spec`` restores it, in the dtype of ``x``.

    Gradients pass the rounding to ``x`` as the grid says, or straight through where it does not say. On grids that ranges
    place they also reach the parameters of ``fit``, straight through their rounding to storage. On a grid that says which
    gradient it has, the result is not finite if a parameter does not fit its storage or ``x`` is not finite.

    Args:
        x: ``[..., I]``.
        spec: the format.
        fit: places the grid; None: :func:`usual_fit`.
        through_fit: gradients of the parameters reach the values that ``fit`` made them of; False: these are constants.
    """
    fit = fit or usual_fit(spec.grid)
    if not isinstance(spec.grid, LearnableGrid):
        return straight_through(quantize(x.detach(), spec, fit).dequantize().to(x.dtype), x)
    shape, x_GK = tuple(x.shape), spec.granularity.split(x)
    filled = None if x_GK.numel() == x.numel() else spec.granularity.split(torch.ones_like(x), fill_zero=True)
    placed = fit(x_GK if through_fit else x_GK.detach(), spec.grid, filled)  # pyright: ignore[reportArgumentType]
    raw = placed._make(None if p is None else p.detach() for p in placed)
    stored = spec.as_stored(raw, spec.granularity.param_shape(shape)[1], check=False)
    pairs = zip(stored, placed, strict=True)
    params = placed._make(None if p is None or s is None else straight_through(s, p) for s, p in pairs)
    return spec.granularity.join(spec.grid.fake(x_GK, params), shape)  # pyright: ignore[reportArgumentType]
