"""Tasks of lm-eval by name: those of the hub where one answers, and yaml files of one's own. Extra ``harness``.

A packed model is given to lm-eval as a loaded transformers model, which it is, so lm-eval's own code makes the prompts and the scores.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lowbit.evaluation.forward import evaluating, protocol_name, rows_are_alone
from lowbit.evaluation.paired import Metric, TaskScore, metric_of, perplexity_of
from lowbit.modules import kv_formats

BATCH = 8  # requests in a batch


def score_with_lm_eval(
    model: PreTrainedModel,
    tokenizer: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    directory: str | PathLike[str] | None = None,
) -> tuple[TaskScore, ...]:
    """Runs lm-eval's tasks on a model in memory, without examples.

    Args:
        model: a transformers causal LM, quantized or not.
        tokenizer: its tokenizer.
        names: of tasks or groups of tasks, as ``lm-eval ls tasks`` lists them, or of yaml files in ``directory``.
        limit: items of each task; None: all.
        directory: yaml files of tasks, besides lm-eval's own.

    Raises:
        ValueError: no lm-eval, an unknown task, data that cannot be had, or a model that reads through a quantized cache, which lm-eval
            would not use.
    """
    lm_eval = imported()
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if kv_formats(model):
        raise ValueError(
            "the model's cache is quantized, and lm-eval reads texts without a cache: use --kv none, or local files with --task-files DIR"
        )
    manager = TaskManager(include_path=None if directory is None else str(Path(directory).expanduser()))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists what it has")
    limit_of_model = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=limit_of_model,
        batch_size=BATCH if rows_are_alone(model) else 1,
    )
    try:
        with evaluating(model):
            found = lm_eval.simple_evaluate(
                wrapped, tasks=list(names), num_fewshot=0, limit=limit, task_manager=manager, bootstrap_iters=0
            )
    except (OSError, ConnectionError) as error:
        raise ValueError(
            f"lm-eval could not get the data of {', '.join(names)} ({type(error).__name__}: {error}): without a hub give local files "
            "with --task-files DIR"
        ) from error
    assert found is not None
    title = protocol_name(model, f"lm-eval {lm_eval.__version__}, no examples")
    return tuple(_score(name, title, samples, found["results"][name]) for name, samples in found["samples"].items())


def imported() -> Any:
    """The module ``lm_eval``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "tasks of the hub run through lm-eval, which is not installed: pip install 'lowbit[harness]', or give local files "
            "with --task-files DIR"
        ) from error
    return lm_eval


def _score(name: str, protocol: str, samples: list[Mapping[str, Any]], totals: Mapping[str, Any]) -> TaskScore:
    """lm-eval's record of a task: every metric that has one number for each item."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    first = [sample for sample in ordered if sample.get("filter") == ordered[0].get("filter")]
    metrics = []
    for metric in first[0].get("metrics", ()):
        values = [sample[metric] for sample in first]
        if all(isinstance(value, int | float | bool | np.number) for value in values):
            made = perplexity_of if metric == "perplexity" else metric_of
            metrics.append(_checked(made(metric, [float(value) for value in values]), totals))
    if not metrics:
        raise ValueError(
            f"task {name} has no figure for each item (it has {', '.join(map(str, totals))}); run lm-eval itself"
        )
    asked = json.dumps([[sample["arguments"], sample["target"]] for sample in first], sort_keys=True, default=str)
    broken = sum(any(_is_nan(answer) for answer in sample.get("filtered_resps", ())) for sample in first)
    sha256 = hashlib.sha256(asked.encode()).hexdigest()
    return TaskScore(name, protocol, len(first), sha256, tuple(metrics), broken=broken)


def _is_nan(answer: Any) -> bool:
    """Whether an answer is a log-likelihood that is NaN, or begins with one."""
    first = answer[0] if isinstance(answer, list | tuple) and answer else answer
    return isinstance(first, float) and math.isnan(first)


def _checked(metric: Metric, totals: Mapping[str, Any]) -> Metric:
    """The metric, whose value must be lm-eval's own.

    Raises:
        ValueError: lm-eval sums this metric in another way.
    """
    theirs = next((value for key, value in totals.items() if key.split(",")[0] == metric.name), None)
    if theirs is not None and not np.isclose(theirs, metric.value, rtol=1e-6, equal_nan=True):
        raise ValueError(
            f"lm-eval gives {metric.name} = {theirs}, and its items' mean is {metric.value}: run lm-eval itself"
        )
    return metric
