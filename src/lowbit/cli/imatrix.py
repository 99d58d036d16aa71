"""``lowbit imatrix``: an importance matrix for llama.cpp's own encoder, or for a run without text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import common

EXAMPLE = "Example: lowbit imatrix smollm2-135m --calibration python-docs -o smollm2.imatrix.gguf"


def command(
    model: common.Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Ends in .gguf, or in .dat for llama.cpp before 2025.")
    ],
    calibration: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help=common.TEXT_HELP.format(more=", or self (the model's own samples)")),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    bos: common.BeginWith = "auto",
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Write the summed squares of every linear's inputs as an importance matrix of llama.cpp.

    llama-quantize --imatrix reads it, and so does lowbit quantize --method rtn --set importance=true --calibration FILE.
    The model is read a block at a time, as quantize does.
    """
    common.use_threads(threads)
    from lowbit.inspection import importance_matrix

    text = common.text_or_default(calibration, "calibration")
    common.say(f"calibration: {text}")
    with common.progress() as report:
        result = importance_matrix(
            model,
            text,
            out=out,
            samples=samples,
            seq_len=seq_len,
            bos=bos,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    common.warn(result.warnings)
    if as_json:
        found = {
            "out": str(out),
            "entries": len(result.entries),
            "chunks": result.chunks,
            "chunk_size": result.chunk_size,
        }
        common.print_json(found)
    else:
        typer.echo(f"{out}: {len(result.entries)} matrices, {result.chunks} x {result.chunk_size} tokens")
