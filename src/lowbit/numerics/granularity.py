"""Which elements share quantization parameters.

Every granularity cuts a tensor into ``[G, K]``: G granules of K elements, each with its own parameters. Grids and fits
see only this view, so each of them works with each granularity. The alternative, strides and broadcast shapes in every
grid, multiplies the code and is faster at none of the sizes that matter.

Granules of unequal size (a ragged last group, clusters) are filled to the longest with copies of their own last element,
which leaves their extremes unchanged. Importance is filled with zeros instead.

Law, for every granularity g that accepts the shape: ``g.join(g.split(x), x.shape) == x`` exactly.
Shapes: G granule, K element within a granule, O output channel (row), I input channel (column).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.numerics.serialize import serializable

Shape = tuple[int, ...]


@runtime_checkable
class Granularity(Protocol):
    """Cuts tensors ``[..., I]`` of at least two dimensions into granules, and joins them. All but the last axis are rows."""

    def param_shape(self, shape: Shape) -> tuple[int, int]:
        """Layout (rows, columns) of the parameters of a tensor of ``shape``; G is their product, row-major."""
        ...

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        """``[..., I]`` to ``[G, K]``. ``fill_zero`` fills short granules with zeros (for importance)."""
        ...

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        """``[G, K]`` back to ``shape``; filling is dropped."""
        ...


def _rows(shape: Shape) -> int:
    return prod(shape[:-1])


def _fill(x: Tensor, width: int, fill_zero: bool) -> Tensor:
    """Lengthens the last dimension to ``width`` with copies of the last element, or with zeros."""
    missing = width - x.shape[-1]
    if missing == 0:
        return x
    last = x[..., -1:].expand(*x.shape[:-1], missing)
    return torch.cat([x, torch.zeros_like(last) if fill_zero else last], dim=-1)


@serializable
@dataclass(frozen=True)
class PerTensor:
    """One granule: the whole tensor."""

    def param_shape(self, shape: Shape) -> tuple[int, int]:
        return 1, 1

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        return x.reshape(1, -1)

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        return x_GK.reshape(shape)


class _PerRow:
    def param_shape(self, shape: Shape) -> tuple[int, int]:
        return _rows(shape), 1

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        return x_GK.reshape(shape)


@serializable
@dataclass(frozen=True)
class PerToken(_PerRow):
    """One granule for each token: activations ``[..., I]``, one range for each vector of I."""


@serializable
@dataclass(frozen=True)
class PerChannel(_PerRow):
    """One granule for each output channel: weights ``[O, I]``, one range for each row."""


@serializable
@dataclass(frozen=True)
class PerInput:
    """One granule for each input channel, shared by all rows: static activations with one scale for each channel.

    Integer products cannot use such scales. If each scale is a common scale times a power of two, the power moves into the
    exponents of the weights and costs nothing (LLM-FP4, arXiv:2310.16836).
    """

    def param_shape(self, shape: Shape) -> tuple[int, int]:
        return shape[-1], 1

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        return x.reshape(-1, x.shape[-1]).T

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        return x_GK.T.reshape(shape)

    def spread(self, params_G1: Tensor) -> Tensor:
        """Parameters at each column, ``[I]``. They apply to ``[..., I]`` directly, without a transposed copy."""
        return params_G1.reshape(-1)


@serializable
@dataclass(frozen=True)
class PerGroup:
    """Runs of ``size`` consecutive elements of a row; the last run of a row may be shorter (ragged)."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(
                f"group size must be at least 1, found {self.size}; for one scale for each output channel: "
                "--group-size channel, None in Python, null in a recipe's options"
            )

    def param_shape(self, shape: Shape) -> tuple[int, int]:
        return _rows(shape), -(-shape[-1] // self.size)

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        _, groups = self.param_shape(tuple(x.shape))
        x = x.reshape(-1, x.shape[-1])
        width = min(self.size, x.shape[-1])  # one short run is not filled: its size may be any number
        return _fill(x, groups * width, fill_zero).reshape(-1, width)

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        rows, groups = self.param_shape(shape)
        return x_GK.reshape(rows, groups * min(self.size, shape[-1]))[:, : shape[-1]].reshape(shape)


def sizes_that_divide(width: int) -> str:
    """The usual group sizes that divide a row of ``width``, such as ``32, 64 or channel``. For error messages."""
    sizes = [str(size) for size in (16, 32, 64, 128, 256) if size < width and width % size == 0]
    return " or ".join([", ".join(sizes), "channel"] if sizes else ["channel"])


@serializable
@dataclass(frozen=True)
class Flat:
    """Runs of ``size`` consecutive elements of the row-major flattened tensor, across row borders.

    The last run may be shorter. If the row length is a multiple of ``size`` this is :class:`PerGroup`.
    """

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a block has at least one element, found {self.size}")

    def param_shape(self, shape: Shape) -> tuple[int, int]:
        return 1, -(-prod(shape) // self.size)

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        _, blocks = self.param_shape(tuple(x.shape))
        width = min(self.size, max(1, x.numel()))
        return _fill(x.reshape(1, -1), blocks * width, fill_zero).reshape(-1, width)

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        return x_GK.reshape(-1)[: prod(shape)].reshape(shape)


@serializable
@dataclass(frozen=True)
class Block:
    """Tiles of ``rows`` x ``cols``; tiles at the lower and right border may be smaller."""

    rows: int
    cols: int

    def __post_init__(self):
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a block needs at least one row and one column, found {self.rows} x {self.cols}")

    def param_shape(self, shape: Shape) -> tuple[int, int]:
        return -(-_rows(shape) // self.rows), -(-shape[-1] // self.cols)

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        high, wide = self.param_shape(tuple(x.shape))
        x = x.reshape(-1, x.shape[-1])
        rows, cols = self._tile(tuple(x.shape))
        x = _fill(x, wide * cols, fill_zero)
        x = _fill(x.T, high * rows, fill_zero).T
        return x.reshape(high, rows, wide, cols).transpose(1, 2).reshape(high * wide, -1)

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        (high, wide), (rows, cols) = self.param_shape(shape), self._tile(shape)
        x = x_GK.reshape(high, wide, rows, cols).transpose(1, 2).reshape(high * rows, -1)
        return x[: _rows(shape), : shape[-1]].reshape(shape)

    def _tile(self, shape: Shape) -> tuple[int, int]:
        return min(self.rows, max(1, _rows(shape))), min(self.cols, shape[-1])


@serializable
@dataclass(frozen=True)
class RowBands:
    """At most ``count`` bands of whole rows of equal height (ZeroQuant, arXiv:2206.01861, whose code gives this number).

    The height is the least with which ``count`` bands cover all rows; the last band may be lower. With fewer rows than
    ``count``, each row is its own band, as in :class:`PerChannel`.
    """

    count: int

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"a weight has at least one band of rows, found {self.count}")

    def height(self, shape: Shape) -> int:
        """Rows in each band; the last may have fewer."""
        return max(1, -(-_rows(shape) // self.count))

    def param_shape(self, shape: Shape) -> tuple[int, int]:
        return -(-_rows(shape) // self.height(shape)), 1

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        shape = tuple(x.shape)
        high, width = self.height(shape), shape[-1]
        return _fill(x.reshape(1, -1), self.param_shape(shape)[0] * high * width, fill_zero).reshape(-1, high * width)

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        return x_GK.reshape(-1)[: prod(shape)].reshape(shape)


@serializable
@dataclass(frozen=True)
class PerCluster:
    """Clusters of consecutive columns with the given ``sizes``, shared by all rows: reordered static activations."""

    sizes: tuple[int, ...]

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"every cluster needs at least one channel, found sizes {self.sizes}")

    def _check(self, shape: Shape) -> None:
        if sum(self.sizes) != shape[-1]:
            raise ValueError(f"clusters cover {sum(self.sizes)} channels, the tensor has {shape[-1]}")

    def param_shape(self, shape: Shape) -> tuple[int, int]:
        self._check(shape)
        return 1, len(self.sizes)

    def split(self, x: Tensor, *, fill_zero: bool = False) -> Tensor:
        self._check(tuple(x.shape))
        x = x.reshape(-1, x.shape[-1])
        parts = [
            _fill(part.T.reshape(1, -1), max(self.sizes) * x.shape[0], fill_zero) for part in x.split(self.sizes, 1)
        ]
        return torch.cat(parts)

    def join(self, x_GK: Tensor, shape: Shape) -> Tensor:
        self._check(shape)
        rows = _rows(shape)
        parts = [row[: size * rows].reshape(size, rows) for row, size in zip(x_GK, self.sizes, strict=True)]
        return torch.cat(parts).T.reshape(shape)

    def spread(self, params_G1: Tensor) -> Tensor:
        """Parameters of the clusters at each column, ``[I]``. They apply to ``[..., I]`` directly, without the filling that
        :meth:`split` needs for clusters of very unequal sizes."""
        sizes = torch.tensor(self.sizes, device=params_G1.device)
        return params_G1.reshape(-1).repeat_interleave(sizes)
