"""``lowbit train``: what a recipe trains, on a checkpoint that is packed already, or behind its other stages on a model."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import common
from lowbit.cli.choose import KeepDtype, RamLimit, Settings, byte_count, choose_recipe, with_settings
from lowbit.cli.complete import methods

if TYPE_CHECKING:
    from lowbit.recipes import Recipe
    from lowbit.retraining import TrainJob, TrainReport

EXAMPLE = (
    "Example: lowbit train efficientqat smollm2-w3 --against smollm2-135m --text python-docs --tokens 65536 --seq-len 512 "
    "--set objective=original -o smollm2-w3-trained"
)
INTERRUPTED = "interrupted: repeat the same command to continue where it stopped"


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A method that trains, a mix (awq+bitdistiller), a recipe file, or a name from `lowbit recipes`.",
            autocompletion=methods,
        ),
    ],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint that lowbit quantize wrote, or a model as lowbit quantize takes it."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the result goes; must be new.")],
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            "--calibration",
            metavar="TEXT",
            help=common.TEXT_HELP.format(more=", a directory of generate-data"),
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="The original of a checkpoint, for recipes that compare with it."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=0, help="Tokens to train on (default: the recipe's).")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window, of calibration and of training.")] = 512,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows that pass through the model at once.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Keep so many likeliest tokens of the original instead of the original in memory."),
    ] = None,
    settings: Settings = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 32,
    bos: common.BeginWith = "auto",
    ram_limit: RamLimit = "4GiB",
    keep_dtype: KeepDtype = "auto",
    allow_broken: Annotated[bool, typer.Option("--allow-broken", help="Write a broken result all the same.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run of the same target instead of continuing it.")
    ] = False,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Train: a recipe's training stages alone on a packed checkpoint, or all its stages on a model.

    Of a checkpoint only what the recipe trains is changed; its formats stay. After a kill or Ctrl-C the same command continues.
    """
    started = time.perf_counter()
    chosen = _recipe(recipe, settings, {"tokens": tokens, "batch": batch, "lr": lr, "top_k": top_k})
    common.use_threads(threads)
    source = common.text_or_default(text, "calibration")
    windows: dict[str, Any] = {
        "samples": samples,
        "seq_len": seq_len,
        "bos": bos,
        "trust_remote_code": trust_remote_code,
    }
    if not _is_packed(model, trust_remote_code):
        if against is not None:
            raise ValueError(
                f"{model} is no checkpoint of lowbit. A model is its own original: leave --against out; what another tool has "
                "packed becomes a checkpoint by `lowbit import`"
            )
        from lowbit.cli.quantize import carry_out

        running = byte_count(ram_limit), None, allow_broken, restart
        more = {"keep_dtype": keep_dtype, "max_bits": math.inf}
        carry_out(model, chosen, source, out, "native", running, as_json, started, **windows, **more)
        return
    from lowbit.retraining import prepare_training, run_training
    from lowbit.training import leads

    job = prepare_training(model, chosen, source, out=out, against=against, **windows)
    if not leads():  # a process that trains along says nothing
        run_training(job)
        return
    _announce(job)
    said = tuple(job.warnings)
    with common.progress() as report:
        result = run_training(job, restart=restart, progress=report, on_open=common.say_found)
    if as_json:
        common.print_json(result.to_dict())
        return
    common.warn([warning for warning in result.warnings if warning not in said])
    typer.echo(_outcome(result, common.duration(time.perf_counter() - started), shlex.quote(str(out))))


def _recipe(name: str, settings: list[str] | None, given: dict[str, Any]) -> Recipe:
    from lowbit.catalog import builtin_recipes

    file = name.endswith((".yaml", ".yml")) or name in builtin_recipes()
    options = with_settings({}, settings, "--set")
    made = choose_recipe(None if file else name, name if file else None, options, ())
    return made.with_training(**{key: value for key, value in given.items() if value is not None})


def _is_packed(model: str, trust_remote_code: bool) -> bool:
    from lowbit.checkpoints import native
    from lowbit.checkpoints.locate import gguf_file, locate

    if gguf_file(model) is not None:
        return False
    _, path = locate(model, trust_remote_code=trust_remote_code)
    return native.is_native(native.read_checkpoint(path).config)


def _announce(job: TrainJob) -> None:
    names = ", ".join(type(stage.what).__name__ for stage in job.stages)
    common.say(f"checkpoint:  {job.source.name} ({job.source.path})")
    common.say(f"recipe:      {job.recipe.name}: trains {names}")
    read = job.calibration.ids if job.calibration.further is None else job.calibration.further
    common.say(f"text:        {job.calibration.name}, {' x '.join(map(str, read.shape))} tokens")
    common.say(f"target:      {job.out}")
    common.warn(job.warnings)


def _outcome(result: TrainReport, taken: str, out: str) -> str:
    said = f"cross-entropy {result.loss_before:.4f} before, {result.loss:.4f} after"
    if result.kl is not None and result.kl_before is not None:
        said += f"; KL from the original {result.kl_before:.4f} before, {result.kl:.4f} after"
    return f"{out}: {said} (nats a token, {result.measured_on}), in {taken}. Next: lowbit evaluate {out}"
