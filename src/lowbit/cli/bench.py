"""``lowbit bench``: how fast packed products and models run on this machine."""

from __future__ import annotations

import json
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
        str, typer.Option(metavar="OUTxIN,...", help="Shapes of products: OUTxIN, or a model's name such as llama-7b.")
    ] = "4096x4096,11008x4096",
    bits: Annotated[str, typer.Option(metavar="N,...", help="Widths of the weights.")] = "8,4,3,2,1",
    rows: Annotated[str, typer.Option(metavar="N,...", help="Tokens multiplied at once.")] = "1",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, for a model.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated, for a model.")] = 32,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Also written here, and as FILE.md.")
    ] = None,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Measure speed: products by kernel with --kernels, or a whole model's prefill and decode.

    Products are compared with torch's own in bfloat16 and float32 and with the speed of memory, in turns in one run.
    """
    common.use_threads(threads)
    if (model is None) == (not kernels):
        raise typer.BadParameter("give a model to measure, or --kernels; not both")
    result = _of_model(str(model), prompt_tokens, new_tokens) if model else _of_kernels(shapes, bits, rows, group_size)
    from lowbit import __version__
    from lowbit.evaluate.machine import machine

    result |= {"machine": machine(), "lowbit": __version__}
    text = _markdown(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(text)
    if as_json:
        common.print_json(result)
    else:
        common.console().print(text, markup=False, soft_wrap=True)


def _numbers(text: str, what: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{what} are whole numbers such as 4,3,2; found {text!r}")
    return tuple(int(part) for part in parts)


def _of_kernels(shapes: str, bits: str, rows: str, group_size: int) -> dict[str, Any]:
    from lowbit.evaluate.kernels import measure_kernels, shape_of

    chosen = tuple(dict.fromkeys(shape for text in shapes.split(",") for shape in shape_of(text.strip())))
    with common.progress() as report:
        found = measure_kernels(chosen, _numbers(bits, "bits"), _numbers(rows, "rows"), group_size, progress=report)
    return {"kernels": [speed.to_dict() for speed in found]}


def _of_model(model: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    import lowbit
    from lowbit.evaluate import measure_speed
    from lowbit.evaluate.memory import model_bytes, peak_rss

    with common.progress() as report:
        report(0, 1, "loading")
        loaded = lowbit.load(model)
        weights = model_bytes(loaded)
        speed = measure_speed(loaded, prompt_tokens, new_tokens, progress=report)
    about = {"model": model, "dtype": str(loaded.dtype).removeprefix("torch.")}
    return {"model": about | {"weight_memory": weights, "running_memory": peak_rss()} | speed.to_dict()}


def _markdown(result: dict[str, Any]) -> str:
    lines = []
    if "kernels" in result:
        lines += [
            "| shape | tokens | bits | group | input | kernel | µs | GB/s | share of memory | x bf16 | x fp32 | x torch int4 |",
            "|---|---:|---:|---:|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for k in result["kernels"]:
            group = "channel" if k["group_size"] is None else k["group_size"]
            int4 = "" if k["speedup_int4"] is None else f"{k['speedup_int4']:.2f}"
            lines.append(
                f"| {k['shape']} | {k['rows']} | {k['bits']} | {group} | {k['input']} | {k['kernel']} | {k['us']:.0f} | "
                f"{k['gb_per_s']:.1f} | {k['bandwidth_share']:.2f} | {k['speedup_bf16']:.2f} | {k['speedup_fp32']:.2f} | {int4} |"
            )
    else:
        m = result["model"]
        lines += [
            "| model | type | weights in memory | running memory | prefill, tokens/s | decode, tokens/s |",
            "|---|---|---:|---:|---:|---:|",
            f"| {m['model']} | {m['dtype']} | {common.size(m['weight_memory'])} | {common.size(m['running_memory'])} | "
            f"{m['prefill_tokens_per_s']:.1f} | {m['decode_tokens_per_s']:.1f} |",
        ]
    about = result["machine"]
    lines += ["", f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, lowbit {result['lowbit']}"]
    return "\n".join(lines) + "\n"
