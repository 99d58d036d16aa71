"""Quantization as searches and learning see it: floating, differentiable, and equal to what will be stored.

Nothing here is ever saved or run by a user; :mod:`lowbit.modules` does that. Law: with the same clip shares,
:func:`fake_weight` is the dequantized weight of a round-to-nearest :class:`~lowbit.numerics.QTensor` up to the rounding
of scales to their storage dtype. What a solver adds to that (errors fed back, weights kept apart, a fit weighed by
importance) is not simulated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lowbit.modules import ActSpec
from lowbit.numerics import (
    Alternating,
    Clipped,
    Fit,
    Fixed,
    Grid,
    KMeans,
    MinMax,
    Params,
    PerCluster,
    RangeGrid,
    Spec,
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
    """``x`` as a linear quantized with ``act`` will see it; the static range where one is known, else the call's own."""
    if act is None:
        return x
    if act.static and params is not None:
        grain = act.spec.granularity
        if isinstance(grain, PerCluster):
            at_channels = params._make(None if p is None else grain.spread(p) for p in params)  # pyright: ignore[reportArgumentType]
            return act.spec.grid.fake(x, at_channels)  # pyright: ignore[reportAttributeAccessIssue]
        return grain.join(act.spec.grid.fake(grain.split(x), params), tuple(x.shape))  # pyright: ignore[reportAttributeAccessIssue]
    return fake_quantize(x, act.spec, MinMax())


def simulated(state: BlockState, path: str, transform: ChannelTransform | None = None) -> Callable[[Tensor], Tensor]:
    """What linear ``path`` will compute from its present input once ``transform`` is folded in and it is quantized."""
    linear, form = state.linear(path), state.formats[path]
    w, b = state.weight_OI(path), linear.bias
    if transform is not None:
        w, b = transform.fold_in(w, b)  # pyright: ignore[reportArgumentType]
    w = fake_weight(w, form.weight, state.clip.get(path))

    def forward(x: Tensor) -> Tensor:
        x = x if transform is None else transform.forward(x)
        return F.linear(fake_activation(x, form.act, state.act_params.get(path)), w, b)  # pyright: ignore[reportArgumentType]

    return forward
