"""``lowbit quantize``: a model and a recipe in, a packed and measured checkpoint out."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import common
from lowbit.cli.beside_format import check_format
from lowbit.cli.choose import (
    KV,
    ActivationBits,
    Bits,
    EmbeddingBits,
    FormatName,
    GroupSize,
    HeadBits,
    KeepDtype,
    KVBits,
    KVSettings,
    MethodOption,
    Overrides,
    RamLimit,
    RecipeOption,
    SchemeName,
    Settings,
    byte_count,
    choose_recipe,
    method_options,
    outside_overrides,
)

if TYPE_CHECKING:
    from lowbit.job import Job
    from lowbit.recipes import Recipe
    from lowbit.report import QuantizeReport
    from lowbit.stages.journal import Journal

EXAMPLE = (
    "Example: lowbit quantize smollm2-135m --method gptq --bits 4 --group-size 64 --set act_order=true "
    "--override down:bits=8 --kv kivi --kv-bits 4 --calibration python-docs --samples 32 --seq-len 512 -o smollm2-w4"
)
INTERRUPTED = "interrupted: repeat the same command to continue where it stopped"
WORST = 5  # layers named in the table
_LONGEST = 60  # characters of a match in a line
_MOST_RULES = 4  # of a scheme in that line; an allocation has dozens


def command(
    model: common.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the checkpoint goes; must be new.")],
    method: MethodOption = None,
    recipe: RecipeOption = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    activation_bits: ActivationBits = None,
    embedding_bits: EmbeddingBits = None,
    head_bits: HeadBits = None,
    scheme: SchemeName = None,
    settings: Settings = None,
    kv: KV = None,
    kv_bits: KVBits = None,
    kv_settings: KVSettings = None,
    overrides: Overrides = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=common.TEXT_HELP.format(
                more=", a directory of generate-data, self (the model's own text), an importance matrix of llama.cpp "
                "(rtn with importance=true), or none where the method needs no text"
            ),
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    bos: common.BeginWith = "auto",
    ram_limit: RamLimit = "4GiB",
    keep_dtype: KeepDtype = "auto",
    max_kl: Annotated[
        float | None,
        typer.Option(min=0, help="Mean KL divergence in nats from which the result counts as broken (default 2)."),
    ] = None,
    max_bits: Annotated[
        float | None, typer.Option(help="Stored bits for each quantized weight above which a recipe is refused.")
    ] = None,
    allow_broken: Annotated[bool, typer.Option("--allow-broken", help="Write a broken result all the same.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run of the same target instead of continuing it.")
    ] = False,
    format: FormatName = "native",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Solve blocks on a Ray cluster: its address, auto, or local. Only where blocks do not depend on each other, as with "
            "methods that read no text; the result has the same bytes.",
        ),
    ] = None,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Quantize a model and write it packed, measured, and ready to load.

    The model is read a block at a time, and each finished block is on disk before the next begins: after a kill or
    Ctrl-C the same command continues where it stopped. A result that is broken is refused, with the layers to blame.
    """
    started = time.perf_counter()
    limit = byte_count(ram_limit)
    changes = [*(overrides or ()), *outside_overrides(embedding_bits, head_bits)]
    options = method_options(bits, group_size, activation_bits, settings, scheme)
    outside = {"embedding_bits": embedding_bits, "head_bits": head_bits}
    check_format(format, method, options, settings, overrides, scheme=scheme, **outside)
    chosen = choose_recipe(method, recipe, options, changes, (kv, kv_bits, kv_settings))
    common.use_threads(threads)
    text = None if calibration == "none" else common.text_or_default(calibration, "calibration")
    settings_of_run = {
        "samples": samples,
        "seq_len": seq_len,
        "bos": bos,
        "keep_dtype": keep_dtype,
        "max_bits": math.inf if max_bits is None else max_bits,
        "trust_remote_code": trust_remote_code,
    }
    carry_out(
        model,
        chosen,
        text,
        out,
        format,
        (limit, max_kl, allow_broken, restart),
        as_json,
        started,
        ray=ray,
        **settings_of_run,
    )


def carry_out(
    model: str,
    recipe: Recipe,
    text: str | None,
    out: Path,
    format: str,
    running: tuple[int, float | None, bool, bool],
    as_json: bool,
    started: float,
    *,
    ray: str | None = None,
    **prepared: Any,
) -> None:
    """The whole run, with what is said about it.

    Args:
        running: bytes of activations in memory, the divergence that counts as broken (None: the usual), whether a broken result is
            written, whether an unfinished run is discarded.
        started: when the command began.
        ray: as of :func:`lowbit.quantize`.
        prepared: further arguments of :func:`lowbit.job.prepare`.
    """
    from lowbit.job import prepare
    from lowbit.pipeline import exported, run
    from lowbit.report import MAX_KL
    from lowbit.training import leads

    limit, max_kl, allow_broken, restart = running
    job = prepare(model, recipe, text, out=out, format=format, **prepared)
    if not leads():  # a process that trains along says nothing
        run(job, limit, MAX_KL, allow_broken, restart)
        return
    _announce(job)
    found: list[str | None] = []

    def opened(journal: Journal) -> None:
        found.append(journal.found)
        blocks = len(job.plan.blocks)
        done = min(blocks, len(journal.section(job.recipe.walk_number).finished))
        common.say_found(journal, f": finished blocks: {done} of {blocks}" if job.recipe.changes_weights else "")

    with common.progress() as report:
        max_kl = MAX_KL if max_kl is None else max_kl
        result = run(job, limit, max_kl, allow_broken, restart, report, ray, opened)
        trust = prepared["trust_remote_code"]
        result = exported(result, format, out.expanduser().resolve(), trust_remote_code=trust)
    if as_json:
        common.print_json(result.to_dict())
    else:
        _show(result)
        taken = common.duration(time.perf_counter() - started) + (
            " since it was continued" if "continuing" in found else ""
        )
        typer.echo(_outcome(result, taken, job.tokenizer, shlex.quote(str(out))))


def _announce(job: Job) -> None:
    """Says what will be done, from what, to where."""
    text = job.calibration
    common.say(f"model:       {job.source.name} ({job.source.path})")
    common.say(f"recipe:      {job.recipe.name}: {describe(job.recipe)}")
    said = job.calibrated_on if text is None else f"{text.name}, {' x '.join(map(str, text.ids.shape))} tokens"
    common.say(f"calibration: {said}")
    if text is not None and text.quality is not None:
        common.say(f"written:     {text.quality.summary}")
    if text is not None and text.further is not None:
        common.say(
            f"training:    {' x '.join(map(str, text.further.shape))} tokens of it, not of the calibration windows"
        )
    common.warn(job.warnings)  # before hours of work, and once more at its end
    common.say(f"target:      {job.out}")


def describe(recipe: Recipe) -> str:
    """The formats of a recipe in a line, such as ``weights int4 asymmetric, groups of 64``; rules for some layers by match."""
    from lowbit.plan.cache import cache_texts
    from lowbit.plan.layers import activation_text, weight_text

    parts, rules = [], recipe.scheme.rules
    for rule in rules[:_MOST_RULES]:
        where = "" if rule.match == "*" else f"{rule.match[:_LONGEST]}{'...' * (len(rule.match) > _LONGEST)}: "
        weight = "left as they are" if rule.skip or rule.weight is None else f"weights {weight_text(rule.weight)}"
        inputs = "" if rule.activation is None else f", inputs {activation_text(rule.activation)}"
        parts.append(where + weight + inputs)
    if len(rules) > _MOST_RULES:
        parts.append(f"{len(rules) - _MOST_RULES} more rules for some layers")
    return "; ".join([*parts, *cache_texts(recipe.scheme.cache)])


def _show(result: QuantizeReport) -> None:
    table = common.table("measured", "", title=f"{result.recipe.name} -> {result.out}", numbers=("",))
    if result.layers:
        table.add_row("bits per weight, asked", f"{result.asked_bits:.4g}")
        table.add_row("bits per weight, quantized linears", f"{result.bits_per_weight:.4f}")
    if result.cache_bits is not None:
        table.add_row("bits per number in the cache", f"{result.cache_bits:.4g}")
    table.add_row("bits per weight, whole model", f"{result.model_bits_per_weight:.4f}")
    table.add_row("original's weights", common.size(result.source_bytes))
    table.add_row("weight files", common.size(result.bytes))
    table.add_row("share of block weights quantized", f"{result.coverage:.1%}")
    table.add_row("KL from the original, nats a token", common.number(result.kl))
    table.add_row("top-1 agreement with the original", common.number(result.top1_agreement, ".1%"))
    if result.outside_cost is not None:
        table.add_row("of it for the packed embedding and head", f"{result.outside_cost:.2g}")
    if result.worst_layers:
        table.add_section()
    for layer in result.worst_layers[:WORST]:
        table.add_row(f"output error of {layer.name}", common.number(layer.error))
    common.show_table(table)
    if result.kl is not None:
        common.say(f"KL and agreement are measured on {result.measured_on}.")
    common.warn((*result.problems, *result.warnings))


def _outcome(result: QuantizeReport, taken: str, tokenizer: Any, out: str) -> str:
    """What came of it in a line, and the next command."""
    parts = [f"{result.bits_per_weight:.3g} bits per weight in the quantized linears"] if result.layers else []
    parts += [f"{result.model_bits_per_weight:.3g} in the whole model" if parts else "weights as they were"]
    parts += [] if result.cache_bits is None else [f"{result.cache_bits:.3g} bits per number in the cache"]
    line = f"{common.size(result.source_bytes)} to {common.size(result.bytes)} in {taken} ({', '.join(parts)})."
    if tokenizer is None:
        return line
    chats = getattr(tokenizer, "chat_template", None)
    return f"{line} Next: " + (f"lowbit chat {out}" if chats else f'lowbit generate {out} --prompt "Once upon a time"')
