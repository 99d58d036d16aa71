"""Frozen values to plain data and back. Recipes, journals and checkpoints name types through this module only.

A dataclass marked ``@serializable`` is written as ``{"type": "PerGroup", "size": 64}`` and read back by its class name. The
alternative, a discriminated union for each contract, would list the members of every contract, so a new grid would be a
change in two places. Here a class is known once its module is imported.

Law: ``from_dict(to_dict(x)) == x`` for every value built of serializable dataclasses, numbers, strings, None and tuples.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, TypeVar

T = TypeVar("T", bound=type)
_KNOWN: dict[str, type] = {}


def serializable(cls: T) -> T:
    """Class decorator: makes the dataclass ``cls`` known to :func:`from_dict` under its own name."""
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} must be a dataclass"
    assert cls.__name__ not in _KNOWN, f"two serializable classes are called {cls.__name__}"
    _KNOWN[cls.__name__] = cls
    return cls  # pyright: ignore[reportReturnType]  # the assertion narrows T to dataclasses


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)``, or the list of what is known when nothing is near. For error messages."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f"; known: {', '.join(sorted(known))}"


def to_dict(value: Any) -> Any:
    """Plain data (dicts, lists, numbers, strings) for ``value``; fields that hold their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        assert type(value).__name__ in _KNOWN, f"{type(value).__name__} is not serializable"
        out = {"type": type(value).__name__}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.default is dataclasses.MISSING or item != field.default:
                out[field.name] = to_dict(item)
        return out
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def from_dict(data: Any) -> Any:
    """The value that :func:`to_dict` wrote as ``data``.

    Raises:
        ValueError: an unknown type or field; the message names the nearest known one.
    """
    if isinstance(data, list | tuple):
        return tuple(from_dict(item) for item in data)
    if not isinstance(data, dict):
        return data
    if "type" not in data:
        return {key: from_dict(item) for key, item in data.items()}
    name = data["type"]
    if name not in _KNOWN:
        raise ValueError(f"unknown type {name!r}{nearest(str(name), list(_KNOWN))}")
    cls = _KNOWN[name]
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in data:
        if key != "type" and key not in fields:
            raise ValueError(f"{name} has no option {key!r}{nearest(key, fields)}")
    try:
        return cls(**{key: from_dict(item) for key, item in data.items() if key != "type"})
    except TypeError as error:
        raise ValueError(f"cannot build {name}: {error}") from error
