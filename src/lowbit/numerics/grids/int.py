"""Uniform integer grids of 1 to 8 bits, symmetric or with a zero point.

Conventions differ between codes. Here:

* asymmetric, as in GPTQ's reference code: the range contains zero, the step is ``(hi - lo) / (2**b - 1)``, and
  ``code = clamp(round(w / step) + zero)`` with an integer zero in the code range;
* symmetric, as in SmoothQuant's: the step is ``absmax / (2**(b-1) - 1)``, so both extremes are representable;
* symmetric with ``full``, as in DeepSpeed's: the step is ``absmax / 2**(b-1)``.

Rounding is half to even. A one-bit symmetric grid is ``{-absmax, +absmax}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowbit.numerics.compiled_fake import evenly_spaced
from lowbit.numerics.grids.base import OF_NOTHING, Affine, Field
from lowbit.numerics.serialize import serializable


def round_ste(x: Tensor) -> Tensor:
    """``x.round()`` with the gradient of the identity."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


@serializable
@dataclass(frozen=True)
class Int:
    """``2**bits`` evenly spaced numbers.

    Args:
        bits: 1 to 8.
        symmetric: levels are symmetric around zero and no zero point is stored.
        zero: ``"int"``: the zero point is a code (b bits stored). ``"real"``: it is a real number (floating, or quantized
            by the spec's ``stats``). Ignored when symmetric.
        full: only if symmetric, from 2 bits: the lowest code is ``-absmax``, so every code is used and the step is smaller;
            values over ``absmax * (1 - 2**(1-b))`` are clipped to it.
        reach: share of the range that the levels span, above 0 and at most 1; values outside are clipped.
    """

    bits: int
    symmetric: bool = False
    zero: Literal["int", "real"] = "int"
    full: bool = False
    reach: float = 1.0
    kind: ClassVar[Any] = Affine

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"an integer grid has 1 to 8 bits, found {self.bits}")
        if self.zero not in ("int", "real"):
            raise ValueError(f"zero is 'int' or 'real', found {self.zero!r}")
        if self.full and (not self.symmetric or self.bits == 1):
            raise ValueError(f"full needs a symmetric grid of 2 or more bits, found {self}")
        if not 0 < self.reach <= 1:
            raise ValueError(f"reach is a share of the range, above 0 and at most 1, found {self.reach}")

    @property
    def fields(self) -> tuple[Field, ...]:
        scale, bits = Field("scale", floored=True), self.bits if self.zero == "int" else None
        return (scale,) if self.symmetric else (scale, Field("zero", bits=bits, in_levels=True))

    @property
    def real_zero(self) -> bool:
        """Whether the zero point is a stored real number."""
        return not self.symmetric and self.zero == "real"

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> float:
        """The level of zero in a grid without zero points."""
        return 0.5 if self.bits == 1 else 2.0 ** (self.bits - 1)

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Affine:
        if self.reach != 1:
            lo_G1, hi_G1 = lo_G1 * self.reach, hi_G1 * self.reach
        if self.symmetric:
            absmax = torch.maximum(lo_G1.abs(), hi_G1.abs())
            scale = absmax * 2 if self.bits == 1 else absmax / (self.max_code // 2 + self.full)
            return Affine(torch.where(scale > 0, scale, torch.full_like(scale, OF_NOTHING)))
        lo, hi = (lo_G1, hi_G1) if self.zero == "real" else (lo_G1.clamp(max=0), hi_G1.clamp(min=0))
        scale = (hi - lo) / self.max_code
        # A granule with a single value has no range; step = |value| represents that value and zero exactly. The same step
        # serves nearly equal values, whose real zero point would be too large for the resolution of float16, its storage.
        flat = scale <= (torch.maximum(lo.abs(), hi.abs()) * 2.0**-15 if self.zero == "real" else 0)
        scale = torch.where(flat, torch.where(hi != 0, hi.abs(), torch.full_like(hi, OF_NOTHING)), scale)
        zero = -lo / scale
        if self.zero == "int":
            zero = zero.round().clamp(0, self.max_code)
        return Affine(scale, zero)

    def zero_point(self, params: Affine) -> Tensor | float:
        """The level (in code units) of the value zero."""
        return self.middle if params.zero is None else params.zero

    def encode(self, x_GK: Tensor, params: Affine) -> Tensor:
        return self._level(x_GK / params.scale, params, torch.round).to(torch.uint8)

    def _level(self, v: Tensor, params: Affine, rounding) -> Tensor:
        zero = self.zero_point(params)
        whole = params.zero is not None and self.zero == "int"
        # round(w/s) + z and round(w/s + z) differ at ties and when z is not whole; integer zero points use the first.
        level = rounding(v) + zero if whole else rounding(v + zero)
        return level.clamp(0, self.max_code)

    def decode(self, codes_GK: Tensor, params: Affine) -> Tensor:
        return (codes_GK.to(params.scale.dtype) - self.zero_point(params)) * params.scale

    def fake(self, x_GK: Tensor, params: Affine) -> Tensor:
        whole = params.zero is not None and self.zero == "int"
        compiled = evenly_spaced(x_GK, params.scale, params.zero, self.max_code, self.middle, whole)
        if compiled is not None:
            return compiled
        return (self._level(x_GK / params.scale, params, round_ste) - self.zero_point(params)) * params.scale
