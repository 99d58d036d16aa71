"""What a shell offers after ``--method``, ``--kv``, ``--recipe`` and ``--table``, from the catalog alone: a shell asks at every press of the key."""

from __future__ import annotations

from importlib.resources import files

from lowbit.catalog import KV_FAMILY, builtin_recipes, list_methods


def methods(incomplete: str) -> list[tuple[str, str]]:
    """Names of methods with their summaries; in a mix such as ``smoothquant+g``, for its last part."""
    start, plus, part = incomplete.rpartition("+")
    return [
        (f"{start}{plus}{entry['name']}", entry["summary"])
        for entry in list_methods()
        if entry["name"].startswith(part)
    ]


def caches(incomplete: str) -> list[tuple[str, str]]:
    """Names of the methods for caches with their summaries."""
    return [
        (entry["name"], entry["summary"])
        for entry in list_methods()
        if entry["family"] == KV_FAMILY and entry["name"].startswith(incomplete)
    ]


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """Names of the recipes that come along. Where none fits, shells offer files."""
    return [(name, "") for name in builtin_recipes() if name.startswith(incomplete)]


def tables(incomplete: str) -> list[tuple[str, str]]:
    """Names of the papers' tables."""
    names = (entry.name.partition(".yaml") for entry in files("lowbit").joinpath("comparison", "tables").iterdir())
    return [(name, "") for name, suffix, _ in sorted(names) if suffix and name.startswith(incomplete)]


def recipes_and_methods(incomplete: str) -> list[tuple[str, str]]:
    return recipes(incomplete) + methods(incomplete)
