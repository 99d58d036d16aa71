"""Quantization of activations at run time.

Dynamic parameters are the extremes of each granule of this very call, in float32 and never rounded, for nothing is
stored. Static ones were fitted before and are given. Values that are NaN stay NaN: a saturating cast would turn a
broken model into one that looks healthy. An infinite value makes its dynamic granule NaN; a static range clips it.

Shapes: G granule, K element within a granule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics import Affine, MinMax, PerCluster, Spec


def quantize_activation(x: Tensor, spec: Spec, params: Affine | None = None) -> tuple[Tensor, Affine]:
    """Codes (uint8, the shape of ``x`` ``[..., I]``) and parameters (float32, ``[G, 1]``) of ``x``.

    Args:
        x: floating, of any dtype; computed in float32 (float64 stays).
        spec: grid and granularity; its ``stats`` and ``scale_dtype`` do not apply to activations.
        params: static parameters, or None to fit them to ``x``.

    Returns:
        The codes and the parameters that decode them. Dynamic parameters of a granule that holds NaN or Inf are NaN;
        under static ones NaN cannot be seen in the codes, so kernels that use codes alone have to look for it.
    """
    x = _wide(x)
    if params is not None and isinstance(spec.granularity, PerCluster):
        return spec.grid.encode(x, _of_channels(spec.granularity, params, x.dtype)), _as(params, x.dtype)
    x_GK = spec.granularity.split(x)
    if params is None:
        params = MinMax()(x_GK, spec.grid)  # pyright: ignore[reportArgumentType]
        finite = torch.isfinite(x_GK).all(1, keepdim=True)
        params = params._replace(scale=torch.where(finite, params.scale, torch.full_like(params.scale, torch.nan)))
    else:
        params = _as(params, x.dtype)
    codes_GK = spec.grid.encode(x_GK, params)
    return spec.granularity.join(codes_GK, tuple(x.shape)), params


def fake_quantize_activation(x: Tensor, spec: Spec, params: Affine | None = None) -> Tensor:
    """``x`` after quantization and back: decode(encode(x)), in float32 (float64 stays float64)."""
    given = params is not None
    codes, params = quantize_activation(x, spec, params)
    if given and isinstance(spec.granularity, PerCluster):
        values = spec.grid.decode(codes, _of_channels(spec.granularity, params, params.scale.dtype))
    else:
        values_GK = spec.grid.decode(spec.granularity.split(codes), params)
        values = spec.granularity.join(values_GK, tuple(x.shape))
    return torch.where(x.isnan(), torch.full_like(values, torch.nan), values)


def _as(params: Affine, dtype: torch.dtype) -> Affine:
    return Affine(params.scale.to(dtype), None if params.zero is None else params.zero.to(dtype))


def _of_channels(clusters: PerCluster, params: Affine, dtype: torch.dtype) -> Affine:
    """Parameters at every channel, ``[I]``: grids act on each element alone, so the codes are those of the clusters."""
    zero = None if params.zero is None else clusters.spread(params.zero)
    return _as(Affine(clusters.spread(params.scale), zero), dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
