"""A quantized tensor: codes, parameters, and the format that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from lowbit.numerics.fit import Fit
from lowbit.numerics.granularity import Shape
from lowbit.numerics.grids.base import Params
from lowbit.numerics.spec import Spec, fit_raw


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes with their parameters as stored; :meth:`fitted` makes one.

    Args:
        codes: uint8 ``[O, I]``, one code in each byte; :mod:`lowbit.layouts` packs them.
        params: leading axis G.
        spec: the format.
        second: if the spec quantizes statistics, each floating parameter by name as it is stored; ``params`` holds the values
            that these restore.
        mean: float32 scalar added to every value; only for a centred second level.
    """

    codes: Tensor
    params: Params
    spec: Spec
    second: Mapping[str, QTensor] = field(default_factory=dict)
    mean: Tensor | None = None

    @staticmethod
    def fitted(codes: Tensor, raw: Params, spec: Spec) -> QTensor:
        """A quantized tensor from codes and parameters as fitted.

        Args:
            codes: uint8 ``[O, I]``, chosen under ``spec.as_stored(raw)``.
            raw: parameters before they are rounded to storage.
            spec: the format.
        """
        columns = spec.granularity.param_shape(tuple(codes.shape))[1]
        if spec.stats is None:
            return QTensor(codes, spec.as_stored(raw, columns), spec)
        values = raw._asdict()
        second = {f.name: spec.second_level(values[f.name], columns) for f in spec.grid.fields if f.bits is None}
        restored = {
            f.name: spec.from_second(second[f.name], f).to(values[f.name].dtype)
            for f in spec.grid.fields
            if f.bits is None
        }
        return QTensor(codes, spec.grid.kind(**{**values, **restored}), spec, second)

    @property
    def shape(self) -> Shape:
        return tuple(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, of ``shape``. Computed in float32 and then cast."""
        params = self.params._make(None if p is None else p.float() for p in self.params)
        codes_GK = self.spec.granularity.split(self.codes)
        x = self.spec.granularity.join(self.spec.grid.decode(codes_GK, params), self.shape)  # pyright: ignore[reportArgumentType]
        return (x if self.mean is None else x + self.mean).to(dtype)

    @property
    def stored_bits(self) -> int:
        """Bits on disk: codes (the layout pads each row to whole bytes) and parameters."""
        return stored_bits(self.spec, self.shape)

    @property
    def bits_per_weight(self) -> float:
        """``stored_bits`` divided by the number of weights."""
        return self.stored_bits / prod(self.shape)


def stored_bits(spec: Spec, shape: Shape) -> int:
    """Bits that a tensor of ``shape`` takes on disk in ``spec``. It needs no data, so a plan can use it."""

    def packed(rows: int, columns: int, bits: int) -> int:
        return rows * (-(-columns * bits // 8)) * 8

    high, wide = spec.granularity.param_shape(shape)
    total = packed(prod(shape[:-1]), shape[-1], spec.grid.bits)
    for each in spec.grid.fields:
        if each.bits is not None:
            total += packed(1, high * wide * each.width, each.bits)
        elif spec.stats is None:
            total += spec.torch_scale_dtype.itemsize * 8 * high * wide * each.width
        else:
            total += stored_bits(spec.stats, (wide * each.width, high)) + 32 * spec.stats_centred
    return total


def quantize(
    x: Tensor,
    spec: Spec,
    fit: Fit,
    importance: Tensor | None = None,
    centred: bool = False,
    encode_before_storing: bool = False,
) -> QTensor:
    """Round-to-nearest: fits parameters, then takes the nearest code of each element.

    Args:
        x: ``[..., I]``.
        spec: the format.
        fit: places the grid.
        importance: weights of the elements in the fit, in the shape of ``x``.
        centred: subtract the mean of all elements first and keep it in the result.
        encode_before_storing: take the nearest codes under the parameters as fitted, not as stored.

    Raises:
        ValueError: NaN or Inf in ``x``, or a scale that the format cannot store.
    """
    if not torch.isfinite(x).all():
        raise ValueError(f"cannot quantize {int((~torch.isfinite(x)).sum())} values that are NaN or Inf")
    mean = x.float().mean() if centred else None
    if mean is not None:
        x = x - mean
    raw = fit_raw(x, spec, fit, importance)
    params = raw if encode_before_storing else spec.as_stored(raw, spec.granularity.param_shape(tuple(x.shape))[1])
    codes_GK = spec.grid.encode(spec.granularity.split(x), params)
    q = QTensor.fitted(spec.granularity.join(codes_GK, tuple(x.shape)).contiguous(), raw, spec)
    return q if mean is None else QTensor(q.codes, q.params, spec, q.second, mean)
