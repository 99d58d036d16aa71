"""What a process holds of packed layers: rows or columns of one, and layers of one format as one, without decoding a weight.

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.layouts import pack, unpack
from lowbit.modules import LinearDescription
from lowbit.numerics import Field, PerChannel, PerGroup

Tensors = Mapping[str, Tensor]
Layer = tuple[LinearDescription, dict[str, Tensor]]


def why_not_cut(description: LinearDescription) -> str | None:
    """Why a layer cannot be cut; None: it can."""
    spec = description.spec
    if description.pre or description.post or description.side_terms or description.act is not None:
        return "it has transforms, side terms or quantized inputs, which are of the whole layer"
    if not isinstance(spec.granularity, PerGroup | PerChannel) or spec.stats is not None:
        return "its scales are not of a row or of groups of one"
    return None


def cut(description: LinearDescription, tensors: Tensors, rows: tuple[int, int], columns: tuple[int, int]) -> Layer:
    """The layer of some outputs and inputs.

    Args:
        tensors: of the whole layer, laid out as ``description.layout()`` says.
        rows, columns: first and last plus one, of O and of I.

    Raises:
        ValueError: a layer that cannot be cut, or not there.
    """
    shape = high, wide = description.shape
    if rows == (0, high) and columns == (0, wide):
        return description, dict(tensors)
    if reason := why_not_cut(description):
        raise ValueError(reason)
    spec = description.spec
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else wide
    if columns != (0, wide) and isinstance(spec.granularity, PerGroup) and any(border % size for border in columns):
        raise ValueError(f"its groups of {size} inputs do not end at {columns[0]} and {columns[1]}")
    kept = slice(*rows)
    codes = tensors["codes"][kept]
    if columns != (0, wide):
        codes = pack(unpack(codes, spec.grid.bits, wide)[:, slice(*columns)].contiguous(), spec.grid.bits)
    made = {"codes": codes.contiguous()}
    _, groups = spec.granularity.param_shape(shape)
    for field in spec.grid.fields:
        values = _values(field, tensors, high, groups)[kept]
        if columns != (0, wide) and isinstance(spec.granularity, PerGroup):
            values = values[:, columns[0] // size : -(-columns[1] // size)]
        made[field.name] = _stored(field, values)
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    return replace(description, shape=shape), made


def joined(layers: Sequence[Layer]) -> list[Layer]:
    """``layers``, which read the same input, with neighbours of the same format as one layer: their outputs lie one after another.

    A product has the same bits either way; one of all rows costs fewer calls.
    """
    made: list[Layer] = []
    for layer in layers:
        if made and _alike(made[-1][0], layer[0]):
            made[-1] = _join(made[-1], layer)
        else:
            made.append(layer)
    return made


def _alike(one: LinearDescription, other: LinearDescription) -> bool:
    return why_not_cut(one) is None and replace(one, shape=other.shape) == other and one.shape[1] == other.shape[1]


def _join(one: Layer, other: Layer) -> Layer:
    description, (high, wide) = one[0], one[0].shape
    spec, rows = description.spec, high + other[0].shape[0]
    made = {"codes": torch.cat([one[1]["codes"], other[1]["codes"]])}
    _, groups = spec.granularity.param_shape(description.shape)
    for field in spec.grid.fields:
        parts = [_values(field, tensors, each.shape[0], groups) for each, tensors in (one, other)]
        made[field.name] = _stored(field, torch.cat(parts))
    return replace(description, shape=(rows, wide)), made


def _values(field: Field, tensors: Tensors, rows: int, groups: int) -> Tensor:
    """``[rows, groups, width]``: a stored field, unpacked."""
    values = tensors[field.name]
    values = values if field.bits is None else unpack(values, field.bits, rows * groups * field.width)
    return values.reshape(rows, groups, field.width)


def _stored(field: Field, values: Tensor) -> Tensor:
    """The inverse of :func:`_values`."""
    flat = values.reshape(len(values), -1).contiguous()
    return flat if field.bits is None else pack(flat.reshape(-1), field.bits)
