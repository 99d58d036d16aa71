"""The registry of methods: names, and functions from options to a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from pydantic import ValidationError, validate_call

from lowbit.catalog import KV_FAMILY
from lowbit.modules import KVSpec
from lowbit.numerics import nearest, to_dict
from lowbit.recipes.mix import mix
from lowbit.recipes.recipe import Recipe
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class Method:
    """A published method: its name, source, and function from options to a recipe."""

    name: str
    family: str
    paper: str
    summary: str
    build: Callable[..., Recipe]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.build).parameters)

    def recipe(self, **options: Any) -> Recipe:
        """The method's recipe.

        Raises:
            ValueError: an unknown option, with the nearest known one, or a value of the wrong type.
        """
        for key, value in options.items():
            if key not in self.options:
                raise ValueError(f"method {self.name!r} has no option {key!r}{nearest(key, list(self.options))}")
            # pydantic takes True for 1, and YAML reads yes and on as True
            if isinstance(value, bool) and "bool" not in str(self.options[key].annotation):
                expected = inspect.formatannotation(self.options[key].annotation)
                raise ValueError(f"method {self.name!r}: {key} is {value}, expected {expected}")
        try:
            return self.build(**options)
        except ValidationError as error:
            raise ValueError(f"method {self.name!r}: {_plain(error)}") from error

    def describe(self) -> dict[str, Any]:
        """The entry of ``lowbit methods``, read from the index that ``make docs`` writes (:mod:`lowbit.catalog`)."""
        recipe = self.recipe()
        needs = {type(need).__name__ for step in recipe.steps for need in step.needs}
        needs |= {type(stage.fit).__name__ for stage in recipe.cache_stages}
        return {
            "name": self.name,
            "family": self.family,
            "paper": self.paper,
            "summary": self.summary,
            "needs": sorted(needs) + (["gradients"] if recipe.learns else []),
            "options": {key: to_dict(p.default) for key, p in self.options.items()},
        }


def _plain(error: ValidationError) -> str:
    """Pydantic's errors in one line: where, what, and the value found."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        value_given = f" (found {item['input']!r})" if item["type"] != "value_error" and item["loc"] else ""
        lines.append((f"{where}: " if where else "") + item["msg"].removeprefix("Value error, ") + value_given)
    return "; ".join(lines)


V = TypeVar("V")


class _Registered(Mapping[str, V], Generic[V]):
    """Entries by name. The first read imports the package of methods, whose modules add their entries.

    It is imported by name, because methods are plug-ins: recipes, on a lower floor, know none.
    """

    def __init__(self) -> None:
        self._entries: dict[str, V] = {}

    def add(self, name: str, entry: V) -> None:
        self._entries[name] = entry

    def _all(self) -> dict[str, V]:
        import_module("lowbit.methods")
        return self._entries

    def __getitem__(self, name: str) -> V:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


METHODS = _Registered[Method]()
ALIASES = _Registered[str]()
"""Short names of methods. None may contain ``+``, which makes a mix."""


def method(name: str, *, family: str, paper: str, alias: str | None = None):
    """A decorator that registers a function from options to a recipe. Options are validated by their annotations."""

    def register(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
        assert name not in METHODS, f"two methods are called {name}"
        if alias is not None:
            assert alias not in METHODS and alias not in ALIASES, f"two methods are called {alias}"
            ALIASES.add(alias, name)
        summary = (inspect.getdoc(build) or "").split("\n")[0]
        added = Method(name, family, paper, summary, validate_call(build))
        METHODS.add(name, added)
        return added.build

    return register


def recipe(name: str, **options: Any) -> Recipe:
    """The recipe of method ``name``, or of a mix ``"a+b"``: the steps of a, then those of b, solved once as b solves.

    Each option goes to every method of the mix that has it. ``kv_NAME`` is option NAME of the method that says how the cache is
    held, and of no other: ``recipe("gptq+kivi", bits=4, kv_bits=2)``. ``activation_bits=16``, which leaves inputs as they are, is also
    taken for methods that never quantize them.

    Raises:
        ValueError: an unknown method or option (with the nearest known one), a value of the wrong type, an impossible
            mix.
    """
    parts = []
    name = "+".join(ALIASES.get(part, part) for part in name.split("+"))
    for part in name.split("+"):
        if part not in METHODS:
            raise ValueError(f"no method {part!r}{nearest(part, [*METHODS, *ALIASES])}")
        parts.append(METHODS[part])
    known = {key for part in parts for key in part.options}
    if options.get("activation_bits") == 16 and "activation_bits" not in known:
        made = recipe(name, **{key: value for key, value in options.items() if key != "activation_bits"})
        if any(rule.activation is not None for rule in made.scheme.rules):
            raise ValueError(
                f"{name!r} always quantizes inputs: leave out activation_bits = 16, or choose another method"
            )
        return made
    own = {f"kv_{key}": key for part in parts if part.family == KV_FAMILY for key in part.options}
    of_cache = {own[key]: options[key] for key in options if key in own and key not in known}
    options = {key: value for key, value in options.items() if key not in own or key in known}
    if len(parts) == 1:
        for key in options.keys() & of_cache.keys():
            raise ValueError(f"{name!r} has the option {key!r} once; found it and kv_{key}")
        return parts[0].recipe(**options, **of_cache)
    for key in options:
        if key not in known:
            raise ValueError(
                f"none of the methods in {name!r} has an option {key!r}{nearest(key, sorted({*known, *own}))}"
            )
    return mix(name, [part.recipe(**_options_of(part, options, of_cache)) for part in parts])


def _options_of(part: Method, options: Mapping[str, Any], of_cache: Mapping[str, Any]) -> dict[str, Any]:
    """The options that one method of a mix has, those of the cache before others of the same name."""
    mine = {**options, **of_cache} if part.family == KV_FAMILY else options
    return {key: value for key, value in mine.items() if key in part.options}


def kv_scheme(method: str | KVSpec, **options: Any) -> Scheme:
    """The scheme of :func:`kv_recipe`, or of a format, which may need a calibration that only a model's checkpoint carries.

    Args:
        method: a method, a method and its bits (``kivi:2``), or a format.
        options: of the method.

    Raises:
        ValueError: options of a format; see :func:`kv_recipe`.
    """
    if isinstance(method, KVSpec):
        if options:
            raise ValueError(f"a KVSpec says everything; leave out {', '.join(options)}, or name a method")
        return Scheme(kv=method)
    return kv_recipe(method, **options).scheme


def kv_recipe(method: str, **options: Any) -> Recipe:
    """The recipe of a cache alone.

    Args:
        method: a method, or a method and its bits (``kivi:2``).
        options: of the method.

    Raises:
        ValueError: an unknown method or option, or a method that does not say how a cache is held.
    """
    name, colon, bits = method.partition(":")
    if colon:
        if not bits.isdigit() or "bits" in options:
            raise ValueError(f"expected a method and its bits once, such as kivi:2; found {method!r} {options or ''}")
        options["bits"] = int(bits)
    made = recipe(name, **options)
    if made.scheme.rules or not made.scheme.cache:
        known = ", ".join(each.name for each in METHODS.values() if each.family == KV_FAMILY)
        raise ValueError(f"{name!r} is no method for caches; known: {known}")
    return made
