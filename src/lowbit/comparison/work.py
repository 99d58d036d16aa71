"""The work of one row: quantize, reload packed, measure.

It runs in a process of its own (:mod:`lowbit.comparison.child`).

The values here are pickled to that process, so they hold requests and nothing loaded.
"""

from __future__ import annotations

import math
import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoints import native
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.checkpoints.tokenizer import load_tokenizer
from lowbit.data import Calibration
from lowbit.evaluation import (
    Evaluation,
    KeptOriginal,
    TaskScore,
    directory_bytes,
    evaluate_model,
    keep_states,
    measure_speed,
    paired,
    peak_rss,
    read_tasks,
    score_task,
)
from lowbit.job import prepare
from lowbit.pipeline import run
from lowbit.recipes import Recipe
from lowbit.report import MAX_KL, QuantizeReport

ShareReport = Callable[[float, str], None]
"""``progress(share, what)`` with the finished share of the row, 0 to 1."""

QUANTIZING = 0.85
"""Share of a row's time for quantizing, for the progress bar. Methods that learn take more, rtn less."""


STATES, ANSWERS = "states", "answers.pickle"
"""The folder of the original's hidden states, and the file of its task scores."""
PROMPT_TOKENS, NEW_TOKENS = 128, 16
"""Of the measure of speed."""


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison share.

    Attributes:
        model: the original's local directory.
        text: the text itself, its documents, or ids.
        tasks: names of zero-shot tasks in ``task_files``, of which ``limit`` items are asked.
        speed: whether tokens per second are measured too.
    """

    model: Path
    text: str | Sequence[str] | Tensor
    text_name: str
    protocol: str
    seq_len: int
    windows: int | None
    ram_limit: int
    trust_remote_code: bool
    tasks: tuple[str, ...] = ()
    task_files: Path | None = None
    limit: int | None = None
    speed: bool = False

    def source(self) -> ModelSource:
        return open_model(self.model, trust_remote_code=self.trust_remote_code)

    def evaluate(self, model: Any, against: KeptOriginal | None, progress: ShareReport) -> Evaluation:
        return evaluate_model(
            model,
            self.text,
            None if isinstance(self.text, Tensor) else self._tokenizer(),
            self.protocol,
            self.seq_len,
            self.windows,
            against=against,
            text_name=self.text_name,
            progress=lambda done, total, what: progress(done / total, what),
        )

    def more(self, model: Any, progress: ShareReport) -> tuple[dict[str, Any], tuple[TaskScore, ...]]:
        """What is measured besides perplexity: the figures of speed, and the scores of the tasks."""
        scores: list[TaskScore] = []
        if self.tasks and self.task_files is not None:
            tokenizer = self._tokenizer()

            def report(done: float, total: float, what: str) -> None:
                progress((len(scores) + done / total) / len(self.tasks), what)

            for task in read_tasks(self.tasks, self.task_files, self.limit):
                scores.append(score_task(model, tokenizer, task, progress=report))
        return {"speed": measure_speed(model, PROMPT_TOKENS, NEW_TOKENS).to_dict()} if self.speed else {}, tuple(scores)

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class MeasureOriginal:
    """Evaluates the original, and keeps in ``scratch`` the hidden states and the answers that every row is compared with."""

    setting: Setting
    scratch: Path

    def run(self, progress: ShareReport) -> dict[str, Any]:
        started = time.perf_counter()
        source = self.setting.source()
        with keep_states(model := source.load_full(), self.scratch / STATES):
            result = self.setting.evaluate(model, None, progress)
        if result.broken:
            raise ValueError("the original model's own logits are NaN or infinite: there is nothing to compare with")
        more, scores = self.setting.more(model, progress)
        (self.scratch / ANSWERS).write_bytes(pickle.dumps(scores))
        size = directory_bytes(source.path).weights
        return (
            _figures(result)
            | more
            | _tasks(scores)
            | {
                "model_bits_per_weight": native.model_bits_per_weight(source.path),
                "bytes": size,
                "evaluate_seconds": _since(started),
                "peak_rss_bytes": peak_rss(),
            }
        )


@dataclass(frozen=True)
class MeasureRow:
    """Quantizes by one recipe, and evaluates the packed model read back from disk.

    Attributes:
        scratch: what :class:`MeasureOriginal` kept.
        place: the row's own folder.
        calibration: what the recipe reads; None: no text.
    """

    setting: Setting
    scratch: Path
    place: Path
    recipe: Recipe
    calibration: Calibration | None

    def run(self, progress: ShareReport) -> dict[str, Any]:
        if not (self.scratch / ANSWERS).is_file():
            raise ValueError(
                f"{self.scratch} is not on this machine: --scratch must lie on a file system that all machines share"
            )
        out = self.place / "quantized"
        shutil.rmtree(out, ignore_errors=True)  # left by a row that crashed
        started = time.perf_counter()
        report = self._quantize(out, progress)
        seconds, quantize_peak = _since(started), peak_rss()
        started = time.perf_counter()
        model = native.load(out, dtype="float32", trust_remote_code=self.setting.trust_remote_code)
        original = KeptOriginal(self.setting.source(), self.scratch / STATES)
        rest = 1 - QUANTIZING
        result = self.setting.evaluate(model, original, lambda done, what: progress(QUANTIZING + rest * done, what))
        more, scores = self.setting.more(model, lambda done, what: progress(1.0, what))
        answers = pickle.loads((self.scratch / ANSWERS).read_bytes())
        compared = [paired.against(score, other) for score, other in zip(scores, answers, strict=True)]
        record = (
            _figures(result)
            | more
            | _tasks(compared)
            | {
                "asked_bits": report.asked_bits,
                "bits_per_weight": native.bits_per_weight(model),
                "cache_bits": report.cache_bits,
                "model_bits_per_weight": native.model_bits_per_weight(out),
                "bytes": directory_bytes(out).weights,
                "coverage": report.coverage,
                "calibration_kl": report.kl,
                "quantize_seconds": seconds,
                "evaluate_seconds": _since(started),
                "quantize_peak_rss_bytes": quantize_peak,
                "peak_rss_bytes": peak_rss(),
                "problems": _problems(report, result, scores),
                "warnings": list(report.warnings),
            }
        )
        shutil.rmtree(out)
        return record

    def _quantize(self, out: Path, progress: ShareReport) -> QuantizeReport:
        setting, last = self.setting, 0.0

        def forward(done: float, total: float, what: str) -> None:
            nonlocal last  # each phase starts at 0, the row does not
            last = max(last, QUANTIZING * done / total if total else 0.0)
            progress(last, what)

        job = prepare(
            setting.model, self.recipe, self.calibration, out=out, trust_remote_code=setting.trust_remote_code
        )
        return run(job, setting.ram_limit, math.inf, allow_broken=True, restart=True, progress=forward)


def _figures(result: Evaluation) -> dict[str, Any]:
    measured = result.to_dict()
    names = ("perplexity", "log_perplexity_difference", "kl", "top1_agreement")
    intervals = ("perplexity_interval", "log_perplexity_difference_interval", "kl_interval", "top1_interval")
    return {name: measured[name] for name in (*names, *intervals, "tokens", "broken_tokens")} | {
        "read": result.protocol
    }


def _tasks(scores: Sequence[TaskScore]) -> dict[str, Any]:
    return {"tasks": {score.task: score.to_dict() for score in scores}} if scores else {}


def _problems(report: QuantizeReport, result: Evaluation, scores: Sequence[TaskScore]) -> list[str]:
    """Why the row's model counts as broken, by the guard, by the divergence on held-out text and by tasks."""
    problems = list(report.problems)
    if result.broken:
        problems.append(f"{result.broken_tokens} of {result.tokens} predictions are NaN or infinite")
    elif result.kl is not None and result.kl > MAX_KL:
        problems.append(f"KL over {MAX_KL:g}")
    return problems + [
        f"{score.task}: NaN for {score.broken} of {score.items} items" for score in scores if score.broken
    ]


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
