"""What is stored: a grid, who shares its parameters, and how the parameters are themselves stored."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.numerics.fit import Fit, MinMax
from lowbit.numerics.granularity import Granularity, Shape
from lowbit.numerics.grids.base import OF_NOTHING, Field, Grid, Params, arity
from lowbit.numerics.serialize import serializable

if TYPE_CHECKING:
    from lowbit.numerics.qtensor import QTensor

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

    def as_stored(self, params: Params, columns: int = 1, *, check: bool = True) -> Params:
        """``params`` rounded to what will be on disk, still in their own dtype; G is rows x ``columns``, row-major.

        Solvers call this before they encode, so that errors are measured (and fed back) against the stored scale.

        Args:
            check: whether a number that the storage dtype cannot hold is an error; otherwise it comes out as NaN.

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
        from lowbit.numerics.qtensor import quantize  # a QTensor's scales may be a QTensor: the cycle is the design

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


__all__ = ["Shape", "Spec", "fit_params", "fit_raw"]
