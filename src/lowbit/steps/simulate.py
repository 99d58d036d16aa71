"""Quantization as searches and learning see it: floating, differentiable, and equal to what will be stored.

Nothing here is ever saved or run by a user; :mod:`lowbit.modules` does that. Law: with the same clip shares,
:func:`fake_weight` is the dequantized weight of a round-to-nearest :class:`~lowbit.numerics.QTensor` up to the rounding
of scales to their storage dtype. What a solver adds to that (errors fed back, weights kept apart, a fit weighed by
importance) is not simulated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels import without_outliers
from lowbit.modules import ActSpec
from lowbit.numerics import (
    Affine,
    Alternating,
    Clipped,
    Fit,
    Fixed,
    Grid,
    KMeans,
    MinMax,
    Params,
    PerCluster,
    PerInput,
    RangeGrid,
    Spec,
    extremes,
    fake_quantize,
    quantize,
)
from lowbit.steps.state import BlockState
from lowbit.transforms import ChannelTransform


def fake_weight(w_OI: Tensor, spec: Spec, clip: Clipped | Fixed | None) -> Tensor:
    """``w_OI`` as it will be restored; gradients reach the weights (straight through) and, on grids that ranges place, the
    clip shares."""
    if isinstance(spec.grid, RangeGrid):
        return fake_quantize(w_OI, spec, clip or MinMax())
    restored = quantize(w_OI.detach(), spec, clip or usual_fit(spec.grid)).dequantize().to(w_OI.dtype)
    return w_OI + (restored - w_OI).detach()


def usual_fit(grid: Grid) -> Fit:
    """What places ``grid`` where no recipe says how: the first of the plain fits that can."""
    return next(fit for fit in (MinMax(), KMeans(), Alternating()) if fit.why_not(grid) is None)


def fake_activation(x: Tensor, act: ActSpec | None, params: Params | None) -> Tensor:
    """``x`` as a linear quantized with ``act`` will see it; the static range where one is known, else the call's own.

    Computed in float32 at least, as at run time, whatever type products are in.
    """
    if act is None:
        return x
    return _rounded(x.to(torch.promote_types(x.dtype, torch.float32)), act, params).to(x.dtype)


def _rounded(x: Tensor, act: ActSpec, params: Params | None) -> Tensor:
    spec, shape = act.spec, tuple(x.shape)
    if act.static and params is not None and isinstance(spec.granularity, PerCluster | PerInput):
        at_channels = params._make(None if p is None else spec.granularity.spread(p) for p in params)  # pyright: ignore[reportArgumentType]
        return spec.grid.fake(x, at_channels)  # pyright: ignore[reportAttributeAccessIssue]
    ranged, kept, taken = without_outliers(x, act.threshold)
    if not act.static or params is None:
        params = MinMax()(spec.granularity.split(ranged), spec.grid)  # pyright: ignore[reportArgumentType]
        if spec.stats is not None:  # straight through the rounding of scales
            raw = params._make(None if p is None else p.detach().nan_to_num() for p in params)
            stored = spec.as_stored(raw, spec.granularity.param_shape(shape)[1])
            params = params._replace(scale=params.scale + (stored[0] - params.scale).detach())
    fake = spec.grid.fake(spec.granularity.split(kept), params)  # pyright: ignore[reportAttributeAccessIssue]
    rounded = spec.granularity.join(fake, shape)
    if not len(taken):
        return rounded
    return rounded.index_copy(-1, taken, x.index_select(-1, taken).to(rounded.dtype))


def static_params(act: ActSpec, bounds_2I: Tensor, share_G1: Tensor | float = 1.0) -> Affine:
    """Parameters of a static activation, as they are stored, for an input whose channels have these extremes, of which every
    granule's range reaches ``share_G1``."""
    spec = act.spec
    lo, hi = extremes(spec.granularity.split(bounds_2I.float()))
    columns = spec.granularity.param_shape((1, bounds_2I.shape[1]))[1]
    return spec.as_stored(spec.grid.from_range(lo * share_G1, hi * share_G1), columns)  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def simulated(
    state: BlockState, path: str, transform: ChannelTransform | None = None, bounds_2I: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """What linear ``path`` will compute from its present input once ``transform`` is folded in and it is quantized.

    bounds_2I: the extremes of its present input's channels. A static activation whose range is not set yet is quantized by the
    range that they will have then; without them, by that of each call.
    """
    linear, form = state.linear(path), state.formats[path]
    w, b = state.weight_OI(path), linear.bias
    if transform is not None:
        w, b = transform.fold_in(w, b)  # pyright: ignore[reportArgumentType]
    w = fake_weight(w, form.weight, state.clip.get(path))
    foreseen = None
    if bounds_2I is not None and form.act is not None and form.act.static:
        foreseen = static_params(form.act, bounds_2I if transform is None else transform.forward(bounds_2I))

    def forward(x: Tensor) -> Tensor:
        x = x if transform is None else transform.forward(x)
        return F.linear(fake_activation(x, form.act, state.act_params.get(path, foreseen)), w, b)  # pyright: ignore[reportArgumentType]

    return forward
