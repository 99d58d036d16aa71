"""``lowbit recommend``: the recipe that fits and lost least where it was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import common
from lowbit.cli.choose import byte_count

if TYPE_CHECKING:
    from lowbit.reporting.choices import Choice
    from lowbit.reporting.recommendation import Recommendation

EXAMPLE = "Example: lowbit recommend smollm2-135m --memory 150MB --engine lowbit --context 2048"


def command(
    model: common.Model,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="What weights and the cache may take together, such as 4GB or 512MiB.")
    ],
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="lowbit, vllm or llama.cpp: what runs the result.")
    ] = "lowbit",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens of the sequence whose cache is counted (default: 4096 or fewer)."
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Consider recipes that train the whole model too: hours, and its memory.")
    ] = False,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="X", help="Only methods that were timed and took at most X times the time of gptq."
        ),
    ] = None,
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Say what to take for a model, an engine and an amount of memory, and on which measurement that stands.

    Losses are measured on one small model; sizes are of yours, from its headers alone. Nothing is quantized.
    """
    limit = byte_count(memory)
    from lowbit.reporting.recommendation import recommend

    with common.progress() as report:
        result = recommend(
            model,
            limit,
            engine,
            context=context,
            train=train,
            patience=patience,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    if as_json:
        common.print_json(result.to_dict())
    else:
        _show(result)


def _show(result: Recommendation) -> None:
    title = f"{result.model}, {result.engine}, {common.size(result.memory)}, a sequence of {result.tokens} tokens"
    columns = ("weights", "format", "cache", "ln ratio", "size of weights", "of cache", "fits")
    table = common.table(*columns, title=title, numbers=("ln ratio", "size of weights", "of cache"))
    for choice, fits in ((result.chosen, "yes"), *((each, "no") for each in result.better)):
        table.add_row(*_cells(choice), fits)
    common.show_table(table)
    console = common.console()
    console.print(result.command, markup=False, soft_wrap=True)
    for reason in result.reasons:
        console.print(f"* {reason}", markup=False, soft_wrap=True)
    common.warn(result.warnings, kind="note")


def _cells(choice: Choice) -> tuple[str, ...]:
    cache = "as it is" if choice.cache is None else choice.cache.name
    loss = f"{'at most ' if choice.bound else ''}{choice.loss:.4f}"
    return (
        choice.row.label,
        choice.file_format,
        cache,
        loss,
        common.size(choice.weight_bytes),
        common.size(choice.cache_bytes),
    )
