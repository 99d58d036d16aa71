"""Recipe files: the ones that come along, and how any is read.

A file names a method and its options, or spells out a scheme and steps; both end in a :class:`~lowbit.recipes.Recipe`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lowbit.catalog import builtin_recipes
from lowbit.numerics import from_dict
from lowbit.recipes.recipe import Recipe, rebuilt
from lowbit.recipes.registry import recipe
from lowbit.scheme import FormatRule, Scheme, plain_message, validated


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _NamedFile(_File):
    """A recipe file that names a method (or a mix) and its options."""

    method: str
    options: dict[str, Any] = {}
    overrides: tuple[dict[str, Any], ...] = ()
    description: str = ""
    feed: Literal["fp", "quant"] | None = None
    seed: int | None = None
    model_steps: tuple[dict[str, Any], ...] | None = None


class _ExplicitFile(_File):
    """A recipe file that spells out its scheme and steps."""

    name: str
    scheme: tuple[dict[str, Any], ...]
    attention: dict[str, Any] | None = None
    steps: tuple[dict[str, Any], ...]
    overrides: tuple[dict[str, Any], ...] = ()
    description: str = ""
    feed: Literal["fp", "quant"] = "quant"
    seed: int = 0
    model_steps: tuple[dict[str, Any], ...] = ()


def from_plain(data: Any) -> Recipe:
    """A recipe from the data of a file: either ``method`` and ``options``, or ``scheme`` and ``steps``; with ``overrides``.

    Raises:
        ValueError: an unknown key, type or option, with the nearest known; a combination that cannot be.
    """
    if not isinstance(data, dict):
        raise ValueError(
            f"a recipe is a mapping with 'method' or with 'scheme' and 'steps', found {type(data).__name__}"
        )
    if "steps" not in data:
        named = validated(_NamedFile, data)
        changes = {key: getattr(named, key) for key in ("feed", "seed") if getattr(named, key) is not None}
        if named.model_steps is not None:
            changes["model_steps"] = tuple(from_dict(step) for step in named.model_steps)
        try:
            return rebuilt(recipe(named.method, **named.options), **changes).with_overrides(named.overrides)
        except ValidationError as error:
            raise ValueError(f"recipe {named.method!r}: {plain_message(error)}") from error
    explicit = validated(_ExplicitFile, data)
    rules = tuple(
        validated(FormatRule, {key: from_dict(value) for key, value in rule.items()}) for rule in explicit.scheme
    )
    try:
        built = Recipe(
            name=explicit.name,
            scheme=Scheme(rules=rules, attention=from_dict(explicit.attention)),
            steps=tuple(from_dict(step) for step in explicit.steps),
            feed=explicit.feed,
            seed=explicit.seed,
            model_steps=tuple(from_dict(step) for step in explicit.model_steps),
        )
    except ValidationError as error:
        raise ValueError(f"recipe {explicit.name!r}: {plain_message(error)}") from error
    return built.with_overrides(explicit.overrides)


class Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number, as everyone means it (YAML 1.1 asks for ``1.0e-3``)."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def from_file(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        ValueError: the file is missing, is not YAML, or does not hold a recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe file {str(path)!r}; `lowbit recipes` lists the ones that come along")
    try:
        return from_plain(yaml.load(path.read_text(), Loader))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def as_recipe(value: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from a recipe, a method's name (or a mix), a built-in recipe's name, a file or plain data."""
    if isinstance(value, Recipe):
        return value
    if isinstance(value, Mapping):
        return from_plain(dict(value))
    if str(value).endswith((".yaml", ".yml")):
        return from_file(value)
    if str(value) in builtin_recipes():
        return from_file(builtin_recipes()[str(value)])
    return recipe(str(value))
