"""``lowbit recipes``: the recipe files that come along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lowbit.cli import common

EXAMPLE = "Example: lowbit recipes; lowbit recipes NAME > mine.yaml"


def command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this recipe's file.")] = None,
    as_json: common.Json = False,
) -> None:
    """List the recipes that come along, or print one to start your own from."""
    from lowbit.numerics import nearest
    from lowbit.recipes import builtin_recipes

    files = builtin_recipes()
    if name is not None:
        if name not in files:
            raise ValueError(f"no recipe {name!r}{nearest(name, list(files))}")
        if as_json:
            common.print_json(_entry(name, files[name]))
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
    common.console().print(table, markup=False)


def _entry(name: str, file: Path) -> dict[str, Any]:
    """A file's content, with its name and its description up front; checked, so that none is listed that fails."""
    from lowbit.numerics import to_dict
    from lowbit.recipes import from_file

    data = yaml.safe_load(file.read_text())
    return {
        "name": name,
        "description": data.get("description", ""),
        "method": data.get("method"),
        "recipe": to_dict(from_file(file)),
    }
