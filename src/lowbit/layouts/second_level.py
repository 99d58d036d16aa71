"""Codes of statistics that were quantized before.

A quantized tensor holds its scales as the values that their own format restores; to store them, their codes have to be
found again. Fitting the extremes anew nearly always does it, but not where the first fit, rounded to its storage dtype,
left the top code unused: then the range is a little wider than the values. So ranges that leave 0, 1, 2, ... codes
unused are tried, in float64, each also a float32 step narrower and wider, until every granule is restored bit for bit.

The alternative, to carry codes of statistics through every solver, would put storage into each of them.
Shapes: G granule, K element within a granule.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.numerics import Affine, QTensor, Spec, extremes

_STEP = 2.0**-23  # of float32, relative


def requantize(x: Tensor, spec: Spec) -> QTensor:
    """The quantized tensor that restores ``x``, which ``spec`` restored once; where none is found, the nearest by extremes.

    The caller compares: only it knows which values matter.
    """
    columns = spec.granularity.param_shape(tuple(x.shape))[1]
    x_GK = spec.granularity.split(x)
    lo_G1, hi_G1 = extremes(x_GK.double())
    chosen, lost_G1 = None, torch.ones_like(lo_G1, dtype=torch.bool)
    for stretch in _stretches(spec.grid.bits):
        fitted = spec.grid.from_range(lo_G1 * stretch, hi_G1 * stretch)  # pyright: ignore[reportAttributeAccessIssue]
        params = _cast(spec.as_stored(fitted, columns), x.dtype)
        exact_G1 = (spec.grid.decode(spec.grid.encode(x_GK, params), params) == x_GK).all(1, keepdim=True)
        chosen = params if chosen is None else _where(lost_G1 & exact_G1, params, chosen)
        lost_G1 = lost_G1 & ~exact_G1
        if not lost_G1.any():
            break
    assert chosen is not None
    return QTensor(spec.granularity.join(spec.grid.encode(x_GK, chosen), tuple(x.shape)), chosen, spec)


def _stretches(bits: int) -> Iterator[float]:
    top = 2**bits - 1
    for unused in range(top):
        for step in (0, 0.5, -0.5, 1, -1):
            yield top / (top - unused) * (1 + step * _STEP)


def _cast(params: Affine, dtype: torch.dtype) -> Affine:
    return Affine(params.scale.to(dtype), None if params.zero is None else params.zero.to(dtype))


def _where(mask_G1: Tensor, a: Affine, b: Affine) -> Affine:
    zero = None if a.zero is None or b.zero is None else torch.where(mask_G1, a.zero, b.zero)
    return Affine(torch.where(mask_G1, a.scale, b.scale), zero)
