"""``lowbit evaluate``: perplexity by a named protocol, zero-shot tasks, answers; all beside the original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import common
from lowbit.cli.choose import KV, KVBits, KVSettings, choose_cache
from lowbit.cli.scores import interval, show_chat, show_tasks

if TYPE_CHECKING:
    from lowbit.evaluation import Evaluation

WINDOWS: dict[str, Any] = {"protocol": "gptq", "seq_len": 1024, "windows": 20}  # the help names these three too
ANSWER_TOKENS, JUDGE = 128, "gpt-4"
AFTER_BROKEN = "check its files or, if it was quantized, quantize it again with more bits or another method"
EXAMPLE = (
    "Example: lowbit evaluate smollm2-w4 --against smollm2-135m --text python-docs --protocol gptq "
    "--seq-len 1024 --windows 20 --kv kivi:2 --retrieval 1024,4096 --json"
)


def command(
    model: common.Model,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help=common.TEXT_HELP.format(more=""))] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="gptq (default): disjoint windows. llama.cpp: the second half of each. word: lm-eval's word perplexity. ptb, c4: "
            "rows joined as GPTQ's code joins those of PTB and C4.",
        ),
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens in a window (default 1024).")] = None,
    windows: Annotated[
        int | None, typer.Option(min=0, help="Windows from the start of the text (default 20); 0: the whole text.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The original: measures KL divergence and top-1 agreement too; for --tasks any model."
        ),
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
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Zero-shot tasks, such as piqa,arc_easy: from --task-files, else by lm-eval from the hub. Perplexity is then measured "
            "only with --text.",
        ),
    ] = None,
    task_files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Holds NAME.jsonl (query, choices, gold) or passages.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Items of each task, from its first (default: all).")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Compare answers with those of --against; perplexity only with --text.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts of --chat, one a line (default: a dozen).")
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of an answer of --chat (default 128).")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible endpoint that judges the answers of --chat, such as http://localhost:8000/v1; its key is in "
            "OPENAI_API_KEY.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The judging model's name there (default gpt-4).")
    ] = None,
    kv: KV = None,
    kv_bits: KVBits = None,
    kv_settings: KVSettings = None,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Measure a model: perplexity, and with --against KL divergence and top-1 agreement in the same pass.

    With --tasks zero-shot tasks, with --chat answers to prompts; both beside the original of --against, item by item. A model whose
    cache is quantized, by its checkpoint or by --kv, reads each window in chunks through that cache. Intervals are 95 %. Figures
    compare only under the same protocol, window length and text.
    """
    formats = choose_cache(kv, kv_bits, kv_settings)
    lengths = [] if retrieval is None else [_length(part) for part in retrieval.split(",")]
    if chat and against is None:
        raise typer.BadParameter("answers are compared with the original's: give --against MODEL", param_hint="--chat")
    _check_needs("--tasks", tasks is not None, {"--task-files": task_files, "--limit": limit})
    _check_needs("--chat", chat, {"--prompts": prompts, "--judge": judge, "--answer-tokens": answer_tokens})
    _check_needs("--judge", judge is not None, {"--judge-model": judge_model})
    with_text = text is not None or bool(lengths) or generation or not (tasks or chat)
    of_windows: dict[str, Any] = {"protocol": protocol, "seq_len": seq_len, "windows": windows, "chunk": chunk}
    asked_windows = {f"--{name.replace('_', '-')}": value for name, value in of_windows.items()}
    _check_needs("--text, because only perplexity is measured on windows of a text", with_text, asked_windows)
    common.use_threads(threads)
    import lowbit

    if judge is not None:
        from lowbit.evaluation import check_judge

        check_judge(judge, judge_model or JUDGE)
    from lowbit.evaluation.forward import NOTHING_PACKED

    names = None if tasks is None else _names(tasks)
    asked = _asked(prompts, model, trust_remote_code) if chat else ()
    _check_tasks(names or (), task_files, limit)
    shared = {"against": against, "kv": formats, "trust_remote_code": trust_remote_code}
    result = verdict = score = unjudged = None
    scores = ()
    with common.progress() as report:
        report(0, 1, "loading")
        if with_text:
            chosen = common.text_or_default(text, "evaluation")
            common.say(f"text: {chosen}")
            how = WINDOWS | {name: value for name, value in of_windows.items() if value is not None}
            how["windows"] = how["windows"] or None
            checks: dict[str, Any] = {"retrieval": lengths, "generation": generation}
            result = lowbit.evaluate(model, chosen, **how, **checks, **shared, progress=report)
        if names is not None:
            scores = lowbit.evaluate_tasks(model, names, task_files, limit=limit, **shared, progress=report)
        if chat:
            from lowbit.evaluation import judge_answers

            longest = answer_tokens or ANSWER_TOKENS
            score = lowbit.evaluate_chat(model, prompts=asked, max_new_tokens=longest, **shared, progress=report)
            if judge is not None:
                try:
                    verdict = judge_answers(score.answers, judge, judge_model or JUDGE, progress=report)
                except ValueError as error:
                    unjudged = error  # the answers are shown all the same
    if as_json:
        found: dict[str, Any] = {} if result is None else result.to_dict()
        found |= {"tasks": {each.task: each.to_dict() for each in scores}} if scores else {}
        found |= {} if score is None else {"chat": score.to_dict()}
        common.print_json(found | ({} if verdict is None else {"judge": verdict.to_dict()}))
    else:
        if result is not None:
            _show(model, result)
        if scores:
            show_tasks(model, scores)
        if score is not None:
            show_chat(model, score, verdict)
    if result is not None and NOTHING_PACKED in result.protocol:
        common.warn(
            ["these figures tell nothing of the quantized cache: the windows are too short, use a longer --seq-len"]
        )
    if unjudged is not None:
        raise unjudged
    if result is not None and result.broken:
        raise ValueError(
            f"the model is broken: {result.broken_tokens} of {result.tokens} predictions are NaN or infinite; "
            + AFTER_BROKEN
        )
    if broken := [f"{each.task} ({each.broken} of {each.items} items)" for each in scores if each.broken]:
        raise ValueError(
            f"the model is broken: it gave NaN in {', '.join(broken)}, which count as wrong; {AFTER_BROKEN}"
        )


# An error behind the pass over a text would lose its figures, so tasks and prompts are read before it.


def _check_tasks(names: Sequence[str], files: Path | None, limit: int | None) -> None:
    from lowbit.evaluation import harness, read_tasks

    if files is not None:
        read_tasks(names, files, limit)
    elif names:
        harness.imported()


def _asked(prompts: Path | None, model: str, trust_remote_code: bool) -> tuple[str, ...]:
    import lowbit
    from lowbit.evaluation import check_chat, read_prompts

    check_chat(lowbit.load_tokenizer(model, trust_remote_code=trust_remote_code))
    return read_prompts(prompts)


def _check_needs(option: str, given: bool, others: dict[str, Any]) -> None:
    if not given and (alone := [name for name, value in others.items() if value is not None]):
        raise typer.BadParameter(f"it goes with {option}", param_hint=alone[0])


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("expected names such as piqa,arc_easy", param_hint="--tasks")
    return names


def _length(text: str) -> int:
    if not text.strip().isdecimal():
        raise typer.BadParameter(
            f"expected numbers of tokens such as 1024,4096, found {text!r}", param_hint="--retrieval"
        )
    return int(text)


def _show(model: str, result: Evaluation) -> None:
    table = common.table("measured", "", "95 % interval", title=model, numbers=("", "95 % interval"))
    unit = " per word" if result.words is not None else ""
    table.add_row(f"perplexity{unit}", common.number(result.perplexity), interval(result.perplexity_interval))
    if result.kl is not None:
        table.add_row("the original's perplexity", common.number(result.reference_perplexity), "")
        table.add_row(
            "log of perplexity over the original's",
            common.number(result.log_perplexity_difference),
            interval(result.log_perplexity_difference_interval),
        )
        table.add_row("KL from the original, nats a token", common.number(result.kl), interval(result.kl_interval))
        table.add_row(
            "top-1 agreement with the original",
            common.number(result.top1_agreement, ".1%"),
            interval(result.top1_interval, ".1%"),
        )
    table.add_row("bits per weight, quantized linears", common.number(result.bits_per_weight), "")
    table.add_row("bits per weight, whole model", common.number(result.model_bits_per_weight), "")
    if result.cache_bits is not None:
        table.add_row("bits per number in the cache", common.number(result.cache_bits), "")
    table.add_row("weight files", "-" if result.bytes is None else common.size(result.bytes), "")
    common.show_table(table)
    if result.checks:
        _show_checks(result)
    common.console().print(
        f"{result.text}: {result.windows} windows of {result.seq_len} by protocol {result.protocol}, "
        f"{result.tokens} tokens predicted",
        markup=False,
    )


def _show_checks(result: Evaluation) -> None:
    numbers = ("tokens", "answers", "right", "right, plain cache", "nats a token", "nats, plain cache")
    table = common.table("check", *numbers, numbers=numbers)
    for check in result.checks:
        cells = (
            f"{check.solved:.0%}",
            f"{check.solved_floating:.0%}",
            common.number(check.nll),
            common.number(check.nll_floating),
        )
        table.add_row(check.name, str(check.tokens), str(check.answers), *cells)
    common.show_table(table)
