"""``lowbit import``: a model that another tool quantized, as a checkpoint of lowbit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import common

EXAMPLE = "Example: lowbit import model-Q4_K_M.gguf -o model-q4km"


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A .gguf file, or a directory or hub id of a model in compressed-tensors, GPTQ, AWQ or bitsandbytes.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The directory to write.")],
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Write a model that another tool quantized as a checkpoint of lowbit, bit for bit.

    Commands that run, measure or export a model take such a one as it is, and convert it into the cache. This one keeps the result.
    """
    import lowbit

    report = lowbit.export(source, "native", out=out, trust_remote_code=trust_remote_code)
    if as_json:
        common.print_json(report.to_dict())
    else:
        typer.echo(f"{report.out}: {report.layers} packed layers, {common.size(report.bytes)}")
