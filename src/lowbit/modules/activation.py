"""How a linear's input is quantized at run time."""

from __future__ import annotations

import math
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
        if self.static and not isinstance(self.spec.granularity, PerTensor | PerCluster):
            raise ValueError(
                f"static activation ranges are per tensor or per cluster, found {self.spec.granularity}: "
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

    NaN stays NaN. Not differentiable; learning has :func:`lowbit.numerics.fake_quantize`.
    """
    return kernels.fake_quantize_activation(x, act.spec, _given(act, params), act.threshold)


def _given(act: ActSpec, params: Affine | None) -> Affine | None:
    if act.static != (params is not None):
        raise ValueError(
            "a static activation needs its calibrated parameters"
            if act.static
            else "parameters were given for a dynamic activation, which fits its own; set static=True to use them"
        )
    return params
