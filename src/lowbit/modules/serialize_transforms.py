"""Transforms and side terms as data: what a packed layer keeps of them, and how it puts them together again.

Each is a frozen dataclass. A layer holds its tensors as its own buffers, ``pre0_s`` for field ``s`` of the first
transform of the input, ``post0_seed``, ``side1_value``, so that devices, checkpoints and sharding treat them like all
others, and builds the dataclass around them (without a copy, where the dtype allows) when it runs. Its description says
the rest: type names, shapes, dtypes, and fields that are no tensors.

Tensors are stored in their own dtype, but float64 in float32 and int64 in int32; a seed is 64 bits, an int64 buffer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.layouts import Layout
from lowbit.numerics import KeptColumns, LowRank, SideTerm, Sparse, nearest
from lowbit.transforms import (
    ChannelTransform,
    Kronecker,
    Permute,
    RandomHadamard,
    Reassembly,
    Rotate,
    Scale,
    Shift,
    Split,
)

Place = Literal["pre", "post", "side"]
Entries = Sequence[Mapping[str, Any]]
"""Plain data: a type's name and, for each of its fields, ``{"shape", "dtype"}`` of a tensor or the value itself. A shape
alone is a tensor of the first version of the format: float32, or int32 for channel numbers and counts."""


def keeping_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``Module._apply`` is to do with stored tensors: follow ``move`` to its device, whatever dtype it casts to."""

    def keep(t: Tensor) -> Tensor:
        moved = move(t)
        return moved if moved.dtype == t.dtype else t.to(moved.device)

    return keep


_KEEP_WIDTH = (Scale, Shift, Permute, Rotate, Kronecker, RandomHadamard)
_TYPES: dict[Place, dict[str, type[Any]]] = {
    "pre": {cls.__name__: cls for cls in (*_KEEP_WIDTH, Split, Reassembly)},
    "post": {cls.__name__: cls for cls in _KEEP_WIDTH},
    "side": {cls.__name__: cls for cls in (Sparse, KeptColumns, LowRank)},
}
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
}
_NUMBERS = frozenset({"index", "counts"})  # tensors of channel numbers or counts, int32 where no dtype is given


def tensors(place: Place, values: Sequence[ChannelTransform | SideTerm]) -> dict[str, Tensor]:
    """The tensors to store, by buffer name."""
    found = {}
    for i, value in enumerate(values):
        if type(value).__name__ not in _TYPES[place]:
            raise ValueError(f"a layer has no {type(value).__name__} as {place}; it takes {', '.join(_TYPES[place])}")
        found |= {
            f"{place}{i}_{name}": t for name, item in _fields(value).items() if (t := _stored(name, item)) is not None
        }
    return found


def describe(place: Place, values: Sequence[ChannelTransform | SideTerm]) -> list[dict[str, Any]]:
    """Plain data from which :func:`layout` lays the same buffers out."""
    found = tensors(place, values)
    return [
        {"type": type(value).__name__}
        | {name: _said(found.get(f"{place}{i}_{name}"), name, item) for name, item in _fields(value).items()}
        for i, value in enumerate(values)
    ]


def layout(place: Place, entries: Entries) -> Layout:
    """Shape and dtype of each buffer that ``entries`` describe.

    Raises:
        ValueError: a type or field that is not known.
    """
    found: Layout = {}
    for i, entry in enumerate(entries):
        cls = _TYPES[place].get(str(entry.get("type")))
        if cls is None:
            hint = nearest(str(entry.get("type")), list(_TYPES[place]))
            raise ValueError(f"unknown {'side term' if place == 'side' else 'transform'} {entry.get('type')!r}{hint}")
        expected = [field.name for field in dataclasses.fields(cls)]
        if sorted(entry) != sorted(["type", *expected]):
            raise ValueError(f"{entry['type']} has the fields {expected}, found {sorted(set(entry) - {'type'})}")
        for name in expected:
            if (shape := shape_of(entry[name])) is not None:
                found[f"{place}{i}_{name}"] = shape, _dtype_of(name, entry[name])
    return found


def build(
    place: Place, entries: Entries, buffers: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    """The transforms or side terms around ``buffers``; floating fields in ``dtype``, if one is given."""
    built = []
    for i, entry in enumerate(entries):
        values = {}
        for name, said in entry.items():
            buffer = buffers.get(f"{place}{i}_{name}")
            if buffer is not None:
                values[name] = int(buffer.item()) if name == "seed" else _in(buffer, dtype)
            elif name != "type":
                values[name] = said
        built.append(_TYPES[place][entry["type"]](**values))
    return tuple(built)


def shape_of(said: Any) -> tuple[int, ...] | None:
    """The shape that a description gives a field, or None for a field that is no tensor."""
    if isinstance(said, Mapping):
        return tuple(said["shape"])
    return tuple(said) if isinstance(said, list | tuple) else None


def _fields(value: ChannelTransform | SideTerm) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # pyright: ignore[reportArgumentType]


def _stored(name: str, value: Any) -> Tensor | None:
    if name == "seed":
        return torch.tensor([value], dtype=torch.int64)
    if not isinstance(value, Tensor):
        return None
    value = value.detach()
    narrow = {torch.float64: torch.float32, torch.int64: torch.int32}.get(value.dtype, value.dtype)
    # A copy: several layers may have been given one transform.
    stored = value.to(narrow, memory_format=torch.contiguous_format, copy=True)
    if stored.is_floating_point() and not torch.isfinite(stored).all():
        raise ValueError(f"the field {name} of a transform or side term holds NaN, Inf or a value beyond {narrow}")
    return stored


def _said(stored: Tensor | None, name: str, value: Any) -> Any:
    if stored is None:
        return value
    shape = list(stored.shape)
    if stored.dtype == _dtype_of(name, shape):
        return shape
    return {"shape": shape, "dtype": str(stored.dtype).removeprefix("torch.")}


def _dtype_of(name: str, said: Any) -> torch.dtype:
    if not isinstance(said, Mapping):
        return torch.int32 if name in _NUMBERS else torch.float32
    if said.get("dtype") not in _DTYPES:
        raise ValueError(f"{name} is stored as one of {', '.join(_DTYPES)}, found {said.get('dtype')!r}")
    return _DTYPES[said["dtype"]]


def _in(buffer: Tensor, dtype: torch.dtype | None) -> Tensor:
    return buffer.to(dtype) if dtype is not None and buffer.is_floating_point() else buffer
