"""Channel transforms as data: what a packed layer keeps of the transforms that run on its input.

A transform is a frozen dataclass of tensors. A layer holds the tensors as its own buffers, ``pre0_s`` for field ``s``
of the first, so that devices, checkpoints and sharding treat them like all others, and puts the transform together
again around them (without a copy) when it runs. Floating fields are stored in float32, index fields in int32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.numerics import nearest
from lowbit.transforms import ChannelTransform, Merge, Permute, Rotate, Scale, Shift, Split

_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in (Scale, Shift, Permute, Rotate, Split, Merge)}

PreConfig = list[dict[str, Any]]


def pre_tensors(pre: tuple[ChannelTransform, ...]) -> dict[str, Tensor]:
    """The tensors to store, by buffer name."""
    return {f"pre{i}_{name}": _stored(value) for i, t in enumerate(pre) for name, value in _fields(t).items()}


def pre_config(pre: tuple[ChannelTransform, ...]) -> PreConfig:
    """Plain data from which :func:`pre_layout` lays the same buffers out: type names and shapes."""
    return [{"type": type(t).__name__} | {name: list(value.shape) for name, value in _fields(t).items()} for t in pre]


def pre_layout(config: PreConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each buffer that ``config`` describes.

    Raises:
        ValueError: a transform or field that is not known.
    """
    layout = {}
    for i, entry in enumerate(config):
        if entry.get("type") not in _TYPES:
            raise ValueError(f"unknown transform {entry.get('type')!r}{nearest(str(entry.get('type')), list(_TYPES))}")
        expected = [field.name for field in dataclasses.fields(_TYPES[entry["type"]])]
        if sorted(entry) != sorted(["type", *expected]):
            raise ValueError(f"{entry['type']} has the fields {expected}, found {sorted(set(entry) - {'type'})}")
        for name in expected:
            dtype = torch.int32 if name in _INDEX_FIELDS else torch.float32
            layout[f"pre{i}_{name}"] = tuple(entry[name]), dtype
    return layout


def build_pre(config: PreConfig, buffers: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[ChannelTransform, ...]:
    """The transforms around ``buffers``; floating fields in ``dtype`` (no copy where they already are)."""
    built = []
    for i, entry in enumerate(config):
        values = {name: buffers[f"pre{i}_{name}"] for name in entry if name != "type"}
        built.append(
            _TYPES[entry["type"]](**{k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()})
        )
    return tuple(built)


# Fields that hold channel numbers or counts.
_INDEX_FIELDS = frozenset({"index", "counts", "groups"})


def _fields(t: ChannelTransform) -> dict[str, Tensor]:
    names = [field.name for field in dataclasses.fields(t)]  # pyright: ignore[reportArgumentType]
    return {name: getattr(t, name) for name in names}


def _stored(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value.to(torch.int32).contiguous()
    stored = value.detach().to(torch.float32).contiguous()
    if not torch.isfinite(stored).all():
        raise ValueError("a transform of a layer's input holds NaN, Inf or a value beyond float32")
    return stored
