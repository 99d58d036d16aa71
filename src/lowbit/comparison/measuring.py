"""A comparison at work: which rows still have no figures, who measures them, and what is kept of each."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lowbit.comparison.presets import Preset, markdown_beside
from lowbit.comparison.results import Record, Results
from lowbit.comparison.rows import ORIGINAL, Row
from lowbit.comparison.table import markdown
from lowbit.comparison.work import MeasureOriginal, MeasureRow, Setting
from lowbit.comparison.workers import Assignment, Workers, run_one
from lowbit.data import Bos, Calibration, ids_sha256
from lowbit.evaluation import Leakage
from lowbit.evaluation.machine import cpu_name
from lowbit.numerics import to_dict
from lowbit.progress import Progress
from lowbit.stages.scratch import scratch_directory
from lowbit.version import __version__
from lowbit.whole_file import write_whole_text


@dataclass(frozen=True, eq=False)
class Measuring:
    """A checked comparison. ``model`` and ``protocol`` are entries of its records; ``calibrations`` and ``leakages`` are those of the
    rows that read text, by label."""

    results: Results
    setting: Setting
    bos: Bos
    calibrations: Mapping[str, Calibration]
    leakages: Mapping[str, Leakage]
    model: Record
    protocol: Record
    labels: tuple[str, ...]
    threads: int
    workers: Workers
    known: tuple[Results, ...]
    preset: Preset | None
    memory: Mapping[str, int]
    progress: Progress
    on_record: Callable[[Record], None]

    def all(self, rows: list[Row], chosen: list[Row], place: Path) -> list[Record]:
        """Measures the rows of ``chosen`` that have no figures yet.

        Returns:
            The records of the original and of all ``rows`` that have one.
        """
        self._take_over([None, *chosen])
        self._write_table()
        first, later = _by_seed(chosen)
        if self._todo(first) or self._todo(later) or not self._has(None):
            with scratch_directory(self.results.path.stem, place) as scratch:
                total = len(self._todo(first)) + 1
                self._measure_original(scratch, total)
                for rows_of_round in (first, later):
                    if todo := self._todo(rows_of_round):
                        total = len(todo) + 1
                        self._measure(todo, scratch)
                self.progress(total, total, "finished")
        latest = (self.results.latest(self._head(row)) for row in (None, *rows))
        return [record for record in latest if record is not None]

    def _take_over(self, rows: Sequence[Row | None]) -> None:
        """Copies the records of rows that an earlier comparison measured."""
        for row in rows:
            head = self._head(row)
            found = ((results, results.latest_of_work(head)) for results in self.known if not self._has(row))
            for results, record in found:
                if record is not None:
                    figures = {key: value for key, value in record.items() if key not in head}
                    taken = {"file": results.path.name, "label": record["label"]}
                    self.on_record(self.results.add(head | figures | {"taken_from": taken}))

    def _todo(self, rows: list[Row]) -> list[Row]:
        return [row for row in rows if not self._has(row) and not self._settled(row)]

    def _settled(self, row: Row) -> bool:
        """Whether other seeds of the row gave the same figures: it is not random."""
        if row.of is None:
            return False
        head, figures = self._head(row), {}
        alike = head["recipe"] | {"seed": None}
        for record in self.results.records:
            recipe = record["recipe"]
            if recipe is not None and recipe | {"seed": None} == alike:
                seed = recipe.get("seed", 0)  # a default is not written
                same = head | {"recipe": recipe, "label": f"{row.of}, seed {seed}"}
                if (latest := self.results.latest(same)) is not None and "error" not in latest:
                    figures[seed] = latest["perplexity"], latest["kl"]
        return len(figures) > 1 and len(set(figures.values())) == 1

    def _measure_original(self, scratch: Path, total: int) -> None:
        own = Assignment(ORIGINAL, MeasureOriginal(self.setting, scratch), scratch / ORIGINAL)
        figures = run_one(own, self.threads, lambda share, what: self.progress(share, total, f"{ORIGINAL}: {what}"))
        if "error" in figures:
            raise ValueError(f"the original model could not be evaluated: {figures['error']}")
        if not self._has(None):
            self._keep(None, figures)

    def _measure(self, todo: list[Row], scratch: Path) -> None:
        total = len(todo) + 1
        assignments = []
        for i, row in enumerate(todo):
            place = scratch / f"row-{i}"
            work = MeasureRow(self.setting, scratch, place, row.recipe, self.calibrations.get(row.label))
            assignments.append(Assignment(row.label, work, place, self.memory.get(row.label, 0)))
        for i, figures in self.workers.run(
            assignments, self.threads, lambda done, what: self.progress(1 + done, total, what)
        ):
            self._keep(todo[i], figures)

    def _has(self, row: Row | None) -> bool:
        latest = self.results.latest(self._head(row))
        return latest is not None and "error" not in latest

    def _keep(self, row: Row | None, figures: Record) -> None:
        self.on_record(self.results.add(self._head(row) | self._tail() | figures))
        self._write_table()

    def _head(self, row: Row | None) -> Record:
        """The part of a record that decides its figures, for :meth:`Results.latest`."""
        calibration = None
        if row is not None and (used := self.calibrations.get(row.label)) is not None:
            count, tokens = used.ids.shape
            calibration = {
                "text": used.name,
                "windows": count,
                "tokens": tokens,
                "bos": self.bos,
                "sha256": used.sha256,
            }
            if used.further is not None:
                count, tokens = used.further.shape
                calibration["training"] = {"windows": count, "tokens": tokens, "sha256": ids_sha256(used.further)}
            if (leakage := self.leakages[row.label]).share:
                calibration["leakage"] = {"share": leakage.share, "longest": leakage.longest}
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
            parts = [] if self.preset is None else [markdown_beside(self.preset, self._own(records))]
            parts.append(markdown(records, self.labels))
            write_whole_text(self.results.path.with_suffix(".md"), "\n".join(parts))

    def _own(self, records: Sequence[Record]) -> list[Record]:
        """The records of this model, text and tasks."""
        return [each for each in records if (each["model"], each["protocol"]) == (self.model, self.protocol)]


def _by_seed(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows with at most two seeds of each, and those with further seeds."""
    first, later, seen = [], [], {}
    for row in rows:
        seen[row.of] = seen.get(row.of, 0) + 1
        (later if row.of is not None and seen[row.of] > 2 else first).append(row)
    return first, later
