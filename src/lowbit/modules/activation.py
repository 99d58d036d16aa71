"""How a linear's input is quantized at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.layouts import Layout, pack_qtensor, packed_layout, unpack_qtensor
from lowbit.numerics import Affine, PerCluster, PerInput, PerTensor, Spec, extremes, serializable
from lowbit.numerics.grids import RangeGrid


@serializable
@dataclass(frozen=True)
class ActSpec:
    """The format of an activation ``[..., I]``.

    Args:
        spec: grid and granularity. Scales are rounded as ``stats`` says, where it says anything; static ones are then
            stored so, and in float32 otherwise. ``scale_dtype`` does not apply.
        static: parameters are fixed before (calibrated) and stored; otherwise the extremes of each call's granules.
        threshold: channels in which any token of a call has at least this magnitude are not quantized in that call, and
            their elements over it are in no range (LLM.int8(), arXiv:2208.07339); 0: none are.

    Raises:
        ValueError: static with a granularity whose number of granules depends on the number of tokens, or with a
            threshold; a threshold that is negative or not finite.
    """

    spec: Spec
    static: bool = False
    threshold: float = 0.0

    def __post_init__(self):
        if not isinstance(self.spec, Spec) or not isinstance(self.spec.grid, RangeGrid):
            raise ValueError(f"an activation needs a Spec with a grid that a range places, found {self.spec!r}")
        if self.static and not isinstance(self.spec.granularity, PerTensor | PerCluster | PerInput):
            raise ValueError(
                f"static activation ranges are per tensor, per cluster or per input channel, found {self.spec.granularity}: "
                "it has a range for each token, which only a dynamic activation can"
            )
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"the threshold of outlier channels is a magnitude, or 0 for none, found {self.threshold}")
        if self.static and self.threshold:
            raise ValueError(
                f"a static activation range was measured with its outliers in it, so none over {self.threshold:g} can be taken "
                "out at run time; use a dynamic activation, or threshold 0"
            )


def quantize_activation(x: Tensor, act: ActSpec, params: Affine | None = None) -> tuple[Tensor, Affine]:
    """Codes (uint8, shape of x) and parameters (float32 ``[G, 1]``); ``params`` are given exactly if ``act.static``."""
    return kernels.quantize_activation(x, act.spec, _given(act, params), act.threshold)


def fake_quantize_activation(x: Tensor, act: ActSpec, params: Affine | None = None) -> Tensor:
    """``x`` as the quantized linear sees it: decode(encode(x)), in float32 (float64 stays float64).

    NaN stays NaN. Differentiable, see :func:`lowbit.kernels.fake_quantize_activation`.
    """
    return kernels.fake_quantize_activation(x, act.spec, _given(act, params), act.threshold)


def fake_activation(x: Tensor, act: ActSpec | None, params: Affine | None) -> Tensor:
    """``x`` as a linear quantized with ``act`` (None: not at all) will read it, in the dtype of ``x``. Differentiable.

    A static activation whose ``params`` are not known yet is quantized by the range of the call.
    """
    if act is None:
        return x
    fake = kernels.fake_quantize_activation(x, act.spec, params if act.static else None, act.threshold)
    return fake.to(x.dtype)


def static_params(act: ActSpec, bounds_2I: Tensor, share_G1: Tensor | float = 1.0) -> Affine:
    """Parameters of a static activation, as they are stored, for an input whose channels have these extremes.

    Args:
        bounds_2I: lowest and highest value of every channel.
        share_G1: the part of each granule's range that the parameters reach, at both ends.
    """
    spec = act.spec
    lo, hi = extremes(spec.granularity.split(bounds_2I.float()))
    columns = spec.granularity.param_shape((1, bounds_2I.shape[1]))[1]
    return spec.as_stored(spec.grid.from_range(lo * share_G1, hi * share_G1), columns)  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


# Static parameters as buffers: act_scale, act_zero; act_scale_codes, act_scale_scale, ... where the spec quantizes scales


def static_layout(act: ActSpec | None, columns: int) -> Layout:
    """Shape and dtype of each buffer in which the static parameters for inputs of ``columns`` channels are stored."""
    if act is None or not act.static:
        return {}
    high, wide = act.spec.granularity.param_shape((1, columns))
    of_zero: Layout = {"act_zero": ((high, wide), torch.float32)} if len(act.spec.grid.fields) > 1 else {}
    if act.spec.stats is None:
        return {"act_scale": ((high, wide), torch.float32)} | of_zero
    return packed_layout(act.spec.stats, (wide, high), "act_scale_") | of_zero


def pack_static(act: ActSpec, params: Affine, columns: int) -> dict[str, Tensor]:
    """Static parameters (leading axis G) as the buffers of :func:`static_layout`.

    Raises:
        ValueError: scales that ``act.spec.stats`` does not hold (they were not passed through ``Spec.as_stored``).
    """
    spec = act.spec
    shape = spec.granularity.param_shape((1, columns))
    zero = {} if params.zero is None else {"act_zero": params.zero.float().reshape(shape).clone()}
    scale = params.scale.float()
    if spec.stats is None:
        return {"act_scale": scale.reshape(shape).clone()} | zero
    second = spec.second_level(scale.reshape(-1, 1), shape[1])
    if not torch.equal(spec.from_second(second, spec.grid.fields[0]), scale.reshape(-1, 1)):
        raise ValueError(
            "static activation scales are not as the format stores them; pass them through Spec.as_stored first"
        )
    return pack_qtensor(second, "act_scale_") | zero


def unpack_static(act: ActSpec | None, tensors: Mapping[str, Tensor], columns: int) -> Affine | None:
    """What :func:`pack_static` stored, float32 ``[G, 1]``; None where the activation is not static."""
    if act is None or not act.static:
        return None
    zero = tensors["act_zero"].reshape(-1, 1) if "act_zero" in tensors else None
    if act.spec.stats is None:
        return Affine(tensors["act_scale"].reshape(-1, 1), zero)
    high, wide = act.spec.granularity.param_shape((1, columns))
    second = unpack_qtensor(tensors, act.spec.stats, (wide, high), "act_scale_")
    return Affine(act.spec.from_second(second, act.spec.grid.fields[0]), zero)


def _given(act: ActSpec, params: Affine | None) -> Affine | None:
    if act.static != (params is not None):
        raise ValueError(
            "a static activation needs its calibrated parameters"
            if act.static
            else "parameters were given for a dynamic activation, which fits its own; set static=True to use them"
        )
    return params
