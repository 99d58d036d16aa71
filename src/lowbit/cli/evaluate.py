"""``lowbit evaluate``: perplexity by a named protocol, and the distance to the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import common
from lowbit.cli.choose import KV, KVBits, KVSettings, choose_cache

if TYPE_CHECKING:
    from lowbit.evaluation import Evaluation

EXAMPLE = (
    "Example: lowbit evaluate smollm2-w4 --against smollm2-135m --text python-docs --protocol gptq "
    "--seq-len 1024 --windows 20 --kv kivi:2 --retrieval 1024,4096 --json"
)


def command(
    model: common.Model,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help=common.TEXT_HELP.format(more=""))] = None,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="gptq: disjoint windows. llama.cpp: the second half of each. word: lm-eval's word perplexity.",
        ),
    ] = "gptq",
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows from the start of the text; 0: the whole text.")] = 20,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original: measures KL divergence and top-1 agreement too.")
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens read at a time through a quantized cache (default: 1 to 32, as its window asks).",
        ),
    ] = None,
    retrieval: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Also find facts hidden in prompts of so many tokens, such as 1024,4096."),
    ] = None,
    generation: Annotated[bool, typer.Option("--generation", help="Also copy, count and add.")] = False,
    kv: KV = None,
    kv_bits: KVBits = None,
    kv_settings: KVSettings = None,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Measure a model: perplexity, and with --against KL divergence and top-1 agreement in the same pass.

    A model whose cache is quantized, by its checkpoint or by --kv, reads each window in chunks through that cache. Intervals are
    95 %. Figures compare only under the same protocol, window length and text.
    """
    formats = choose_cache(kv, kv_bits, kv_settings)
    lengths = [] if retrieval is None else [_length(part) for part in retrieval.split(",")]
    common.use_threads(threads)
    import lowbit

    chosen = common.text_or_default(text, "evaluation")
    common.say(f"text: {chosen}")
    with common.progress() as report:
        report(0, 1, "loading")
        result = lowbit.evaluate(
            model,
            chosen,
            protocol=protocol,
            seq_len=seq_len,
            windows=windows or None,
            against=against,
            kv=formats,
            chunk=chunk,
            retrieval=lengths,
            generation=generation,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    if as_json:
        common.print_json(result.to_dict())
    else:
        _show(model, result)
    if result.broken:
        raise ValueError(
            f"the model is broken: {result.broken_tokens} of {result.tokens} predictions are NaN or infinite; "
            "quantize it again with more bits or another method"
        )


def _length(text: str) -> int:
    if not text.strip().isdecimal():
        raise typer.BadParameter(
            f"expected numbers of tokens such as 1024,4096, found {text!r}", param_hint="--retrieval"
        )
    return int(text)


def _show(model: str, result: Evaluation) -> None:
    table = common.table("measured", "", "95 % interval", title=model, numbers=("", "95 % interval"))
    unit = " per word" if result.words is not None else ""
    table.add_row(f"perplexity{unit}", common.number(result.perplexity), _interval(result.perplexity_interval))
    if result.kl is not None:
        table.add_row("the original's perplexity", common.number(result.reference_perplexity), "")
        table.add_row(
            "log of perplexity over the original's",
            common.number(result.log_perplexity_difference),
            _interval(result.log_perplexity_difference_interval),
        )
        table.add_row("KL from the original, nats a token", common.number(result.kl), _interval(result.kl_interval))
        table.add_row(
            "top-1 agreement with the original",
            common.number(result.top1_agreement, ".1%"),
            _interval(result.top1_interval, ".1%"),
        )
    table.add_row("bits per weight, quantized linears", common.number(result.bits_per_weight), "")
    table.add_row("bits per weight, whole model", common.number(result.model_bits_per_weight), "")
    if result.cache_bits is not None:
        table.add_row("bits per number in the cache", common.number(result.cache_bits), "")
    table.add_row("weight files", "-" if result.bytes is None else common.size(result.bytes), "")
    common.show_table(table)
    if result.tasks:
        _show_tasks(result)
    common.console().print(
        f"{result.text}: {result.windows} windows of {result.seq_len} by protocol {result.protocol}, "
        f"{result.tokens} tokens predicted",
        markup=False,
    )


def _show_tasks(result: Evaluation) -> None:
    numbers = ("tokens", "answers", "right", "right, plain cache", "nats a token", "nats, plain cache")
    table = common.table("task", *numbers, numbers=numbers)
    for task in result.tasks:
        cells = (
            f"{task.solved:.0%}",
            f"{task.solved_floating:.0%}",
            common.number(task.nll),
            common.number(task.nll_floating),
        )
        table.add_row(task.name, str(task.tokens), str(task.answers), *cells)
    common.show_table(table)


def _interval(interval: tuple[float, float] | None, form: str = ".4g") -> str:
    return "-" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"
