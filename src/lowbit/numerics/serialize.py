"""Frozen values to plain data and back: the one converter for recipes, journals and checkpoints.

A dataclass marked ``@serializable`` is written with its name, ``{"type": "PerGroup", "size": 64}``, and read back by it. The
alternative, a discriminated union for each contract, would list the members of every contract, so a new grid would be a
change in two places. Here a class is known once its module is imported. A dataclass marked ``@untagged`` is written without
a name; it is read only where the caller, or the type of a field, names its class.

Dataclasses do not check the types of their fields: a string given for a tuple of patterns would be read letter by letter.
So :func:`from_dict` checks fields before it builds a value, and :func:`check_types` checks a value built in Python. Both
use pydantic for each field. It is a dependency already, for the options of methods, and its strict mode reports what is
wrong; cattrs converts silently.

Law: ``from_dict(to_dict(x), type(x)) == x`` for every value built of such dataclasses, numbers, strings, None and tuples.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from functools import cache
from types import GenericAlias, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, InstanceOf, TypeAdapter, ValidationError

T = TypeVar("T", bound=type)
_KNOWN: dict[str, type] = {}
_UNTAGGED: set[type] = set()
_STRICT = ConfigDict(arbitrary_types_allowed=True, strict=True)


def serializable(cls: T) -> T:
    """Class decorator: makes the dataclass ``cls`` known to :func:`from_dict` under its own name."""
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} must be a dataclass"
    assert cls.__name__ not in _KNOWN, f"two serializable classes are called {cls.__name__}"
    _KNOWN[cls.__name__] = cls
    return cls  # pyright: ignore[reportReturnType]  # the assertion narrows T to dataclasses


def untagged(cls: T) -> T:
    """Class decorator: the dataclass ``cls`` is written without its name, and read where it is the expected class."""
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} must be a dataclass"
    _UNTAGGED.add(cls)
    return cls  # pyright: ignore[reportReturnType]


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)``, or the list of what is known when nothing is near. For error messages."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f"; known: {', '.join(sorted(known))}"


def to_dict(value: Any) -> Any:
    """Plain data (dicts, lists, numbers, strings) for ``value``; fields that hold their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        assert name in _KNOWN or type(value) in _UNTAGGED, f"{name} is not serializable"
        out = {} if type(value) in _UNTAGGED else {"type": name}
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


def from_dict(data: Any, expected: Any = None, where: str = "") -> Any:
    """The value that :func:`to_dict` wrote as ``data``.

    Args:
        data: plain data; lists become tuples.
        expected: the expected class or annotation. A mapping without a ``type`` is read as the only dataclass among its
            alternatives; None: it stays a mapping.
        where: the path to ``data``, for messages.

    Raises:
        ValueError: an unknown type or field (the message names the nearest known one), a missing field, or a field of
            another type.
    """
    try:
        return _read(data, expected, where)
    except RecursionError:
        raise ValueError(f"{where or 'the data'}: nested too deeply") from None


def _read(data: Any, expected: Any, where: str) -> Any:
    if isinstance(data, list | tuple):
        kinds = _element_types(expected, len(data))
        return tuple(_read(item, kind, _join(where, i)) for i, (item, kind) in enumerate(zip(data, kinds)))
    if not isinstance(data, dict):
        return data
    for key in data:
        if not isinstance(key, str):
            raise ValueError(f"{where or 'the data'}: a key is text, found {key!r:.100}")
    if "type" in data:
        name = data["type"]
        if not isinstance(name, str) or name not in _KNOWN:
            place = f"{where}: " if where else ""
            raise ValueError(f"{place}unknown type {name!r:.100}{nearest(str(name)[:100], list(_KNOWN))}")
        return _build(_KNOWN[name], {key: item for key, item in data.items() if key != "type"}, where)
    classes = [kind for kind in _alternatives(expected) if dataclasses.is_dataclass(kind)]
    if len(classes) == 1:
        return _build(classes[0], data, where)
    return {key: _read(item, None, _join(where, key)) for key, item in data.items()}


def check_types(value: Any, where: str = "") -> None:
    """Checks the types of all fields of the dataclass ``value`` and of the dataclasses in it.

    Raises:
        ValueError: a field has another type than it declares, or is not a number (nan).
    """
    path = _path(type(value), where)
    items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    _check_fields(type(value), items, path)
    for name, item in items.items():
        for part_path, part in _parts(item, f"{path}.{name}"):
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                check_types(part, part_path)
            elif isinstance(part, float) and math.isnan(part):  # it compares false with every limit
                raise ValueError(f"{part_path}: expected a number, found nan")


def _build(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    path = _path(cls, where)
    for key in data:
        if key not in fields:
            problem = f": unknown key {key!r}" if cls in _UNTAGGED else f" has no option {key!r}"
            raise ValueError(f"{path}{problem}{nearest(str(key)[:100], list(fields))}")
    for name, field in fields.items():
        if name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}.{name}: Field required")
    hints = _hints(cls)
    items = {key: _read(item, hints[key], f"{path}.{key}") for key, item in data.items()}
    _check_fields(cls, items, path)
    try:
        return cls(**items)
    except (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{path}: values that do not belong together ({type(error).__name__}: {error})") from error


def _path(cls: type, where: str) -> str:
    """``where`` and the name of the class; an untagged class is named only at the start of a path."""
    return cls.__name__ if not where else where if cls in _UNTAGGED else f"{where}.{cls.__name__}"


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _parts(item: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The value itself, or the elements of a tuple, with their paths."""
    if not isinstance(item, tuple):
        yield path, item
    else:
        for i, part in enumerate(item):
            yield from _parts(part, f"{path}.{i}")


def _check_fields(cls: type, items: Mapping[str, Any], path: str) -> None:
    for name, item in items.items():
        try:
            _adapter(cls, name).validate_python((item,))
        except ValidationError as error:
            raise ValueError(f"{path}.{name}: {_expected(error.errors()[0])}, found {item!r:.100}") from error


def _expected(error: Mapping[str, Any]) -> str:
    """What a file should have had, in the words of YAML."""
    match error["type"]:
        case "tuple_type":
            return "expected a list"
        case "dict_type":
            return "expected a mapping"
        case "is_instance_of":
            plain = isinstance(error["input"], str | int | float | tuple | None)
            return f"expected {error['ctx']['class']}" + (", its fields as a mapping" if plain else "")
        case _:
            return str(error["msg"])


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _adapter(cls: type, field: str) -> TypeAdapter[Any]:
    # The tuple of one makes pydantic use this configuration and not that of a dataclass.
    hint: Any = GenericAlias(tuple, (_by_instance(_hints(cls)[field]),))
    return TypeAdapter(hint, config=_STRICT)


def _by_instance(hint: Any) -> Any:
    """The annotation with every dataclass checked by its class only; its fields are checked elsewhere."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return InstanceOf[hint]
    origin, arguments = get_origin(hint), tuple(_by_instance(each) for each in get_args(hint))
    if origin in (Union, UnionType):
        return Union[arguments]  # noqa: UP007  (made at run time)
    return GenericAlias(origin, arguments) if origin in (tuple, dict) else hint


def _alternatives(expected: Any) -> list[Any]:
    """The members of a union without None; any other annotation alone."""
    members = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    return [member for member in members if member not in (None, NoneType)]


def _element_types(expected: Any, count: int) -> list[Any]:
    """The types that a tuple's annotation gives its ``count`` elements; None for each without a type."""
    for member in _alternatives(expected):
        arguments = get_args(member)
        if get_origin(member) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
            return [arguments[0]] * count
        if get_origin(member) is tuple and len(arguments) == count:
            return list(arguments)
    return [None] * count
