"""Transforms and side terms as data: what a packed layer stores of them, and how it puts them together again.

Each transform and each side term is a frozen dataclass. A layer holds its tensors as its own buffers, ``pre0_s`` for field
``s`` of the first transform of the input, ``post0_seed``, ``side1_value``, so that devices, checkpoints and sharding treat
them like all others, and builds the dataclass around them (without a copy, where the dtype allows) when it runs. The rest
is a :class:`PartDescription`: the name of the class, shapes and dtypes of tensors, and the fields that are no tensors.

Tensors are stored in their own dtype, but float64 in float32 and int64 in int32; a seed is 64 bits, an int64 buffer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.layouts import Layout
from lowbit.numerics import KeptColumns, LowRank, SideTerm, Sparse, nearest
from lowbit.transforms import (
    ChannelTransform,
    Kronecker,
    Normalize,
    Permute,
    RandomHadamard,
    Reassembly,
    Rotate,
    Scale,
    Shift,
    Split,
)

Place = Literal["pre", "post", "side"]
PLACES: tuple[Place, ...] = ("pre", "post", "side")


def keeping_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``Module._apply`` is to do with stored tensors: follow ``move`` to its device, whatever dtype it casts to."""

    def keep(t: Tensor) -> Tensor:
        moved = move(t)
        return moved if moved.dtype == t.dtype else t.to(moved.device)

    return keep


_KEEP_WIDTH = (Scale, Shift, Permute, Rotate, Kronecker, RandomHadamard)
_TYPES: dict[Place, dict[str, type[Any]]] = {
    "pre": {cls.__name__: cls for cls in (*_KEEP_WIDTH, Split, Reassembly)},
    "post": {cls.__name__: cls for cls in (*_KEEP_WIDTH, Normalize)},
    "side": {cls.__name__: cls for cls in (Sparse, KeptColumns, LowRank)},
}
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
}
_NUMBERS = frozenset(
    {"index", "counts", "groups"}
)  # tensors of channel numbers or counts, int32 where no dtype is given


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PartDescription:
    """A transform or a side term as a layer stores it.

    Attributes:
        type: the name of its class.
        fields: its fields in the order of the class; of a tensor its :class:`TensorInfo`, else the value itself.
    """

    type: str
    fields: tuple[tuple[str, TensorInfo | bool | int | float | str | None], ...]

    def tensors(self) -> dict[str, TensorInfo]:
        """The stored tensors by field."""
        return {name: value for name, value in self.fields if isinstance(value, TensorInfo)}

    def to_json(self) -> dict[str, Any]:
        """Plain data: the type, and for each field ``{"shape", "dtype"}`` of a tensor or the value itself. A tensor of the
        usual dtype (float32, or int32 for channel numbers and counts) is its shape alone, as in the format's version 1."""
        return {"type": self.type} | {name: _field_to_json(name, value) for name, value in self.fields}

    @classmethod
    def from_json(cls, place: Place, data: Any) -> PartDescription:
        """The part that :meth:`to_json` wrote.

        Raises:
            ValueError: a type or a field that parts at ``place`` do not have, or a damaged shape or dtype.
        """
        if not isinstance(data, Mapping):
            raise ValueError(
                f"a {_kind(place)} is described by an object with a type and its fields, found {data!r:.100}"
            )
        part = _class_of(place, data.get("type"))
        declared = {field.name: field.type for field in dataclasses.fields(part)}
        if set(data) != {"type", *declared}:
            raise ValueError(
                f"{data['type']} has the fields {list(declared)}, found {[str(key) for key in data if key != 'type']!r:.100}: "
                "the description is damaged"
            )
        fields = tuple((name, _field_from_json(name, data[name])) for name in declared)
        for name, value in fields:
            if (declared[name] == "Tensor" or name == "seed") != isinstance(value, TensorInfo):
                raise ValueError(f"{data['type']} is damaged: its field {name} is described by {data[name]!r:.100}")
        return cls(data["type"], fields)


def tensors(place: Place, values: Sequence[ChannelTransform | SideTerm]) -> dict[str, Tensor]:
    """The tensors to store, by buffer name."""
    stored = {}
    for i, value in enumerate(values):
        if type(value).__name__ not in _TYPES[place]:
            raise ValueError(f"a layer has no {type(value).__name__} as {place}; it takes {', '.join(_TYPES[place])}")
        stored |= {
            f"{place}{i}_{name}": t for name, item in _fields(value).items() if (t := _stored(name, item)) is not None
        }
    return stored


def describe(place: Place, values: Sequence[ChannelTransform | SideTerm]) -> tuple[PartDescription, ...]:
    """Descriptions from which :func:`layout` lays the same buffers out."""
    stored = tensors(place, values)

    def described(i: int, name: str, item: Any) -> Any:
        tensor = stored.get(f"{place}{i}_{name}")
        return item if tensor is None else TensorInfo(tuple(tensor.shape), tensor.dtype)

    return tuple(
        PartDescription(
            type(value).__name__, tuple((name, described(i, name, item)) for name, item in _fields(value).items())
        )
        for i, value in enumerate(values)
    )


def layout(place: Place, parts: Iterable[PartDescription]) -> Layout:
    """Shape and dtype of each buffer of ``parts``. Raises ValueError for a type that parts at ``place`` do not have."""
    buffers: Layout = {}
    for i, part in enumerate(parts):
        _class_of(place, part.type)
        buffers |= {f"{place}{i}_{name}": (info.shape, info.dtype) for name, info in part.tensors().items()}
    return buffers


def build(
    place: Place, parts: Iterable[PartDescription], buffers: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    """The transforms or side terms around ``buffers``; floating fields in ``dtype``, if one is given."""
    built = []
    for i, part in enumerate(parts):
        values = dict[str, Any](part.fields)
        for name in part.tensors():
            buffer = buffers[f"{place}{i}_{name}"]
            values[name] = int(buffer.item()) if name == "seed" else _in(buffer, dtype)
        built.append(_TYPES[place][part.type](**values))
    return tuple(built)


def _kind(place: Place) -> str:
    return "side term" if place == "side" else "transform"


def _class_of(place: Place, name: Any) -> type[Any]:
    cls = _TYPES[place].get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"unknown {_kind(place)} {name!r:.100}{nearest(str(name)[:100], list(_TYPES[place]))}")
    return cls


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


def _usual_dtype(name: str) -> torch.dtype:
    return torch.int32 if name in _NUMBERS else torch.float32


def _field_to_json(name: str, value: Any) -> Any:
    if not isinstance(value, TensorInfo):
        return value
    if value.dtype == _usual_dtype(name):
        return list(value.shape)
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _field_from_json(name: str, data: Any) -> Any:
    if isinstance(data, list | tuple):
        data = {"shape": data, "dtype": str(_usual_dtype(name)).removeprefix("torch.")}
    if not isinstance(data, Mapping):
        return data
    dtype, shape = data.get("dtype"), data.get("shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} is stored as one of {', '.join(_DTYPES)}, found {dtype!r:.100}")
    if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"the shape of {name} is a list of sizes, found {shape!r:.100}")
    return TensorInfo(tuple(shape), _DTYPES[dtype])


def _in(buffer: Tensor, dtype: torch.dtype | None) -> Tensor:
    return buffer.to(dtype) if dtype is not None and buffer.is_floating_point() else buffer
