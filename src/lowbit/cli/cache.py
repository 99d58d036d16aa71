"""``lowbit cache``: converted GGUF files in the user's cache, listed or removed."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lowbit.cli import common

EXAMPLE = "Example: lowbit cache list; lowbit cache clear"


def command(
    action: Annotated[Literal["list", "clear"], typer.Argument(help="Show what is there, or remove all of it.")],
    as_json: common.Json = False,
) -> None:
    """List or remove the converted GGUF files in the cache (LOWBIT_CACHE). They are made again when they are needed.

    Models from a hub are in the hub's own cache, not here.
    """
    from lowbit.checkpoints.gguf_reader import cache_directory, conversions, remove_conversion
    from lowbit.evaluation import directory_bytes

    entries = [{"path": str(path), "bytes": directory_bytes(path).total} for path in conversions()]
    if action == "clear":
        for path in conversions():
            remove_conversion(path)
    if as_json:
        common.print_json(entries)
        return
    verb = "removed " if action == "clear" else ""
    for entry in entries:
        typer.echo(f"{verb}{entry['path']}  {common.size(entry['bytes'])}")
    total = common.size(sum(entry["bytes"] for entry in entries))
    common.say(f"{cache_directory()}: {len(entries)} converted GGUF files, {total}")
