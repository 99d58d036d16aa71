"""Quantization of activations at run time.

Dynamic parameters are the extremes of each granule of one call, in float32. They are not stored, so they are rounded only
if the format quantizes its scales (``stats``), as its hardware does. Static parameters are fitted before and given.

NaN stays NaN: a saturating cast would make a broken model look healthy. An infinite value makes its dynamic granule NaN; a
static range clips it.

With a ``threshold`` (LLM.int8(), arXiv:2208.07339), channels that reach it in any token of the call are taken out. Their
codes are those of zero, and the kernel adds their product in floating point. Ranges ignore only the elements that reach
the threshold, so small values of such a channel still count. All tokens of a call choose the channels together, so the
result for a sequence can depend on the other sequences in its batch.

Shapes: G granule, K element within a granule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics import Affine, PerCluster, PerInput, Spec, extremes, straight_through
from lowbit.numerics.grids.base import OF_NOTHING


def outlier_channels(x: Tensor, threshold: float) -> Tensor:
    """Channels of ``x`` in which any token has at least the magnitude ``threshold``.

    Args:
        x: ``[..., I]``.
        threshold: 0: no channel. NaN reaches no threshold, infinity reaches every one.

    Returns:
        Channel numbers, int64 ``[k]``, rising.
    """
    if not threshold:
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    return (x.abs() >= threshold).flatten(0, -2).any(0).nonzero()[:, 0]


def without_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Separates ``x`` ``[..., I]`` from its outliers. Differentiable.

    Returns:
        The values for fitting ranges: ``x`` with zero for elements that reach ``threshold``.
        The values to encode: ``x`` with zero for whole :func:`outlier_channels`.
        The outlier channels. Without any, the first two are ``x`` itself.
    """
    taken = outlier_channels(x, threshold)
    if not len(taken):
        return x, x, taken
    return x.masked_fill(x.abs() >= threshold, 0), x.index_fill(-1, taken, 0), taken


def dynamic_params(x: Tensor, spec: Spec) -> Affine:
    """Parameters ``[G, 1]`` that cover each granule of ``x`` ``[..., I]``; granules with NaN or infinity get a NaN scale."""
    x_GK = spec.granularity.split(x)
    lo_G1, hi_G1 = extremes(x_GK)
    params = spec.grid.from_range(lo_G1, hi_G1)  # pyright: ignore[reportAttributeAccessIssue]
    finite = torch.isfinite(lo_G1) & torch.isfinite(hi_G1)  # extremes show NaN
    if spec.stats is not None and len(x_GK):  # the range of the second level must not see NaN and Inf
        seen = params._make(None if p is None else p.detach().where(finite, OF_NOTHING) for p in params)
        stored = spec.as_stored(seen, spec.granularity.param_shape(tuple(x.shape))[1])
        assert isinstance(stored, Affine)
        params = params._replace(scale=straight_through(stored.scale, params.scale))
    return params._replace(scale=torch.where(finite, params.scale, torch.full_like(params.scale, torch.nan)))


def quantize_activation(
    x: Tensor, spec: Spec, params: Affine | None = None, threshold: float = 0.0
) -> tuple[Tensor, Affine]:
    """Codes (uint8, the shape of ``x`` ``[..., I]``) and parameters (float32, ``[G, 1]``) of ``x``.

    Args:
        x: floating, of any dtype; computed in float32 (float64 stays).
        spec: grid, granularity and ``stats``; its ``scale_dtype`` does not apply to activations.
        params: static parameters, or None to fit them to ``x``.
        threshold: channels that reach it get the code of zero; 0: no channel.

    Returns:
        The codes and the parameters that decode them. A granule with NaN or Inf has NaN as dynamic parameters. With static
        parameters the codes do not show NaN, so kernels that read only codes must check the input.
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
    """``x`` quantized and decoded: decode(encode(x)), in float32 (float64 for float64 inputs).

    Channels that reach ``threshold`` are unchanged, as kernels multiply them in floating point. Gradients pass the rounding
    straight through to ``x``, to static parameters and to dynamic ranges.
    """
    wide, given = _wide(x), params
    ranged, kept, taken = without_outliers(wide, threshold)
    if params is not None and isinstance(spec.granularity, PerCluster | PerInput):
        values = spec.grid.fake(kept, _of_channels(spec.granularity, params, wide.dtype))  # pyright: ignore[reportAttributeAccessIssue]
    else:
        params = dynamic_params(ranged, spec) if params is None else _as(params, wide.dtype)
        values_GK = spec.grid.fake(spec.granularity.split(kept), params)  # pyright: ignore[reportAttributeAccessIssue]
        values = spec.granularity.join(values_GK, tuple(x.shape))
    if len(taken):
        values = values.index_copy(-1, taken, wide.index_select(-1, taken))
    return values if given is None else values.masked_fill(wide.isnan(), torch.nan)  # dynamic scales are NaN already


def _as(params: Affine, dtype: torch.dtype) -> Affine:
    return Affine(params.scale.to(dtype), None if params.zero is None else params.zero.to(dtype))


def _of_channels(grain: PerCluster | PerInput, params: Affine, dtype: torch.dtype) -> Affine:
    """Parameters at every channel, ``[I]``: grids code each element alone, so the codes equal those of the granules."""
    zero = None if params.zero is None else grain.spread(params.zero)
    return _as(Affine(grain.spread(params.scale), zero), dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
