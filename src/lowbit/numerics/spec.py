"""What is stored: a grid, who shares its parameters, and how the parameters are themselves stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.fit import Fit, MinMax
from lowbit.numerics.granularity import Granularity, Shape
from lowbit.numerics.grids.base import Affine, Grid, Params
from lowbit.numerics.tagged import tagged

_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@tagged
@dataclass(frozen=True)
class Spec:
    """A storage format: which numbers, which granules, and how scales and zero points are stored.

    Args:
        grid: the numbers.
        granularity: which elements share parameters.
        stats: None, scales are stored as ``scale_dtype`` and zero points in the grid's ``zero_bits``; or a Spec, by which
            scales (and real-valued zero points) are quantized. They are laid out ``[columns, rows]`` for this, so that a
            granule of the second level lies within one column of groups: a solver that fixes the groups column by
            column can finish each at once.
        scale_dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    """

    grid: Grid
    granularity: Granularity
    stats: Spec | None = None
    scale_dtype: str = "float16"

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

    def as_stored(self, params: Params, columns: int = 1) -> Params:
        """``params`` rounded to what will be on disk, still in their own dtype; G is rows x ``columns``, row-major.

        Solvers call this before they encode, so that errors are measured (and fed back) against the stored scale.

        Raises:
            ValueError: a scale that the storage dtype cannot hold.
        """
        scale = self._store(params.scale, columns)
        # A scale that vanished would turn its granule into zeros; the smallest number kept is the honest neighbour.
        # Subnormal numbers are kept too: in float16 they are the scales of all weights below about 1e-4.
        kept = torch.finfo(self.torch_scale_dtype)
        tiny = max(kept.smallest_normal * kept.eps, torch.finfo(torch.float32).smallest_normal)
        scale = torch.where(scale.abs() < tiny, torch.full_like(scale, tiny), scale)
        zero = params.zero
        if zero is not None and self.grid.zero_bits is None:
            zero = self._store(zero, columns)
        return Affine(scale, zero)

    def _store(self, x_G1: Tensor, columns: int) -> Tensor:
        if self.stats is None:
            stored = x_G1.to(self.torch_scale_dtype).to(x_G1.dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(
                    f"a scale of {x_G1.abs().max().item():.3g} does not fit {self.scale_dtype}; "
                    "set scale_dtype to 'bfloat16' or 'float32', or look for NaN in the weights"
                )
            return stored
        return self.stats_qtensor(x_G1, columns).dequantize().T.reshape(-1, 1).to(x_G1.dtype)

    def stats_qtensor(self, x_G1: Tensor, columns: int):
        """The second level: ``x_G1`` laid out ``[columns, rows]`` and quantized by ``stats``, a QTensor."""
        from lowbit.numerics.qtensor import quantize  # a QTensor's scales may be a QTensor: the cycle is the design

        assert self.stats is not None
        return quantize(x_G1.reshape(-1, columns).T.contiguous(), self.stats, MinMax())


def fit_params(x: Tensor, spec: Spec, fit: Fit, importance: Tensor | None = None) -> Params:
    """Parameters of ``spec`` for ``x`` as they will be stored. ``importance`` has the shape of ``x``."""
    x_GK = spec.granularity.split(x)
    if importance is None and x_GK.numel() != x.numel():
        importance = torch.ones_like(x)  # what fills up short granules has none
    weight_GK = None if importance is None else spec.granularity.split(importance, fill_zero=True)
    params = fit(x_GK, spec.grid, weight_GK)  # pyright: ignore[reportArgumentType]
    return spec.as_stored(params, spec.granularity.param_shape(tuple(x.shape))[1])


def fake_quantize(x: Tensor, spec: Spec, fit: Fit) -> Tensor:
    """``x`` as ``spec`` would restore it, differentiable (straight-through to x, true to the range). For learning only."""
    x_GK = spec.granularity.split(x)
    params = fit(x_GK, spec.grid)  # pyright: ignore[reportArgumentType]
    return spec.granularity.join(spec.grid.fake(x_GK, params), tuple(x.shape))  # pyright: ignore[reportAttributeAccessIssue]


__all__ = ["Shape", "Spec", "fake_quantize", "fit_params"]
