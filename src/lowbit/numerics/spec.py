"""Storage formats and tensors in these formats.

A :class:`Spec` is a grid, the elements that share parameters, and the storage of the parameters. A :class:`QTensor` is a
tensor in such a format. One file holds both, because the scales of a quantized tensor can be a quantized tensor again.
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
from lowbit.numerics.grids.base import OF_NOTHING, Field, Grid, Params, arity
from lowbit.numerics.grids.blocks import SignedScale, Unsigned
from lowbit.numerics.narrowing import all_finite
from lowbit.numerics.serialize import serializable

_SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}

_MOST_LEVELS = 3


@serializable
@dataclass(frozen=True)
class Spec:
    """A storage format: the numbers, the granules, and the storage of scales and zero points.

    Args:
        grid: the numbers.
        granularity: which elements share parameters.
        stats: None: scales are stored in ``scale_dtype`` and zero points as the grid's fields say. A Spec: it quantizes the
            scales and all other floating parameters, laid out ``[columns, rows]``. A granule of the second level then lies
            within one column of groups, so a solver that works column by column can finish each group.
        scale_dtype: ``"float16"``, ``"bfloat16"``, ``"float32"``, or ``"float8_e8m0fnu"``, which holds powers of two.
        stats_centred: subtract the mean of all scales before ``stats`` quantizes them, and store it in float32.
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
        if self._levels_of_stats() > _MOST_LEVELS:
            raise ValueError(f"scales are quantized, and their scales, at most {_MOST_LEVELS} times; found more")

    def _levels_of_stats(self) -> int:
        return 0 if self.stats is None else 1 + self.stats._levels_of_stats()

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale_dtype]

    @property
    def settles(self) -> bool:
        """Whether scales that were stored once are stored again as they are, bit for bit. Small integers times one number are such where
        the largest scale always has the largest integer, as in the K types of llama.cpp."""
        stats = self.stats
        return stats is None or (
            not self.stats_centred and stats.stats is None and isinstance(stats.grid, SignedScale | Unsigned)
        )

    def check_shape(self, shape: Shape) -> None:
        """Checks that the format keeps together the neighbours that its grid codes together.

        Raises:
            ValueError: rows or granules of a tensor of ``shape`` separate such neighbours.
        """
        together = arity(self.grid)
        if together == 1:
            return
        if shape[-1] % together:
            raise ValueError(
                f"{self.grid} codes {together} neighbours of a row together, and rows of {shape[-1]} leave one over; pad "
                "them, or choose another grid"
            )
        place = self.granularity.split(torch.arange(2 * shape[-1], device="cpu").view(2, -1))
        # The filling of a short granule repeats its last element and counts as whole.
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

    def as_stored(self, params: Params, columns: int = 1, *, check: bool = True) -> Params:
        """``params`` rounded as on disk, in their own dtype.

        Solvers call this before they encode, so that they measure (and feed back) errors against the stored scale.

        Args:
            params: leading axis G = rows x ``columns``, row-major.
            columns: second number of the granularity's ``param_shape``.
            check: raise an error for numbers that the storage dtype cannot hold; otherwise they become NaN.

        Raises:
            ValueError: a scale that the storage dtype cannot hold.
        """
        return params._make(  # pyright: ignore[reportReturnType]
            x if x is None or field is None or field.bits is not None else self._restored(x, field, columns, check)
            for x, field in zip_longest(params, self.grid.fields)
        )

    def _restored(self, x: Tensor, field: Field, columns: int, check: bool) -> Tensor:
        if not check:
            fits = torch.isfinite(x)
            if self.stats is None:
                fits &= x.abs() <= torch.finfo(self.torch_scale_dtype).max
            return self._restored(x.where(fits, OF_NOTHING), field, columns, True).where(fits, torch.nan)
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
        """The values that :meth:`second_level` stored, ``[G, width]`` float32."""
        return self.lifted(second.dequantize().T.reshape(-1, field.width), field)

    def lifted(self, x: Tensor, field: Field) -> Tensor:
        """Raises vanished scales to the smallest number that storage holds; otherwise their granules would become zeros.
        Subnormal numbers stay: in float16 they are the scales of all weights below about 1e-4."""
        if not field.floored:
            return x
        kept = torch.finfo(self.torch_scale_dtype)
        tiny = max(kept.smallest_normal * kept.eps, torch.finfo(torch.float32).smallest_normal)
        return torch.where(x.abs() < tiny, torch.full_like(x, tiny), x)


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


def fit_raw(x: Tensor, spec: Spec, fit: Fit, importance: Tensor | None = None) -> Params:
    """Parameters of ``spec`` fitted to ``x``, before rounding to storage. ``importance`` has the shape of ``x``."""
    spec.check_shape(tuple(x.shape))
    x_GK = spec.granularity.split(x)
    if importance is None and x_GK.numel() != x.numel():
        importance = torch.ones_like(x)  # so that the filling of short granules has importance 0
    weight_GK = None if importance is None else spec.granularity.split(importance, fill_zero=True)
    return fit(x_GK, spec.grid, weight_GK)  # pyright: ignore[reportArgumentType]


def fit_params(x: Tensor, spec: Spec, fit: Fit, importance: Tensor | None = None) -> Params:
    """Parameters of ``spec`` fitted to ``x``, as stored. ``importance`` has the shape of ``x``."""
    return spec.as_stored(fit_raw(x, spec, fit, importance), spec.granularity.param_shape(tuple(x.shape))[1])


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
    if not all_finite(x):
        raise ValueError(f"cannot quantize {int((~torch.isfinite(x)).sum())} values that are NaN or Inf")
    mean = x.float().mean() if centred else None
    if mean is not None:
        x = x - mean
    raw = fit_raw(x, spec, fit, importance)
    params = raw if encode_before_storing else spec.as_stored(raw, spec.granularity.param_shape(tuple(x.shape))[1])
    codes_GK = spec.grid.encode(spec.granularity.split(x), params)
    q = QTensor.fitted(spec.granularity.join(codes_GK, tuple(x.shape)).contiguous(), raw, spec)
    return q if mean is None else QTensor(q.codes, q.params, spec, q.second, mean)


__all__ = ["QTensor", "Shape", "Spec", "fit_params", "fit_raw", "quantize", "stored_bits"]
