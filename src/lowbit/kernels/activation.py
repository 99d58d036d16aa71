"""Quantization of activations at run time.

Dynamic parameters are the extremes of each granule of this very call, in float32; nothing is stored, so they are rounded
only where the format quantizes its scales (``stats``), as its hardware does. Static ones were fitted before and are given. Values that are NaN stay NaN: a saturating cast would turn a
broken model into one that looks healthy. An infinite value makes its dynamic granule NaN; a static range clips it.

With a ``threshold`` (LLM.int8(), arXiv:2208.07339) the channels in which any token of the call reaches it are taken out:
their codes are those of zero, and who multiplies adds their product in floating point. Elements that reach it are kept
out of the ranges, one by one, so that small values of such a channel still count. Which channels these are depends on
all tokens of the call together: a sequence may give other numbers beside another one than by itself.

Shapes: G granule, K element within a granule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics import Affine, MinMax, PerCluster, PerInput, Spec, straight_through
from lowbit.numerics.grids.base import OF_NOTHING


def outlier_channels(x: Tensor, threshold: float) -> Tensor:
    """Channels of ``x`` ``[..., I]`` in which any token has at least the magnitude ``threshold``, int64 ``[k]``, rising.

    None where ``threshold`` is 0, which means that there is none. NaN reaches no threshold, infinity every one.
    """
    if not threshold:
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    return (x.abs() >= threshold).flatten(0, -2).any(0).nonzero()[:, 0]


def without_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """What ranges are fitted to, what is encoded, and the :func:`outlier_channels`.

    The first two have the shape of ``x`` ``[..., I]``, with zero in place of the elements that reach ``threshold``, and in
    place of all elements of their channels; they are ``x`` itself where there are none. Differentiable.
    """
    taken = outlier_channels(x, threshold)
    if not len(taken):
        return x, x, taken
    return x.masked_fill(x.abs() >= threshold, 0), x.index_fill(-1, taken, 0), taken


def dynamic_params(x: Tensor, spec: Spec) -> Affine:
    """Parameters ``[G, 1]`` that reach the extremes of every granule of ``x`` ``[..., I]``; a NaN scale where it holds NaN or
    infinity."""
    x_GK = spec.granularity.split(x)
    params = MinMax()(x_GK, spec.grid)  # pyright: ignore[reportArgumentType]
    finite = torch.isfinite(x_GK).all(1, keepdim=True)
    if spec.stats is not None and len(x_GK):  # NaN and Inf are out of sight of the second level's own range
        seen = params._make(None if p is None else p.detach().where(finite, OF_NOTHING) for p in params)
        stored = spec.as_stored(seen, spec.granularity.param_shape(tuple(x.shape))[1])
        params = params._replace(scale=straight_through(stored[0], params.scale))
    return params._replace(scale=torch.where(finite, params.scale, torch.full_like(params.scale, torch.nan)))


def quantize_activation(
    x: Tensor, spec: Spec, params: Affine | None = None, threshold: float = 0.0
) -> tuple[Tensor, Affine]:
    """Codes (uint8, the shape of ``x`` ``[..., I]``) and parameters (float32, ``[G, 1]``) of ``x``.

    Args:
        x: floating, of any dtype; computed in float32 (float64 stays).
        spec: grid, granularity and ``stats``; its ``scale_dtype`` does not apply to activations.
        params: static parameters, or None to fit them to ``x``.
        threshold: channels that reach it get the code of zero; 0: none does.

    Returns:
        The codes and the parameters that decode them. Dynamic parameters of a granule that holds NaN or Inf are NaN;
        under static ones NaN cannot be seen in the codes, so kernels that use codes alone have to look for it.
    """
    ranged, x, _ = without_outliers(_wide(x), threshold)
    if params is not None and isinstance(spec.granularity, PerCluster | PerInput):
        return spec.grid.encode(x, _of_channels(spec.granularity, params, x.dtype)), _as(params, x.dtype)
    if params is None:
        params = dynamic_params(ranged, spec)
    else:
        params = _as(params, x.dtype)
    codes_GK = spec.grid.encode(spec.granularity.split(x), params)
    return spec.granularity.join(codes_GK, tuple(x.shape)), params


def fake_quantize_activation(x: Tensor, spec: Spec, params: Affine | None = None, threshold: float = 0.0) -> Tensor:
    """``x`` after quantization and back: decode(encode(x)), in float32 (float64 stays float64).

    Channels that reach ``threshold`` come back as they are: what is multiplied beside the codes, in the same product.
    Differentiable, straight through the rounding, in ``x``, in static parameters and in dynamic ranges.
    """
    wide = _wide(x)
    ranged, kept, taken = without_outliers(wide, threshold)
    if params is not None and isinstance(spec.granularity, PerCluster | PerInput):
        values = spec.grid.fake(kept, _of_channels(spec.granularity, params, wide.dtype))  # pyright: ignore[reportAttributeAccessIssue]
    else:
        params = dynamic_params(ranged, spec) if params is None else _as(params, wide.dtype)
        values_GK = spec.grid.fake(spec.granularity.split(kept), params)  # pyright: ignore[reportAttributeAccessIssue]
        values = spec.granularity.join(values_GK, tuple(x.shape))
    if len(taken):
        values = values.index_copy(-1, taken, wide.index_select(-1, taken))
    return values.masked_fill(wide.isnan(), torch.nan)


def _as(params: Affine, dtype: torch.dtype) -> Affine:
    return Affine(params.scale.to(dtype), None if params.zero is None else params.zero.to(dtype))


def _of_channels(grain: PerCluster | PerInput, params: Affine, dtype: torch.dtype) -> Affine:
    """Parameters at every channel, ``[I]``: grids act on each element alone, so the codes are those of the granules."""
    zero = None if params.zero is None else grain.spread(params.zero)
    return _as(Affine(grain.spread(params.scale), zero), dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
