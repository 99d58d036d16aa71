"""A quantized tensor: codes, parameters, and the format that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lowbit.numerics.fit import Fit
from lowbit.numerics.granularity import Shape
from lowbit.numerics.grids.base import Affine, Params
from lowbit.numerics.spec import Spec, fit_params


@dataclass(frozen=True)
class QTensor:
    """Codes ``[O, I]`` (uint8, one a byte: packing is :mod:`lowbit.layouts`) with parameters as stored (leading axis G)."""

    codes: Tensor
    params: Params
    spec: Spec

    @property
    def shape(self) -> Shape:
        return tuple(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, of ``shape``. Computed in float32 and then cast."""
        params = Affine(*(None if p is None else p.float() for p in self.params))  # pyright: ignore[reportArgumentType]
        codes_GK = self.spec.granularity.split(self.codes)
        return self.spec.granularity.join(self.spec.grid.decode(codes_GK, params), self.shape).to(dtype)

    @property
    def stored_bits(self) -> int:
        """Every bit on disk: codes (each row padded to whole bytes, as the layout pads it), scales and zero points."""
        return stored_bits(self.spec, self.shape)

    @property
    def bits_per_weight(self) -> float:
        """``stored_bits`` over the number of weights."""
        return self.stored_bits / prod(self.shape)


def stored_bits(spec: Spec, shape: Shape) -> int:
    """Bits that a tensor of ``shape`` takes on disk in ``spec``. Needs no data, so a plan can use it."""

    def packed(rows: int, columns: int, bits: int) -> int:
        return rows * (-(-columns * bits // 8)) * 8

    rows, columns = prod(shape[:-1]), shape[-1]
    high, wide = spec.granularity.param_shape(shape)
    real = (
        spec.torch_scale_dtype.itemsize * 8 * high * wide
        if spec.stats is None
        else stored_bits(spec.stats, (wide, high))
    )
    zero_bits = spec.grid.zero_bits
    zeros = real if zero_bits is None else packed(1, high * wide, zero_bits) if zero_bits else 0
    return packed(rows, columns, spec.grid.bits) + real + zeros


def quantize(x: Tensor, spec: Spec, fit: Fit, importance: Tensor | None = None) -> QTensor:
    """Round-to-nearest: fits parameters to ``x`` ``[..., I]``, then takes the nearest code of each element.

    Raises:
        ValueError: NaN or Inf in ``x``, or a scale that the format cannot store.
    """
    if not torch.isfinite(x).all():
        raise ValueError(f"cannot quantize {int((~torch.isfinite(x)).sum())} values that are NaN or Inf")
    params = fit_params(x, spec, fit, importance)
    codes_GK = spec.grid.encode(spec.granularity.split(x), params)
    return QTensor(spec.granularity.join(codes_GK, tuple(x.shape)).contiguous(), params, spec)
