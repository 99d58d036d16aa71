"""The work of one row: quantize, reload packed, measure.

It runs in a process of its own (:mod:`lowbit.comparison.child`).

The values here are pickled to that process, so they hold requests and nothing loaded.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoints import native
from lowbit.checkpoints.source import ModelSource, load_tokenizer, open_model
from lowbit.data import Calibration
from lowbit.evaluation import Evaluation, KeptOriginal, directory_bytes, evaluate_model, keep_states, peak_rss
from lowbit.job import prepare
from lowbit.pipeline import run
from lowbit.recipes import Recipe
from lowbit.report import MAX_KL, QuantizeReport

ShareReport = Callable[[float, str], None]
"""``progress(share, what)`` with the finished share of the row, 0 to 1."""

QUANTIZING = 0.85
"""Share of a row's time for quantizing, for the progress bar. Methods that learn take more, rtn less."""


STATES = "states"
"""The folder of the original's hidden states."""


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison share.

    Attributes:
        model: the original's local directory.
        text: the text itself, or ids.
    """

    model: Path
    text: str | Tensor
    text_name: str
    protocol: str
    seq_len: int
    windows: int | None
    ram_limit: int
    trust_remote_code: bool
    calibration: Calibration | None = None

    def source(self) -> ModelSource:
        return open_model(self.model, trust_remote_code=self.trust_remote_code)

    def evaluate(self, model: Any, against: KeptOriginal | None, progress: ShareReport) -> Evaluation:
        tokenizer = None
        if isinstance(self.text, str):
            tokenizer = load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)
        return evaluate_model(
            model,
            self.text,
            tokenizer,
            self.protocol,
            self.seq_len,
            self.windows,
            against=against,
            text_name=self.text_name,
            progress=lambda done, total, what: progress(done / total, what),
        )


@dataclass(frozen=True)
class MeasureOriginal:
    """Evaluates the original, and keeps in ``scratch`` the hidden states that every row is compared with."""

    setting: Setting
    scratch: Path

    def run(self, progress: ShareReport) -> dict[str, Any]:
        started = time.perf_counter()
        source = self.setting.source()
        with keep_states(model := source.load_full(), self.scratch / STATES):
            result = self.setting.evaluate(model, None, progress)
        if result.broken:
            raise ValueError("the original model's own logits are NaN or infinite: there is nothing to compare with")
        size = directory_bytes(source.path).weights
        return _figures(result) | {
            "model_bits_per_weight": native.model_bits_per_weight(source.path),
            "bytes": size,
            "evaluate_seconds": _since(started),
            "peak_rss_bytes": peak_rss(),
        }


@dataclass(frozen=True)
class MeasureRow:
    """Quantizes by one recipe, and evaluates the packed model read back from disk."""

    setting: Setting
    scratch: Path
    recipe: Recipe

    def run(self, progress: ShareReport) -> dict[str, Any]:
        out = self.scratch / "quantized"
        shutil.rmtree(out, ignore_errors=True)  # left by a row that crashed
        started = time.perf_counter()
        report = self._quantize(out, progress)
        seconds, quantize_peak = _since(started), peak_rss()
        started = time.perf_counter()
        model = native.load(out, dtype="float32", trust_remote_code=self.setting.trust_remote_code)
        original = KeptOriginal(self.setting.source(), self.scratch / STATES)
        rest = 1 - QUANTIZING
        result = self.setting.evaluate(model, original, lambda done, what: progress(QUANTIZING + rest * done, what))
        record = _figures(result) | {
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
            "problems": _problems(report, result),
            "warnings": list(report.warnings),
        }
        shutil.rmtree(out)
        return record

    def _quantize(self, out: Path, progress: ShareReport) -> QuantizeReport:
        setting, last = self.setting, 0.0

        def forward(done: float, total: float, what: str) -> None:
            nonlocal last  # each phase starts at 0, the row does not
            last = max(last, QUANTIZING * done / total if total else 0.0)
            progress(last, what)

        calibration = setting.calibration if self.recipe.needs_calibration else None
        job = prepare(setting.model, self.recipe, calibration, out=out, trust_remote_code=setting.trust_remote_code)
        return run(job, setting.ram_limit, math.inf, allow_broken=True, restart=True, progress=forward)


def _figures(result: Evaluation) -> dict[str, Any]:
    measured = result.to_dict()
    names = ("perplexity", "log_perplexity_difference", "kl", "top1_agreement")
    intervals = ("perplexity_interval", "log_perplexity_difference_interval", "kl_interval", "top1_interval")
    return {name: measured[name] for name in (*names, *intervals, "tokens", "broken_tokens")} | {
        "read": result.protocol
    }


def _problems(report: QuantizeReport, result: Evaluation) -> list[str]:
    """Why the row's model counts as broken, by the guard and by the divergence on held-out text."""
    problems = list(report.problems)
    if result.broken:
        problems.append(f"{result.broken_tokens} of {result.tokens} predictions are NaN or infinite")
    elif result.kl is not None and result.kl > MAX_KL:
        problems.append(f"KL over {MAX_KL:g}")
    return problems


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
