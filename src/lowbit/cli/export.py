"""``lowbit export``: a finished checkpoint, written in a file format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import common

EXAMPLE = "Example: lowbit export smollm2-w4 --format native -o smollm2-w4-copy"


def command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="A checkpoint of lowbit or in another format, a .gguf file, or a hub id; for gguf also an ordinary model.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The directory to write.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="native, gguf, compressed-tensors, gptq, awq, bitsandbytes or peft (low-rank terms as an adapter beside the base); "
            "gguf:f16 (f32, bf16) for a model that is not quantized. "
            "lowbit plan says which can hold what a recipe makes.",
        ),
    ] = "native",
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Write a finished checkpoint in a file format, bit for bit.

    One layer is read at a time. Nothing exists under the target's name before it is whole.
    """
    import lowbit

    report = lowbit.export(checkpoint, format, out=out, trust_remote_code=trust_remote_code)
    if as_json:
        common.print_json(report.to_dict())
    else:
        typer.echo(
            f"{report.out}: {report.layers} packed layers in format {report.format}, {common.size(report.bytes)}"
        )
        if report.note:
            typer.echo(report.note)
