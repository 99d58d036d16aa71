"""Runs a comparison: checks everything, measures the original once, then row after row.

Each row is written when it is known.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.comparison.child import run_in_child
from lowbit.comparison.results import Record, Results
from lowbit.comparison.rows import ORIGINAL, Row, as_rows
from lowbit.comparison.table import markdown
from lowbit.comparison.work import MeasureOriginal, MeasureRow, Setting
from lowbit.data import Bos, Calibration, calibration_of, load_text
from lowbit.evaluation.machine import cpu_name
from lowbit.evaluation.perplexity import check_fits, windows_sha256
from lowbit.evaluation.windows import cut
from lowbit.numerics import to_dict
from lowbit.plan.model_plan import lay_over
from lowbit.progress import Progress
from lowbit.recipes import Recipe
from lowbit.stages.scratch import scratch_directory
from lowbit.surroundings import own_settings
from lowbit.version import __version__


@own_settings()
def compare(
    model: str | PathLike[str],
    rows: str | PathLike[str] | Iterable[Row | Recipe | str | PathLike[str] | Mapping[str, Any]],
    calibration: str | Sequence[str] | Tensor | Calibration | None,
    text: str | Tensor,
    out: str | PathLike[str],
    *,
    samples: int = 32,
    seq_len: int = 512,
    bos: Bos = "auto",
    protocol: str = "gptq",
    eval_seq_len: int = 1024,
    windows: int | None = 20,
    only: Iterable[str] = (),
    threads: int | None = None,
    ram_limit: int = 2**32,
    scratch: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Quantizes ``model`` by every row's recipe, evaluates each result on one text, and writes one table.

    Each row runs in a process of its own: it quantizes into a scratch directory, reads the packed model back, evaluates
    it against the original and removes it. Results are JSON lines in ``out``, with a Markdown table of the same name
    next to it, rewritten after each row. A measured row is not measured again; a failed row is. Broken models are
    measured like others, and marked. A recipe that needs no calibration text gets none.

    Args:
        model: a local directory, hub id, ``.gguf`` file or ``smollm2-135m``.
        rows: a grid file, or rows, recipes, methods' names, recipe files, and mappings as in a grid file; see
            :mod:`lowbit.comparison.rows`.
        calibration: text (see :mod:`lowbit.data`), ids ``[N, T]``, or None if no recipe needs any.
        text: the text to evaluate on (its evaluation part if it has one), or token ids.
        out: a ``.jsonl`` file; continued if it exists.
        samples, seq_len: number of calibration windows, and tokens of each.
        bos: whether every calibration window begins with the model's first token, as for :func:`lowbit.quantize`.
        protocol, eval_seq_len, windows: how the text is evaluated, as in :func:`lowbit.evaluation`.
        only: measure only rows whose label contains one of these.
        threads: torch's threads in the rows' processes; None: as in this process.
        ram_limit: bytes of activations in memory while quantizing.
        scratch: directory for temporary files; None: that of ``out``. It must hold the largest result and the hidden
            states.
        trust_remote_code: allow the model's own Python code.
        progress: called as ``progress(rows done, rows to do, what)``.
        on_record: called with each new record.

    Returns:
        The records of the original and of the rows, in their order, including those of earlier runs: label, recipe,
            model, protocol,
        calibration, figures (perplexity, log_perplexity_difference, kl, top1_agreement and their 95 % intervals,
            asked_bits, bits_per_weight,
            model_bits_per_weight, bytes, seconds,
            peak bytes
        of memory), problems (why it counts as broken), machine, versions. A failed row has ``error`` instead of
            figures.

    Raises:
        ValueError: anything wrong with a row, the model or the texts, before the first row; an original that fails.
    """
    asked, results = as_rows(rows), Results(out)
    source = open_model(model, trust_remote_code=trust_remote_code)
    chosen = _chosen(asked, tuple(only))
    _check(source, asked)
    setting, warnings_of_text = _setting(source, text, protocol, eval_seq_len, windows, ram_limit)
    run = _Run(
        results=results,
        setting=replace(setting, calibration=_calibration(source, asked, calibration, samples, seq_len, bos)),
        bos=bos,
        model={"name": source.name, "sha256": source.fingerprint},
        protocol=warnings_of_text,
        labels=tuple(row.label for row in asked),
        threads=threads or torch.get_num_threads(),
        progress=progress or (lambda done, total, what: None),
        on_record=on_record or (lambda record: None),
    )
    place = results.path.parent if scratch is None else Path(scratch)
    place.mkdir(parents=True, exist_ok=True)
    return run.all(asked, chosen, place)


def _chosen(rows: list[Row], only: tuple[str, ...]) -> list[Row]:
    for part in only:
        if not any(part in row.label for row in rows):
            raise ValueError(f"no row has {part!r} in its label; there are {'; '.join(row.label for row in rows)}")
    return [row for row in rows if not only or any(part in row.label for part in only)]


def _check(source: ModelSource, rows: list[Row]) -> None:
    """Checks every recipe against the model, without reading a weight."""
    for row in rows:
        try:
            lay_over(source, row.recipe)
        except ValueError as error:
            raise ValueError(f"row {row.label!r}: {error}") from error


def _calibration(
    source: ModelSource,
    rows: list[Row],
    text: str | Sequence[str] | Tensor | Calibration | None,
    samples: int,
    seq_len: int,
    bos: Bos,
) -> Calibration | None:
    needy = [row.label for row in rows if row.recipe.needs_calibration]
    if not needy:
        return None
    if text is None:
        raise ValueError(f"{'; '.join(needy)}: calibration text is needed: a file, python-docs, a hub dataset or self")
    return calibration_of(source, text, samples, seq_len, bos)


def _setting(
    source: ModelSource, text: str | Tensor, protocol: str, seq_len: int, windows: int | None, ram_limit: int
) -> tuple[Setting, Record]:
    """The text, found and cut, and its entry in records."""
    named = load_text(text, "evaluation", source.tokenizer()) if isinstance(text, str) else None
    content = text if named is None else named.text
    name = "token ids" if named is None else named.name
    pieces = cut(content, source.tokenizer() if named else None, protocol, seq_len, windows)
    check_fits(source.skeleton(), pieces)
    return Setting(source.path, content, name, protocol, seq_len, windows, ram_limit, source.trust_remote_code), {
        "name": protocol,
        "text": name,
        "windows": len(pieces.windows),
        "seq_len": seq_len,
        "sha256": windows_sha256(pieces, seq_len),
    }


@dataclass(frozen=True, eq=False)
class _Run:
    """A checked comparison. ``model`` and ``protocol`` are entries of its records."""

    results: Results
    setting: Setting
    bos: Bos
    model: Record
    protocol: Record
    labels: tuple[str, ...]
    threads: int
    progress: Progress
    on_record: Callable[[Record], None]

    def all(self, rows: list[Row], chosen: list[Row], place: Path) -> list[Record]:
        """Measures the rows of ``chosen`` that have no figures yet.

        Returns:
            The records of the original and of all ``rows`` that have one.
        """
        self._write_table()
        todo = [row for row in chosen if not self._has(row)]
        if todo or not self._has(None):
            with scratch_directory(self.results.path.stem, place) as scratch:
                self._measure(todo, scratch)
        latest = (self.results.latest(self._head(row)) for row in (None, *rows))
        return [record for record in latest if record is not None]

    def _measure(self, todo: list[Row], scratch: Path) -> None:
        total = len(todo) + 1
        figures = self._run(MeasureOriginal(self.setting, scratch), 0, total, ORIGINAL)
        if "error" in figures:
            raise ValueError(f"the original model could not be evaluated: {figures['error']}")
        if not self._has(None):
            self._keep(None, figures)
        for done, row in enumerate(todo, start=1):
            self._keep(row, self._run(MeasureRow(self.setting, scratch, row.recipe), done, total, row.label))
        self.progress(total, total, "finished")

    def _run(self, work: MeasureOriginal | MeasureRow, done: int, total: int, label: str) -> Record:
        def report(share: float, what: str) -> None:
            self.progress(done + share, total, f"{label}: {what}")

        report(0.0, "starting")
        return run_in_child(work, self.threads, work.scratch / "log.txt", report)

    def _has(self, row: Row | None) -> bool:
        latest = self.results.latest(self._head(row))
        return latest is not None and "error" not in latest

    def _keep(self, row: Row | None, figures: Record) -> None:
        self.on_record(self.results.add(self._head(row) | self._tail() | figures))
        self._write_table()

    def _head(self, row: Row | None) -> Record:
        """The part of a record that decides its figures, for :meth:`Results.latest`."""
        used = self.setting.calibration if row is not None and row.recipe.needs_calibration else None
        calibration = None
        if used is not None:
            count, tokens = used.ids.shape
            calibration = {
                "text": used.name,
                "windows": count,
                "tokens": tokens,
                "bos": self.bos,
                "sha256": used.sha256,
            }
        return {
            "label": ORIGINAL if row is None else row.label,
            "recipe": None if row is None else to_dict(row.recipe),
            "model": self.model,
            "protocol": self.protocol,
            "calibration": calibration,
        }

    def _tail(self) -> Record:
        """The machine and the versions that gave a record's figures."""
        packages = {name: version(name) for name in ("torch", "transformers")}
        return {
            "machine": {"cpu": cpu_name(), "threads": self.threads, "system": platform.platform()},
            "versions": {"lowbit": __version__, "python": platform.python_version(), **packages},
        }

    def _write_table(self) -> None:
        records = self.results.all_latest()
        if records:
            page = self.results.path.with_suffix(".md")
            page.write_text(markdown(records, self.labels), encoding="utf-8")
