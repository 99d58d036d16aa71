"""``lowbit generate-data``: text that a model writes, as data for calibration and training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowbit.cli import common

if TYPE_CHECKING:
    from lowbit.data_generation import DataJob, GeneratedData

EXAMPLE = "Example: lowbit generate-data smollm2-135m --tokens 100000 --seq-len 256 -o written"
INTERRUPTED = "interrupted: repeat the same command to continue where it stopped"


def command(
    model: common.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the texts go; must be new.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in all; the last batch may give more.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Instead: this many times --seq-len tokens (default 32); with --prompts the most prompts."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a text at most, its prompt included.")] = 512,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Complete each prompt instead: one a line, or rows (.jsonl, .json, .csv, .parquet with a column text or messages, or "
            "FILE:COLUMN).",
        ),
    ] = None,
    strategy: Annotated[
        Literal["hybrid", "sampled", "greedy"] | None,
        typer.Option(
            help="hybrid: the likeliest tokens up to a prefix of 3 to 5, then drawn; sampled: drawn; greedy: the likeliest "
            "(default: hybrid, with --prompts sampled)."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of what is drawn (default 1, with --prompts 0.7).")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that have this share together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Texts side by side. A packed model writes one alone by its compiled step.")
    ] = 16,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run of the same target instead of continuing it.")
    ] = False,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Let a model write texts, and keep their token ids as data for calibration and training.

    Texts begin with a token of the vocabulary each, as in LLM-QAT, or complete prompts. DIR gets parquet shards of token ids
    beside text, what they were made from, and a report that names bad data. After a kill or Ctrl-C the same command continues.
    """
    common.use_threads(threads)
    from lowbit.data_generation import prepare_data, run_data

    job = prepare_data(
        model,
        out,
        tokens=tokens,
        samples=samples,
        seq_len=seq_len,
        prompts=prompts,
        strategy=strategy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch=batch,
        trust_remote_code=trust_remote_code,
    )
    _announce(job)
    with common.progress() as report:
        result = run_data(job, restart=restart, progress=report, on_open=common.say_found)
    if as_json:
        common.print_json(result.to_dict())
    else:
        _show(result, model)


def _announce(job: DataJob) -> None:
    asked = f"{job.tokens} tokens" if job.prompts is None else f"completions of {len(job.prompts)} prompts"
    drawn = job.sampling
    common.say(f"model:    {job.source.name} ({job.source.path})")
    common.say(f"texts:    {asked}, at most {job.seq_len} tokens each, {job.batch} side by side")
    common.say(
        f"strategy: {drawn.strategy}, temperature {drawn.temperature:g}, top_k {drawn.top_k}, top_p {drawn.top_p:g}, "
        f"seed {drawn.seed}"
    )
    common.say(f"target:   {job.out}")


def _show(result: GeneratedData, model: str) -> None:
    quality = result.quality
    table = common.table("measured", "", title=f"generated text -> {result.out}", numbers=("",))
    table.add_row("texts, tokens", f"{quality.texts}, {quality.tokens}")
    table.add_row(
        "tokens of a text: shortest, median, longest", f"{quality.shortest}, {quality.median:g}, {quality.longest}"
    )
    table.add_row("texts that the model ended itself", f"{quality.ended:.1%}")
    table.add_row("vocabulary that occurs", f"{quality.vocabulary:.1%}")
    for n, share in enumerate(quality.distinct, 1):
        table.add_row(f"{n}-grams that differ", f"{share:.1%}")
    table.add_row("4-grams repeated in their text", f"{quality.repeated:.1%}")
    table.add_row("tokens in loops", f"{quality.looping:.1%}")
    table.add_row("tokens of the longest loop", str(quality.longest_loop))
    table.add_row("texts that are copies", f"{quality.duplicates:.1%}")
    table.add_row("mean probability of the tokens", common.number(quality.confidence, ".3f"))
    common.show_table(table)
    common.warn(result.warnings)
    new, taken = result.new_tokens, common.duration(result.seconds)
    made = f"{quality.tokens} tokens, {new} of them by the model in {taken} ({result.tokens_per_second:.0f} a second)."
    place = shlex.quote(str(result.out))
    typer.echo(f"{made} Next: lowbit quantize {shlex.quote(model)} --method gptq --calibration {place} -o DIR")
