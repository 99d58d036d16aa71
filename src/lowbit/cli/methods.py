"""``lowbit methods``: what works here, where it is from, and its options."""

from __future__ import annotations

import json

from lowbit.catalog import list_methods
from lowbit.cli import common

EXAMPLE = "Example: lowbit methods --json"


def command(as_json: common.Json = False) -> None:
    """List the quantization methods with their papers, needs and options."""
    methods = list_methods()
    if as_json:
        common.print_json(methods)
        return
    table = common.table("method", "family", "paper", "needs", "what it does", "options and defaults")
    for entry in methods:
        options = ", ".join(f"{key}={_plain(value)}" for key, value in entry["options"].items())
        needs = ", ".join(entry["needs"]) or "nothing"
        table.add_row(entry["name"], entry["family"], entry["paper"] or "-", needs, entry["summary"], options)
    common.console().print(table, markup=False)


def _plain(value: object) -> str:
    """As --set takes it."""
    return value if isinstance(value, str) else json.dumps(value)
