"""Zero-shot tasks from local files, scored as lm-eval scores them: accuracy, and accuracy by length-normalized likelihood.

A file ``NAME.jsonl`` has one item a line, in one of three forms::

    {"query": "Question: ...", "choices": ["...", "..."], "gold": 0}
    {"context_options": ["... Sarah", "... Maria"], "continuation": "was late.", "gold": 1}
    {"text": "A passage of which the model must say the last word"}

``gold`` counts from 0. In the second form the text before the blank differs and what follows is scored, as in WinoGrande; the third,
also a file ``NAME.txt`` with a passage on each line, is LAMBADA's (:mod:`lowbit.evaluation.last_word`).

An item is right (``acc``) where its gold choice has the highest log-likelihood, and (``acc_norm``) where it has the highest one for
each of its characters. The names in :data:`PROMPTS` get the prompts and the metrics of lm-eval's tasks of the same name; others are
asked as their file has them. Nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lowbit.evaluation.forward import protocol_name
from lowbit.evaluation.last_word import last_word, last_word_metrics
from lowbit.evaluation.likelihood import Likelihood, Request, likelihoods
from lowbit.evaluation.paired import Metric, TaskScore, metric_of
from lowbit.progress import Progress, silent
from lowbit.rows import lines_of, text_of


@dataclass(frozen=True)
class Prompt:
    """How a file's query becomes the prompt of lm-eval's task.

    Attributes:
        end: what follows the query.
        without: what the file's queries begin with and lm-eval's do not.
        normalized: whether the task has ``acc_norm``.
    """

    end: str = ""
    without: str = ""
    normalized: bool = True


_ASKED = "\nAnswer:"
PROMPTS = {
    "piqa": Prompt(_ASKED),
    "arc_easy": Prompt(_ASKED),
    "arc_challenge": Prompt(_ASKED),
    "boolq": Prompt(_ASKED, without="Passage: ", normalized=False),
    "hellaswag": Prompt(),
    "winogrande": Prompt(normalized=False),
}
"""The tasks of the papers' tables."""


@dataclass(frozen=True)
class Item:
    """One question: a request for each choice, the characters of each choice, and the right one."""

    requests: tuple[Request, ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A task that was read.

    Attributes:
        name: of the file, without its suffix.
        items: in the file's order.
        metrics: from the items' likelihoods to the figures.
        scoring: what the protocol is called.
        sha256: of the items.
    """

    name: str
    items: tuple[Item, ...]
    metrics: Callable[[Sequence[Item], Sequence[Sequence[Likelihood]]], tuple[Metric, ...]]
    scoring: str
    sha256: str

    @property
    def text(self) -> str:
        """All that the model reads, for a check of leakage."""
        return "\n".join("".join(request) for item in self.items for request in item.requests)


def read_tasks(names: Iterable[str], directory: str | PathLike[str], limit: int | None = None) -> tuple[Task, ...]:
    """The tasks of ``directory`` with these names.

    Args:
        names: of files, without suffix.
        directory: holds ``NAME.jsonl`` or ``NAME.txt``.
        limit: items of each task, from its first; None: all.

    Raises:
        ValueError: a name without a file, two files with one name, or a row that is no item, with its line.
    """
    folder = Path(directory).expanduser()
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: ask for at least 1 item, or leave it out for all")
    found: dict[str, list[Path]] = {}
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such directory"
        raise ValueError(f"{folder}: {what}; expected a directory that holds NAME.jsonl or NAME.txt for each task")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".jsonl", ".txt"):
            found.setdefault(path.stem, []).append(path)
    tasks = []
    for name in dict.fromkeys(names):
        match found.get(name, []):
            case [path]:
                tasks.append(_read(name, path, limit))
            case []:
                raise ValueError(
                    f"{folder} has no file {name}.jsonl or {name}.txt; it has {', '.join(found) or 'no tasks'}"
                )
            case paths:
                raise ValueError(f"task {name} is in {' and '.join(path.name for path in paths)}: keep one of them")
    return tuple(tasks)


def score_task(model: PreTrainedModel, tokenizer: Any, task: Task, *, progress: Progress = silent) -> TaskScore:
    """Asks the model every item of ``task``.

    Args:
        model: a transformers causal LM, quantized or not.
        tokenizer: its tokenizer.
        task: from :func:`read_tasks`.
        progress: called as ``progress(items done, items, what)``.
    """
    answers = []
    for answer in likelihoods(model, tokenizer, (item.requests for item in task.items)):
        progress(len(answers), len(task.items), task.name)
        answers.append(answer)
    progress(len(task.items), len(task.items), task.name)
    return TaskScore(
        task=task.name,
        protocol=protocol_name(model, f"{task.scoring}, no examples"),
        items=len(task.items),
        sha256=task.sha256,
        metrics=task.metrics(task.items, answers),
        cut=sum(any(each.cut for each in answer) for answer in answers),
        broken=sum(any(np.isnan(each.nats) for each in answer) for answer in answers),
    )


def _read(name: str, path: Path, limit: int | None) -> Task:
    """The task in ``path``. Its first row says the form of all."""
    lines = [line for line in lines_of(text_of(path)) if line.strip()][:limit]
    rows = [{"text": line} if path.suffix == ".txt" else _row(path, i, line) for i, line in enumerate(lines, start=1)]
    if not rows:
        raise ValueError(f"{path}: no items")
    prompt = PROMPTS.get(name, Prompt())
    items = []
    for number, row in enumerate(rows, start=1):
        try:
            items.append(_item(row, prompt))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, item {number}: expected query, choices and gold, or context_options, continuation and gold, or text, "
                f"found {', '.join(map(str, row))} ({error})"
            ) from error
    if len({"text" in row for row in rows}) > 1:
        raise ValueError(f"{path}: some items have choices and some are passages; make it two files")
    lines_read = json.dumps([[item.requests, item.gold] for item in items])
    made = Task(
        name,
        tuple(items),
        _choice_metrics,
        "lm-eval's multiple choice",
        hashlib.sha256(lines_read.encode()).hexdigest(),
    )
    if "text" in rows[0]:
        return replace(made, metrics=_passage_metrics, scoring="lm-eval's last word (LAMBADA)")
    normalized = prompt.normalized and "query" in rows[0]
    return made if normalized else replace(made, metrics=_accuracy_alone)


def _row(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, item {number}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, item {number}: expected a JSON object, found {line[:60]}")
    return row


def _item(row: Mapping[str, Any], prompt: Prompt) -> Item:
    if len(forms := [key for key in ("text", "context_options", "choices") if key in row]) > 1:
        raise ValueError(f"{' and '.join(forms)} are of different forms")
    if "text" in row:
        return Item((last_word(_text(row, "text")),), (1,), 0)
    if "context_options" in row:
        before, after = _texts(row["context_options"]), _text(row, "continuation").strip()
        if not after:
            raise ValueError("the continuation is empty")
        requests = tuple(Request(text, f" {after}") for text in before)
        lengths = (len(after),) * len(before)
    else:
        choices = _texts(row["choices"])
        context = _text(row, "query").removeprefix(prompt.without)
        context = context.rstrip("\n") + prompt.end if prompt.end else context
        requests, lengths = tuple(Request(context, f" {choice}") for choice in choices), tuple(map(len, choices))
    gold = row["gold"]
    if type(gold) is not int or not 0 <= gold < len(requests) or len(requests) < 2:
        raise ValueError(f"gold is {gold!r} for {len(requests)} choices; it counts from 0")
    return Item(requests, lengths, gold)


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"{key} is a text, found {row[key]!r}")
    return row[key]


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise TypeError(f"choices are a list of texts, found {value!r}")
    return value


def _choice_metrics(items: Sequence[Item], answers: Sequence[Sequence[Likelihood]]) -> tuple[Metric, ...]:
    by_length = [
        _right([each.nats / length for each, length in zip(answer, item.lengths, strict=True)], item.gold)
        for item, answer in zip(items, answers, strict=True)
    ]
    return (*_accuracy_alone(items, answers), metric_of("acc_norm", by_length))


def _accuracy_alone(items: Sequence[Item], answers: Sequence[Sequence[Likelihood]]) -> tuple[Metric, ...]:
    right = [_right([each.nats for each in answer], item.gold) for item, answer in zip(items, answers, strict=True)]
    return (metric_of("acc", right),)


def _passage_metrics(items: Sequence[Item], answers: Sequence[Sequence[Likelihood]]) -> tuple[Metric, ...]:
    return last_word_metrics([answer[0] for answer in answers])


def _right(scores: Sequence[float], gold: int) -> bool:
    """Whether the gold choice has the highest score, the first of equal ones; NaN anywhere is wrong."""
    return not np.isnan(scores).any() and int(np.argmax(scores)) == gold
