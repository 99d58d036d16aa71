"""How a linear's input is quantized at run time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit import kernels
from lowbit.numerics import Affine, PerCluster, PerTensor, Spec, tagged
from lowbit.numerics.grids import RangeGrid


@tagged
@dataclass(frozen=True)
class ActSpec:
    """The format of an activation ``[..., I]``.

    Args:
        spec: grid and granularity. Nothing is stored of a dynamic activation, so ``stats`` and ``scale_dtype`` do not
            apply; static parameters are stored in float32.
        static: parameters are fixed before (calibrated) and stored; otherwise the extremes of each call's granules.

    Raises:
        ValueError: static with a granularity whose number of granules depends on the number of tokens.
    """

    spec: Spec
    static: bool = False

    def __post_init__(self):
        if not isinstance(self.spec, Spec) or not isinstance(self.spec.grid, RangeGrid):
            raise ValueError(f"an activation needs a Spec with a grid that a range places, found {self.spec!r}")
        if self.static and not isinstance(self.spec.granularity, PerTensor | PerCluster):
            raise ValueError(
                f"static activation ranges are per tensor or per cluster, found {self.spec.granularity}: "
                "it has a range for each token, which only a dynamic activation can"
            )


def quantize_activation(x: Tensor, act: ActSpec, params: Affine | None = None) -> tuple[Tensor, Affine]:
    """Codes (uint8, shape of x) and parameters (float32 ``[G, 1]``); ``params`` are given exactly if ``act.static``."""
    return kernels.quantize_activation(x, act.spec, _given(act, params))


def fake_quantize_activation(x: Tensor, act: ActSpec, params: Affine | None = None) -> Tensor:
    """``x`` as the quantized linear sees it: decode(encode(x)), in float32 (float64 stays float64).

    NaN stays NaN. Not differentiable; learning has :func:`lowbit.numerics.fake_quantize`.
    """
    return kernels.fake_quantize_activation(x, act.spec, _given(act, params))


def _given(act: ActSpec, params: Affine | None) -> Affine | None:
    if act.static != (params is not None):
        raise ValueError(
            "a static activation needs its calibrated parameters"
            if act.static
            else "parameters were given for a dynamic activation, which fits its own; set static=True to use them"
        )
    return params
