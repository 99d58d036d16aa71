"""``lowbit bench``: how fast packed products and models run on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli import common

EXAMPLE = "Example: lowbit bench --kernels --shapes 4096x4096 --bits 8,4,3,2 --json"


def command(
    model: Annotated[
        str | None, typer.Argument(help="A packed checkpoint, or any model; left out with --kernels.", metavar="MODEL")
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Measure single products.")] = False,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="With --kernels: shapes of products, OUTxIN or the name of a model's sizes such as llama-7b. Without: "
            "names; a model of random weights is built packed for each.",
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="N,...", help="Widths of the weights; for random models 16 too: not packed.")
    ] = None,
    rows: Annotated[str, typer.Option(metavar="N,...", help="Tokens multiplied at once.")] = "1",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, for a model.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated, for a model.")] = 32,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Also written here, and as FILE.md.")
    ] = None,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Measure speed: products by kernel with --kernels, or a whole model's prefill and decode and its memory.

    A model is a checkpoint, or with --shapes one of a known size with random weights: lowbit bench --shapes llama-7b.

    Products are compared with torch's own in bfloat16 and float32 and with the speed of memory, in turns in one run.
    """
    common.use_threads(threads)
    if [model is not None, kernels, shapes is not None and not kernels].count(True) != 1:
        raise typer.BadParameter("give a model to measure, or --kernels, or --shapes with the names of sizes; not both")
    if kernels:
        result = _of_kernels(shapes or "4096x4096,11008x4096", bits or "8,4,3,2,1", rows, group_size)
    elif model is not None:
        result = {"models": [_of_model(model, prompt_tokens, new_tokens, trust_remote_code)]}
    else:
        widths = _numbers(bits or "16,4,3,2", "bits")
        result = {"models": _of_sizes(str(shapes).split(","), widths, group_size, prompt_tokens, new_tokens, threads)}
    from lowbit import __version__
    from lowbit.evaluation.machine import machine
    from lowbit.whole_file import write_whole_text

    result |= {"machine": machine(), "lowbit": __version__}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole_text(out, json.dumps(result, indent=1) + "\n")
        write_whole_text(out.with_suffix(".md"), _markdown(result))
    if as_json:
        common.print_json(result)
    else:
        _show(result)


def _numbers(text: str, what: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{what} are whole numbers such as 4,3,2; found {text!r}")
    return tuple(int(part) for part in parts)


def _of_kernels(shapes: str, bits: str, rows: str, group_size: int) -> dict[str, Any]:
    from lowbit.evaluation.kernels import measure_kernels, shape_of

    chosen = tuple(dict.fromkeys(shape for text in shapes.split(",") for shape in shape_of(text.strip())))
    with common.progress() as report:
        speeds = measure_kernels(chosen, _numbers(bits, "bits"), _numbers(rows, "rows"), group_size, progress=report)
    return {"kernels": [speed.to_dict() for speed in speeds]}


def _of_model(model: str, prompt_tokens: int, new_tokens: int, trust_remote_code: bool) -> dict[str, Any]:
    import lowbit

    with common.progress() as report:
        report(0, 1, "loading")
        loaded = lowbit.load(model, trust_remote_code=trust_remote_code)
        return _timed(loaded, {"model": model}, prompt_tokens, new_tokens, report)


def _of_sizes(
    names: list[str], widths: tuple[int, ...], group_size: int, prompt_tokens: int, new_tokens: int, threads: int | None
) -> list[dict[str, Any]]:
    from lowbit.architectures.shapes import named_config

    for name in names:
        named_config(name)
    if len(names) * len(widths) == 1:
        return [_of_size(names[0], widths[0], group_size, prompt_tokens, new_tokens)]
    speeds = []
    for name in names:
        for width in widths:  # each in a process of its own, which alone tells its memory
            common.say(f"{name}, {width} bits")
            about = ["--shapes", name, "--bits", width, "--group-size", group_size]
            about += ["--prompt-tokens", prompt_tokens, "--new-tokens", new_tokens, "--json"]
            about += ["--threads", threads] if threads else []
            run = [sys.executable, "-m", "lowbit", "bench", *map(str, about)]
            done = subprocess.run(run, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise typer.Exit(done.returncode)
            speeds += json.loads(done.stdout)["models"]
    return speeds


def _of_size(name: str, width: int, group_size: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    from lowbit.architectures.shapes import named_config
    from lowbit.evaluation.random_model import random_model

    with common.progress() as report:
        model = random_model(named_config(name), width, group_size, progress=report)
        about = {"model": f"{name}, random", "bits": width, "group_size": group_size if width < 16 else None}
        return _timed(model, about, prompt_tokens, new_tokens, report)


def _timed(model: Any, about: dict[str, Any], prompt_tokens: int, new_tokens: int, report: Any) -> dict[str, Any]:
    from lowbit import decoding
    from lowbit.evaluation import measure_speed
    from lowbit.evaluation.memory import model_bytes, peak_rss

    weights = model_bytes(model)
    speed = measure_speed(model, prompt_tokens, new_tokens, progress=report)
    about |= {"dtype": str(model.dtype).removeprefix("torch."), "weight_memory": weights}
    about |= {"token_step": decoding.explain(model)}
    return about | {"running_memory": peak_rss()} | speed.to_dict()


KERNEL_COLUMNS = ("shape", "tokens", "bits", "group", "input", "kernel", "µs", "GB/s", "share of memory")
KERNEL_COLUMNS += ("x bf16", "x fp32", "x torch int4")
MODEL_COLUMNS = (
    "model",
    "bits",
    "type",
    "weights in memory",
    "running memory",
    "prefill, tokens/s",
    "decode, tokens/s",
)
_TEXT = ("shape", "input", "kernel", "model", "type")


def _cells(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Names of columns, and a row of texts for each measurement."""
    if "kernels" not in result:
        return MODEL_COLUMNS, [_model_cells(speed) for speed in result["models"]]
    return KERNEL_COLUMNS, [_kernel_cells(speed) for speed in result["kernels"]]


def _kernel_cells(k: dict[str, Any]) -> tuple[str, ...]:
    group = "channel" if k["group_size"] is None else str(k["group_size"])
    figures = (f"{k['us']:.0f}", f"{k['gb_per_s']:.1f}", f"{k['bandwidth_share']:.2f}")
    ratios = (f"{k['speedup_bf16']:.2f}", f"{k['speedup_fp32']:.2f}")
    int4 = "" if k["speedup_int4"] is None else f"{k['speedup_int4']:.2f}"
    return (k["shape"], str(k["rows"]), str(k["bits"]), group, k["input"], k["kernel"], *figures, *ratios, int4)


def _model_cells(m: dict[str, Any]) -> tuple[str, ...]:
    memory = common.size(m["weight_memory"]), common.size(m["running_memory"])
    speeds = f"{m['prefill_tokens_per_s']:.1f}", f"{m['decode_tokens_per_s']:.2f}"
    return (m["model"], str(m.get("bits", "")), m["dtype"], *memory, *speeds)


def _remarks(result: dict[str, Any]) -> list[str]:
    """How new tokens were computed, and the machine."""
    about = result["machine"]
    steps = dict.fromkeys(m["token_step"] for m in result.get("models", ()))
    return [*steps, f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, lowbit {result['lowbit']}"]


def _markdown(result: dict[str, Any]) -> str:
    columns, rows = _cells(result)
    lines = [f"| {' | '.join(columns)} |", "|" + "".join("---|" if name in _TEXT else "---:|" for name in columns)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *_remarks(result)]) + "\n"


def _show(result: dict[str, Any]) -> None:
    columns, rows = _cells(result)
    table = common.table(*columns, numbers=tuple(name for name in columns if name not in _TEXT))
    for row in rows:
        table.add_row(*row)
    common.show_table(table)
    for line in _remarks(result):
        typer.echo(line)
