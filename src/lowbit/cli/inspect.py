"""``lowbit inspect``: where a model is hard to quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import common

if TYPE_CHECKING:
    from lowbit.inspection import Inspection

EXAMPLE = "Example: lowbit inspect smollm2-135m --calibration python-docs --samples 8 -o smollm2-inspection"
ROWS = 10  # of each table; the files have all


def command(
    model: common.Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the table and the plots go; must be new.")
    ],
    calibration: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help=common.TEXT_HELP.format(more=", or self (the model's own samples)")),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 8,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    bos: common.BeginWith = "auto",
    page: common.Page = None,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Find outlier channels, massive tokens and the hardest layers; write a table and plots.

    The model is read a block at a time, as quantize does. A checkpoint of lowbit is loaded whole, and seen as its packed weights read
    their inputs: a report on both shows outliers before and after. Its layers have no error, so none is the hardest.
    """
    common.use_threads(threads)
    common.check_page(page)
    from lowbit.inspection import inspect_model

    text = common.text_or_default(calibration, "calibration")
    common.say(f"calibration: {text}")
    with common.progress() as report:
        result = inspect_model(
            model,
            text,
            samples=samples,
            seq_len=seq_len,
            bos=bos,
            out=out,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    if as_json:
        common.print_json(result.to_dict())
    else:
        _show(result)
    common.write_page(page, out)


def _show(result: Inspection) -> None:
    console = common.console()
    hard = common.table(
        "hardest layers",
        "output error at 4 bits",
        "weights from",
        "to",
        numbers=("output error at 4 bits", "weights from", "to"),
    )
    for row in result.hardest[:ROWS]:
        hard.add_row(row.name, common.number(row.error), common.number(row.weight_min), common.number(row.weight_max))
    wide = common.table(
        "widest inputs",
        "largest",
        "median channel",
        "outlier channels",
        "massive tokens",
        numbers=("largest", "median channel", "outlier channels", "massive tokens"),
    )
    for row in sorted(result.inputs, key=lambda row: -row.largest / max(row.median_channel, 1e-30))[:ROWS]:
        figures = common.number(row.largest), common.number(row.median_channel)
        wide.add_row(row.name, *figures, str(len(row.outliers)), str(len(row.massive)))
    for table in (hard, wide):
        if table.rows:
            common.show_table(table)
    for file in result.files:
        console.print(str(file), markup=False, soft_wrap=True)
    common.warn(result.warnings)
