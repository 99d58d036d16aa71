"""``lowbit methods``: what works here, where it is from, and its options."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lowbit.catalog import list_methods
from lowbit.cli import common, complete

EXAMPLE = "Example: lowbit methods; lowbit methods gptq"


def command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Say all about this method.", autocompletion=complete.methods),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """List the quantization methods, or say all about one: its paper, what it needs, its options with their defaults."""
    methods = {entry["name"]: entry for entry in list_methods()}
    if name is not None and name not in methods:
        from lowbit.numerics import nearest

        raise ValueError(f"no method {name!r}{nearest(name, list(methods))}")
    if as_json:
        common.print_json(list(methods.values()) if name is None else methods[name])
    elif name is not None:
        _show(methods[name])
    else:
        table = common.table("method", "what it does")
        for entry in methods.values():
            table.add_row(entry["name"], entry["summary"])
        common.show_table(table)
        common.say("lowbit methods NAME says all about one; a mix such as smoothquant+gptq is a method too")


def _show(entry: dict[str, Any]) -> None:
    typer.echo(f"{entry['name']} ({entry['family']}, {entry['paper'] or 'no paper'}): {entry['summary']}")
    typer.echo(f"Measures {', '.join(entry['needs'])} on calibration text." if entry["needs"] else "Needs no text.")
    table = common.table("option", "default")
    for key, value in entry["options"].items():
        table.add_row(key, value if isinstance(value, str) else json.dumps(value))  # as --set takes it
    common.show_table(table)
