"""What is stored, :class:`Spec`: a grid, who shares its parameters, and how the parameters are themselves stored.

And a tensor that is stored so, :class:`QTensor`: codes, parameters, and the format that reads them. The two are one file,
because the scales of a tensor may themselves be a quantized tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor

from lowbit.numerics.fit import Fit, MinMax
from lowbit.numerics.granularity import Granularity, Shape
from lowbit.numerics.grids.base import Field, Grid, Params, arity
from lowbit.numerics.serialize import serializable

_SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}


@serializable
@dataclass(frozen=True)
class Spec:
    """A storage format: which numbers, which granules, and how scales and zero points are stored.

    Args:
        grid: the numbers.
        granularity: which elements share parameters.
        stats: None, scales are stored as ``scale_dtype`` and zero points as the grid's fields say; or a Spec, by which
            scales (and whatever else of the parameters is floating) are quantized. They are laid out ``[columns, rows]``
            for this, so that a granule of the second level lies within one column of groups: a solver that fixes the
            groups column by column can finish each at once.
        scale_dtype: ``"float16"``, ``"bfloat16"``, ``"float32"``, or ``"float8_e8m0fnu"``, which holds powers of two.
        stats_centred: the mean of all scales is subtracted before ``stats`` quantizes them, and stored in float32.
    """

    grid: Grid
    granularity: Granularity
    stats: Spec | None = None
    scale_dtype: str = "float16"
    stats_centred: bool = False

    def __post_init__(self):
        if isinstance(self.grid, type) or not isinstance(self.grid, Grid):
            raise ValueError(f"grid must be a grid such as Int(4), found {self.grid!r}")
        if isinstance(self.granularity, type) or not isinstance(self.granularity, Granularity):
            raise ValueError(f"granularity must be such as PerGroup(64), found {self.granularity!r}")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(f"scale_dtype is one of {', '.join(_SCALE_DTYPES)}, found {self.scale_dtype!r}")

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale_dtype]

    def check_shape(self, shape: Shape) -> None:
        """Raises ValueError where a tensor of ``shape`` cannot have this format: a grid codes neighbours together, and the
        rows or granules cut one from the other."""
        together = arity(self.grid)
        if together == 1:
            return
        if shape[-1] % together:
            raise ValueError(
                f"{self.grid} codes {together} neighbours of a row together, and rows of {shape[-1]} leave one over; pad "
                "them, or choose another grid"
            )
        place = self.granularity.split(torch.arange(2 * shape[-1], device="cpu").view(2, -1))
        # What fills up a short granule repeats its last element, and is whole by itself.
        whole = place.shape[1] % together == 0
        if whole:
            first, *others = place.reshape(-1, together).T
            filled = torch.stack([first == other for other in others]).all(0)
            follows = torch.stack([other == first + k for k, other in enumerate(others, 1)]).all(0)
            whole = bool((filled | (follows & (first % together == 0))).all())
        if not whole:
            raise ValueError(
                f"{self.grid} codes {together} neighbours of a row together, which {self.granularity} cuts apart; give its "
                f"runs a multiple of {together} columns"
            )

    def as_stored(self, params: Params, columns: int = 1) -> Params:
        """``params`` rounded to what will be on disk, still in their own dtype; G is rows x ``columns``, row-major.

        Solvers call this before they encode, so that errors are measured (and fed back) against the stored scale.

        Raises:
            ValueError: a scale that the storage dtype cannot hold.
        """
        return params._make(  # pyright: ignore[reportReturnType]
            x if x is None or field is None or field.bits is not None else self._restored(x, field, columns)
            for x, field in zip_longest(params, self.grid.fields)
        )

    def _restored(self, x: Tensor, field: Field, columns: int) -> Tensor:
        if self.stats is None:
            stored = x.to(self.torch_scale_dtype).to(x.dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(
                    f"a {field.name} of {x.abs().max().item():.3g} does not fit {self.scale_dtype}; "
                    "set scale_dtype to 'bfloat16' or 'float32', or look for NaN in the weights"
                )
            return self.lifted(stored, field)
        return self.from_second(self.second_level(x, columns), field).to(x.dtype)

    def second_level(self, x: Tensor, columns: int) -> QTensor:
        """The second level: ``x`` ``[G, width]`` laid out ``[columns * width, rows]`` and quantized by ``stats``."""
        assert self.stats is not None
        return quantize(
            x.reshape(-1, columns * x.shape[1]).T.contiguous(), self.stats, MinMax(), centred=self.stats_centred
        )

    def from_second(self, second: QTensor, field: Field) -> Tensor:
        """What :meth:`second_level` stored, ``[G, width]`` float32."""
        return self.lifted(second.dequantize().T.reshape(-1, field.width), field)

    def lifted(self, x: Tensor, field: Field) -> Tensor:
        """The floor under what divides: a scale that vanished would turn its granule into zeros, and the smallest
        number kept is the honest neighbour. Subnormal numbers are kept too: in float16 they are the scales of all
        weights below about 1e-4."""
        if not field.floored:
            return x
        kept = torch.finfo(self.torch_scale_dtype)
        tiny = max(kept.smallest_normal * kept.eps, torch.finfo(torch.float32).smallest_normal)
        return torch.where(x.abs() < tiny, torch.full_like(x, tiny), x)


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes ``[O, I]`` (uint8, one a byte: packing is :mod:`lowbit.layouts`) with parameters as stored (leading axis G).

    second: where the spec quantizes statistics, each floating parameter as it is stored, by name; ``params`` holds the
        values that these restore. :meth:`fitted` fills both.
    mean: float32 scalar added to every value; only of a second level that is centred.
    """

    codes: Tensor
    params: Params
    spec: Spec
    second: Mapping[str, QTensor] = field(default_factory=dict)
    mean: Tensor | None = None

    @staticmethod
    def fitted(codes: Tensor, raw: Params, spec: Spec) -> QTensor:
        """Codes with parameters that were fitted and not yet stored (``Spec.as_stored`` of which chose the codes)."""
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
        """Every bit on disk: codes (each row padded to whole bytes, as the layout pads it) and parameters."""
        return stored_bits(self.spec, self.shape)

    @property
    def bits_per_weight(self) -> float:
        """``stored_bits`` over the number of weights."""
        return self.stored_bits / prod(self.shape)


def fit_raw(x: Tensor, spec: Spec, fit: Fit, importance: Tensor | None = None) -> Params:
    """Parameters of ``spec`` for ``x`` before they are stored. ``importance`` has the shape of ``x``."""
    spec.check_shape(tuple(x.shape))
    x_GK = spec.granularity.split(x)
    if importance is None and x_GK.numel() != x.numel():
        importance = torch.ones_like(x)  # what fills up short granules has none
    weight_GK = None if importance is None else spec.granularity.split(importance, fill_zero=True)
    return fit(x_GK, spec.grid, weight_GK)  # pyright: ignore[reportArgumentType]


def fit_params(x: Tensor, spec: Spec, fit: Fit, importance: Tensor | None = None) -> Params:
    """Parameters of ``spec`` for ``x`` as they will be stored. ``importance`` has the shape of ``x``."""
    return spec.as_stored(fit_raw(x, spec, fit, importance), spec.granularity.param_shape(tuple(x.shape))[1])


def fake_quantize(x: Tensor, spec: Spec, fit: Fit) -> Tensor:
    """``x`` as ``spec`` would restore it, differentiable (straight-through to x, true to the range). For learning only."""
    x_GK = spec.granularity.split(x)
    params = fit(x_GK, spec.grid)  # pyright: ignore[reportArgumentType]
    return spec.granularity.join(spec.grid.fake(x_GK, params), tuple(x.shape))  # pyright: ignore[reportAttributeAccessIssue]


def stored_bits(spec: Spec, shape: Shape) -> int:
    """Bits that a tensor of ``shape`` takes on disk in ``spec``. Needs no data, so a plan can use it."""

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
    """Round-to-nearest: fits parameters to ``x`` ``[..., I]``, then takes the nearest code of each element.

    ``centred`` subtracts the mean of all elements first and keeps it in the result. ``encode_before_storing`` takes the
    nearest codes under the parameters as fitted, and not as they will be stored.

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


__all__ = ["QTensor", "Shape", "Spec", "fake_quantize", "fit_params", "fit_raw", "quantize", "stored_bits"]
