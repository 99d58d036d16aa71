"""The rows or columns of a weight that belong to an end of an edge, and the free channel of each.

Only this file knows head layouts. Every index is a reshaped arange, so the layout [K, n, D] defines it: key-value head,
query head within it, dim. K = H / n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.architectures.table import Axis, Heads, LinearRole


def part_rows(linear: LinearRole, part: str | None, out_features: int, heads: Heads | None) -> Tensor | None:
    """Rows [P] of `part` in a fused weight of `out_features` rows; None if the linear is not fused."""
    if part is None:
        return None
    rows = torch.arange(out_features)
    sizes = [_part_size(name, heads) or out_features // len(linear.parts) for name in linear.parts]
    if sum(sizes) != out_features:
        raise ValueError(f"{linear.path!r} has {out_features} rows, but its parts {linear.parts} need {sizes}.")
    if linear.layout == "grouped":
        assert heads is not None, "a projection grouped by head needs heads"
        shared = heads.query // heads.key_value
        rows_KND = rows.view(heads.key_value, shared + 2, heads.dim)
        slices = {"q": slice(0, shared), "k": slice(shared, shared + 1), "v": slice(shared + 1, shared + 2)}
        return rows_KND[:, slices[part]].flatten()
    return rows.split(sizes)[linear.parts.index(part)]


def _part_size(part: str, heads: Heads | None) -> int | None:
    if heads is None or part not in ("q", "k", "v"):
        return None
    return (heads.query if part == "q" else heads.key_value) * heads.dim


def axis_channels(axis: Axis, width: int, heads: Heads | None) -> tuple[int, int | None]:
    """(number of free channels, length of the runs within which they may mix; None: anywhere) of an edge.

    `width`: rows or columns of the edge's first port.
    """
    if axis in (Axis.HIDDEN, Axis.INNER):
        return width, None
    assert heads is not None, f"axis {axis} needs heads"
    if axis is Axis.VALUE:
        return heads.key_value * heads.dim, heads.dim
    if axis is Axis.UNROTATED:
        unrotated = heads.dim - heads.rotary
        return heads.key_value * unrotated, unrotated
    return heads.rotary // 2 * (heads.key_value if axis is Axis.ROTARY else 1), None


def axis_ports(axis: Axis, heads: Heads | None, *, shares: bool) -> tuple[Tensor | None, Tensor | None]:
    """(rows of the projection, free channel of each) of one end; None stands for all, each once, in order.

    `shares`: the end has one head for each query head (queries, columns of the output projection), not one for each
    key-value head (keys, values).
    """
    if axis in (Axis.HIDDEN, Axis.INNER):
        return None, None
    assert heads is not None, f"axis {axis} needs heads"
    if axis is Axis.HEAD_ROTARY:
        rows, pairs = torch.arange(heads.dim), torch.arange(heads.rotary // 2).repeat(2)
        return (None if heads.rotary == heads.dim else rows[: heads.rotary]), pairs
    shared = heads.query // heads.key_value if shares else 1
    if axis is Axis.VALUE:
        return None, _repeat_heads(heads.key_value, shared, torch.arange(heads.dim)) if shared > 1 else None
    rows_HD = torch.arange(heads.key_value * shared * heads.dim).view(-1, heads.dim)
    if axis is Axis.UNROTATED:
        rows = None if heads.rotary == 0 else rows_HD[:, heads.rotary :].flatten()
        within = torch.arange(heads.dim - heads.rotary)
        return rows, _repeat_heads(heads.key_value, shared, within) if shared > 1 else None
    rows = None if heads.rotary == heads.dim else rows_HD[:, : heads.rotary].flatten()
    return rows, _repeat_heads(heads.key_value, shared, torch.arange(heads.rotary // 2).repeat(2))


def _repeat_heads(key_value: int, shared: int, within: Tensor) -> Tensor:
    """Free channels [K * n * len(within)]: the run of each key-value head, once for each query head that shares it."""
    starts_K11 = torch.arange(key_value)[:, None, None] * (int(within.max()) + 1)
    return (starts_K11 + within.expand(1, shared, -1)).flatten()
