"""``lowbit merge-adapter``: a LoRA adapter put into the packed weights of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import common

EXAMPLE = "Example: lowbit merge-adapter smollm2-nf4 adapter --text python-docs -o smollm2-nf4-merged"


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint that lowbit quantize wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Where the result goes; must be new.")],
    adapter: Annotated[
        Path | None,
        typer.Argument(
            metavar="[ADAPTER]",
            help="A directory that peft's save_pretrained wrote; without it, the low-rank terms that DIR stores.",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help=common.TEXT_HELP.format(more=""))] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of the text to measure on.")] = 8,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Merge a LoRA adapter into packed weights, and measure what that loses.

    The merged weights have the bits that they had, so part of the adapter is rounded away.
    """
    common.use_threads(threads)
    from lowbit.merging import merge_adapter

    chosen = common.text_or_default(text, "evaluation")
    with common.progress() as report:
        result = merge_adapter(
            checkpoint,
            adapter,
            out,
            chosen,
            samples=samples,
            seq_len=seq_len,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    if as_json:
        common.print_json(result.to_dict())
        return
    common.warn(result.warnings)
    typer.echo(
        f"{result.out}: {result.layers} packed layers merged; {result.kl:.3g} nats a token from the model with the adapter beside it "
        f"({result.agreement:.1%} top-1 agreement), of {result.adapter_kl:.3g} that the adapter changes; on {result.measured_on}"
    )
