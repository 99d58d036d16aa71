"""What one process of several holds of a packed layer: rows or columns of it, cut without decoding a weight.

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lowbit.layouts import pack, unpack
from lowbit.modules import LinearDescription
from lowbit.numerics import PerChannel, PerGroup

Tensors = Mapping[str, Tensor]


def why_not_cut(description: LinearDescription) -> str | None:
    """Why a layer cannot be cut; None: it can."""
    spec = description.spec
    if description.pre or description.post or description.side_terms or description.act is not None:
        return "it has transforms, side terms or quantized inputs, which are of the whole layer"
    if not isinstance(spec.granularity, PerGroup | PerChannel) or spec.stats is not None:
        return "its scales are not of a row or of groups of one"
    return None


def cut(
    description: LinearDescription, tensors: Tensors, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[LinearDescription, dict[str, Tensor]]:
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
        count = high * groups * field.width
        values = tensors[field.name]
        values = values if field.bits is None else unpack(values, field.bits, count)
        values = values.reshape(high, groups, field.width)[kept]
        if columns != (0, wide) and isinstance(spec.granularity, PerGroup):
            values = values[:, columns[0] // size : -(-columns[1] // size)]
        flat = values.reshape(len(values), -1).contiguous()
        made[field.name] = flat if field.bits is None else pack(flat.reshape(-1), field.bits)
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    return replace(description, shape=shape), made
