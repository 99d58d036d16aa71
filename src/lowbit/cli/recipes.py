"""``lowbit recipes``: the recipe files that come along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.catalog import builtin_recipes
from lowbit.cli import common, complete

EXAMPLE = "Example: lowbit recipes; lowbit recipes NAME > mine.yaml"


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this recipe's file.", autocompletion=complete.recipes)
    ] = None,
    as_json: common.Json = False,
) -> None:
    """List the recipes that come along, or print one to start your own from."""
    files = builtin_recipes()
    if name is not None:
        if name not in files:
            from lowbit.numerics import nearest

            raise ValueError(f"no recipe {name!r}{nearest(name, list(files))}")
        if as_json:
            from lowbit.numerics import to_dict
            from lowbit.recipes import from_file

            common.print_json(_entry(name, files[name]) | {"recipe": to_dict(from_file(files[name]))})
        else:
            typer.echo(files[name].read_text(), nl=False)
        return
    entries = [_entry(name, file) for name, file in files.items()]
    if as_json:
        common.print_json(entries)
        return
    table = common.table("recipe", "method", "what for")
    for entry in entries:
        table.add_row(entry["name"], entry["method"] or "-", entry["description"])
    common.show_table(table)


def _entry(name: str, file: Path) -> dict[str, Any]:
    """A file's name, description and method, as written. The recipe itself is not built, which would import torch."""
    import yaml

    data = yaml.safe_load(file.read_text())
    return {"name": name, "description": data.get("description", ""), "method": data.get("method")}
