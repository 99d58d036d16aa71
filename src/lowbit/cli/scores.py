"""How the command line shows task scores, answers and verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lowbit.cli import common

if TYPE_CHECKING:
    from lowbit.evaluation import ChatScore, Metric, TaskScore, Verdict


def show_tasks(title: str, scores: Iterable[TaskScore]) -> None:
    """A row for each metric of each task; beside an original, what changed and whether by chance."""
    numbers = ("items", "value", "± s.e.", "95 % interval", "original", "change", "lost", "gained", "p")
    scores = tuple(scores)
    beside = any(metric.against for score in scores for metric in score.metrics)
    columns = numbers if beside else numbers[:4]
    table = common.table("task", "metric", *columns, title=title, numbers=columns)
    for score in scores:
        for metric in score.metrics:
            cells = (str(score.items), *_own(metric), *(_beside(metric) if beside else ()))
            table.add_row(score.task, metric.name, *cells)
    common.show_table(table)
    for protocol in dict.fromkeys(score.protocol for score in scores):
        common.console().print(f"{protocol}; s.e.: standard error", markup=False)
    if beside:
        common.console().print(
            "change: on the same items, with its 95 % interval; lost, gained: items that only the original, only this model answers "
            "right; p: McNemar's exact test",
            markup=False,
        )
    common.warn(
        f"{score.task}: {score.cut} of {score.items} items were cut to the model's positions"
        for score in scores
        if score.cut
    )


def show_chat(title: str, score: ChatScore, verdict: Verdict | None) -> None:
    """The figures, and all answers side by side."""
    table = common.table("answers", "", "95 % interval", title=title, numbers=("", "95 % interval"))
    table.add_row("KL along the original's answers, nats a token", common.number(score.kl), interval(score.kl_interval))
    table.add_row(
        "top-1 agreement along them", common.number(score.top1_agreement, ".1%"), interval(score.top1_interval, ".1%")
    )
    table.add_row("answers that are the original's", f"{score.same} of {len(score.answers)}", "")
    table.add_row("tokens before answers differ, median", f"{score.median_divergence:g}", "")
    table.add_row("repetition", f"{score.repetition:.1%}", "")
    table.add_row("the original's repetition", f"{score.repetition_original:.1%}", "")
    if verdict is not None:
        table.add_row(
            f"won, tied, lost by the judge {verdict.judge}", f"{verdict.won}, {verdict.tied}, {verdict.lost}", ""
        )
        table.add_row("pairs decided for it, for the original", "{}, {}".format(*verdict.decided), "")
        table.add_row("p of these, exact sign test", common.number(verdict.p_value), "")
        if verdict.unread:
            table.add_row("pairs left out: replies without two scores", str(verdict.unread), "")
    common.show_table(table)
    common.console().print(score.protocol, markup=False)
    for answer in score.answers:
        start = "the same answer" if answer.diverges_at is None else f"the same for {answer.diverges_at} tokens"
        screen = common.console()
        screen.print(f"\n> {answer.prompt}", style="bold", markup=False)
        screen.print(f"({start}; KL {answer.kl:.4g}, top-1 {answer.top1_agreement:.1%})", markup=False)
        screen.print(f"original: {answer.original.strip()}", markup=False, soft_wrap=True)
        screen.print(f"model:    {answer.model.strip()}", markup=False, soft_wrap=True)


def interval(given: tuple[float, float] | None, form: str = ".4g") -> str:
    """An interval for reading; ``-`` where there is none."""
    return "-" if given is None else f"{given[0]:{form}} to {given[1]:{form}}"


def _own(metric: Metric) -> tuple[str, str, str]:
    form = _form(metric)
    return format(metric.value, form), common.number(metric.stderr, form), interval(metric.interval, form)


def _beside(metric: Metric) -> tuple[str, ...]:
    other = metric.against
    if other is None:
        return ("",) * 5
    change = f"{other.difference:+.4g}" + ("" if other.interval is None else f" ({interval(other.interval, '+.4g')})")
    if other.p_value is None:
        return format(other.original, _form(metric)), change, "", "", ""
    counts = (str(len(other.lost)), str(len(other.gained)), common.number(other.p_value, ".3g"))
    return format(other.original, _form(metric)), change, *counts


def _form(metric: Metric) -> str:
    return ".4f" if metric.value <= 1 else ".5g"
