"""Rows of a comparison, each a label and a recipe: from a grid file, from methods and options, or from Python.

A grid file is a YAML list, so a long table is one text file that can be read and diffed::

    - {label: "gptq, W4 g64", method: gptq, bits: 4, group_size: 64}
    - {label: mine, recipe: mine.yaml}

In a row with ``method``, all keys but ``label`` and ``overrides`` are options of the method; they may also be a mapping
``options``. Every row becomes a recipe before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from lowbit.modules import KVSpec
from lowbit.numerics import PerChannel, PerGroup
from lowbit.recipes import Recipe, as_recipe, recipe
from lowbit.recipes.files import Loader
from lowbit.rows import text_of

ORIGINAL = "original"
"""The label of the unquantized model."""


@dataclass(frozen=True)
class Row:
    """A label, and the recipe that the row measures; ``of`` is the label that rows of several seeds share."""

    label: str
    recipe: Recipe
    of: str | None = None


def as_rows(rows: str | PathLike[str] | Iterable[Row | Recipe | str | PathLike[str] | Mapping[str, Any]]) -> list[Row]:
    """Rows from a grid file, or from rows, recipes, methods' names, recipe files and mappings as in a grid file.

    Raises:
        ValueError: the first invalid row, by its place and label; two rows with one label; no rows.
    """
    if isinstance(rows, str | PathLike):
        return read_grid(rows)
    return _checked([_named(i, entry, Path()) for i, entry in enumerate(rows, start=1)], "the comparison")


def read_grid(path: str | PathLike[str]) -> list[Row]:
    """The rows of a grid file. A recipe file that it names is looked for next to it first.

    Raises:
        ValueError: a file that is missing or is no YAML list, and as :func:`as_rows`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no grid file {str(path)!r}")
    try:
        entries = yaml.load(text_of(path), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(
            f"{path}: a grid is a list of rows such as '- {{label: a, method: gptq, bits: 4}}', "
            f"found {type(entries).__name__}"
        )
    try:
        return _checked([_named(i, entry, path.parent) for i, entry in enumerate(entries, start=1)], str(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def method_rows(methods: Iterable[str], bits: Iterable[int | None], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every method at every width, as entries of a grid file. A width of None is the method's default."""
    widths = [{} if each is None else {"bits": each} for each in bits]
    return [{"method": method, **width, **options} for width in widths for method in methods]


def with_seeds(rows: Iterable[Row], seeds: Sequence[int]) -> list[Row]:
    """Each row once with each seed; without seeds, the rows.

    Raises:
        ValueError: a seed twice.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {', '.join(map(str, seeds))}: give each once")
    return [
        Row(f"{row.label}, seed {seed}", replace(row.recipe, seed=seed), row.label) for row in rows for seed in seeds
    ] or list(rows)


def label_of(recipe: Recipe) -> str:
    """A recipe's name, its first format and its cache's, such as ``gptq, W4 g64`` and ``kivi, K2V2``."""
    return ", ".join(filter(None, (_weights_label(recipe), _cache_label(recipe.scheme.kv))))


def _cache_label(spec: KVSpec | None) -> str:
    if spec is None:
        return ""
    key, value = (16 if side is None else side.grid.bits for side in (spec.key, spec.value))
    return f"K{key:g}V{value:g}"


def _weights_label(recipe: Recipe) -> str:
    rule = next((rule for rule in recipe.scheme.rules if rule.weight is not None), None)
    if rule is None or rule.weight is None:
        return recipe.name
    act = "" if rule.activation is None else f"A{rule.activation.spec.grid.bits:g}"
    grain = rule.weight.granularity
    shared = {PerGroup: f" g{getattr(grain, 'size', '')}", PerChannel: " per channel"}.get(type(grain), "")
    return f"{recipe.name}, W{rule.weight.grid.bits:g}{act}{shared}"


def _named(place: int, entry: Any, folder: Path) -> Row:
    label = entry.get("label") if isinstance(entry, Mapping) else None
    try:
        return _row(entry, folder)
    except ValueError as error:
        raise ValueError(f"row {place}{'' if label is None else f' ({label})'}: {error}") from error


def _row(entry: Any, folder: Path) -> Row:
    if isinstance(entry, Row):
        return entry
    if isinstance(entry, Recipe):
        return Row(label_of(entry), entry)
    if isinstance(entry, str | PathLike):
        recipe_of_row = as_recipe(Path(entry) if isinstance(entry, PathLike) else entry)
        is_file = str(entry).endswith((".yaml", ".yml"))
        return Row(Path(entry).stem if is_file else label_of(recipe_of_row), recipe_of_row)
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected a mapping with 'method' or 'recipe', found {entry!r}")
    options = dict(entry)
    label, method, source = (options.pop(key, None) for key in ("label", "method", "recipe"))
    overrides, apart = options.pop("overrides", ()), options.pop("options", {})  # as in a recipe file
    if not isinstance(apart, Mapping) or apart.keys() & options.keys():
        raise ValueError(
            f"expected the method's options once, beside 'method' or as a mapping 'options', found {entry!r:.200}"
        )
    options |= apart
    if (method is None) == (source is None):
        raise ValueError(f"expected either 'method' with its options or 'recipe', found {', '.join(map(str, entry))}")
    if source is not None and options:
        raise ValueError(f"a recipe has its own options; found {', '.join(map(str, options))} next to it")
    if label is not None and not isinstance(label, str):
        raise ValueError(f"a label is text, found {label!r}")
    built = recipe(str(method), **options) if source is None else as_recipe(_beside(source, folder))
    return Row(label or label_of(built), built.with_overrides(overrides))


def _beside(source: Any, folder: Path) -> Any:
    return folder / source if isinstance(source, str) and (folder / source).is_file() else source


def _checked(rows: list[Row], where: str) -> list[Row]:
    if not rows:
        raise ValueError(f"{where} has no rows")
    seen: set[str] = set()
    for row in rows:
        if row.label in seen:
            raise ValueError(f"two rows are called {row.label!r}; give each a label of its own")
        if row.label == ORIGINAL or not row.label.strip() or "\n" in row.label:
            raise ValueError(f"a row cannot be called {row.label!r}: choose a line of text other than {ORIGINAL!r}")
        seen.add(row.label)
    return rows
