"""Results as JSON lines: one record for each row, appended and flushed when it is known, never changed.

A row counts as measured if a record without an error has the same label, recipe, model, protocol, text and tasks, and the
same texts to calibrate and to train on if the recipe reads them. Of several such records the last counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowbit.rows import lines_of
from lowbit.whole_file import naming

Record = dict[str, Any]
"""A line of a results file. See :func:`lowbit.comparison.compare` for its fields."""

DECISIVE = ("label", "recipe", "model", "protocol")

_NUMBERS = (
    *("perplexity", "log_perplexity_difference", "kl", "top1_agreement", "asked_bits", "bits_per_weight"),
    *("model_bits_per_weight", "cache_bits", "bytes", "quantize_seconds", "evaluate_seconds", "peak_rss_bytes"),
)
_AT_LEAST = {name: 0 for name in _NUMBERS if name not in ("log_perplexity_difference", "kl")} | {"perplexity": 1}
"""What no measurement is below; a divergence of two models that are alike may be rounded below 0."""
_OBJECTS = ("tasks", "speed", "calibration", "machine", "versions", "converted", "taken_from")
_TEXTS, _LISTS = ("error", "read"), ("problems", "warnings")
_HELD = {"calibration": ("text", "windows", "tokens", "sha256"), "machine": ("cpu", "threads"), "taken_from": ("file",)}
"""What objects hold where they are given and not empty."""
_INTERVALS = ("perplexity_interval", "log_perplexity_difference_interval", "kl_interval", "top1_interval")


def flaw_of(record: Mapping[str, Any]) -> str | None:
    """What in a record with the keys of :data:`DECISIVE` cannot be read, as edited files have it; None: nothing."""
    model, protocol = record["model"], record["protocol"]
    named = isinstance(model, Mapping) and all(isinstance(model.get(key), str) for key in ("name", "sha256"))
    cut = isinstance(protocol, Mapping) and all(
        isinstance(protocol.get(key), str) for key in ("name", "text", "sha256")
    )
    tasks = record["tasks"] if isinstance(record.get("tasks"), Mapping) else {}
    bad = {
        "label: expected a text": not isinstance(record["label"], str),
        "recipe: expected an object or null": not isinstance(record["recipe"], Mapping | None),
        "model: expected an object with name and sha256": not named,
        "protocol: expected an object with name, text and sha256": not cut,
        "tasks: expected an object with metrics for each": not all(
            isinstance(each, Mapping) and isinstance(each.get("metrics"), Mapping) for each in tasks.values()
        ),
    }
    bad |= {f"{key}: expected an object": not isinstance(record.get(key), Mapping | None) for key in _OBJECTS}
    bad |= {
        f"{key}: expected an object with {', '.join(names)}": isinstance(held := record.get(key), Mapping)
        and bool(held)
        and not held.keys() >= set(names)
        for key, names in _HELD.items()
    }
    bad |= {f"{key}: expected a text": not isinstance(record.get(key, ""), str) for key in _TEXTS}
    bad |= {f"{key}: expected a list of texts": not _is_texts(record.get(key)) for key in _LISTS}
    bad |= {f"{key}: expected a number": not isinstance(record.get(key), int | float | None) for key in _NUMBERS}
    bad |= {
        f"{key}: expected at least {least}": isinstance(value := record.get(key), int | float) and value < least
        for key, least in _AT_LEAST.items()
    }
    bad |= {f"{key}: expected two numbers": not _is_interval(record.get(key)) for key in _INTERVALS}
    return next((text for text, wrong in bad.items() if wrong), None)


def _is_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _is_interval(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(isinstance(each, int | float) for each in value)
    )


def whole_lines(data: bytes) -> bytes:
    """What a file of JSON lines holds without a last line that a kill has torn.

    A last line that is JSON is whole, though an editor has left out its end.
    """
    whole, last = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
    try:
        return whole + last + b"\n" if isinstance(json.loads(last), dict) else whole
    except ValueError:
        return whole


class Results:
    """The records of a results file.

    Args:
        path: a ``.jsonl`` file, which need not exist. A last line that a kill has torn is left out.

    Raises:
        ValueError: another suffix, a directory that does not exist, or a line that is no record, with its number.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser()
        if self.path.suffix != ".jsonl":
            raise ValueError(f"results are JSON lines: expected a file name that ends in .jsonl, found {self.path}")
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path.parent} is not a directory: make it, or choose another -o FILE.jsonl")
        self.records: list[Record] = self._read() if self.path.exists() else []

    @contextmanager
    def held(self) -> Iterator[None]:
        """While open, no other process writes the file. Reads what one has added meanwhile, and drops a torn last line.

        Raises:
            ValueError: another process holds it.
        """
        lock = FileLock(self.path.with_name(f"{self.path.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self.path} is being written by another comparison; wait for it, or choose another -o FILE.jsonl"
            ) from None
        try:
            if self.path.exists():
                self._make_whole()
                self.records = self._read()
            yield
        finally:
            with suppress(PermissionError):  # Windows does not remove an open file
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _make_whole(self) -> None:
        """Drops a torn last line, or ends one whose end an editor has left out."""
        data = self.path.read_bytes()
        whole = whole_lines(data)
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        elif len(whole) > len(data):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def _read(self) -> list[Record]:
        records = []
        for number, line in enumerate(lines_of(whole_lines(self.path.read_bytes()).decode("utf-8")), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict) or any(key not in record for key in DECISIVE):
                raise ValueError(
                    f"{self.path}, line {number}: not a record of `lowbit compare` (expected a JSON object with "
                    f"{', '.join(DECISIVE)}); choose another -o FILE.jsonl"
                )
            if (flaw := flaw_of(record)) is not None:
                raise ValueError(
                    f"{self.path}, line {number}: {flaw}; correct it or remove the line, or choose another -o FILE.jsonl"
                )
            records.append(record)
        return records

    def add(self, record: Mapping[str, Any]) -> Record:
        """Appends a record to the file, which must be :meth:`held`. It survives a kill once this returns. NaN and infinity become null.

        Raises:
            OSError: it cannot be written; its message names the file.
        """
        line = json.dumps(_finite(record), sort_keys=True, allow_nan=False)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(json.loads(line))
        return self.records[-1]

    def latest(self, wanted: Mapping[str, Any]) -> Record | None:
        """The last record of the same work as ``wanted``: a finished record, else a failed one.

        ``wanted`` is a record without figures.
        """
        same = [record for record in self.records if _same(record, wanted)]
        finished = [record for record in same if "error" not in record]
        return next(reversed(finished or same), None)

    def latest_of_work(self, wanted: Mapping[str, Any]) -> Record | None:
        """The last finished record of the same work as ``wanted`` under any label."""
        finished = (record for record in reversed(self.records) if "error" not in record)
        return next((record for record in finished if same_work(record, wanted)), None)

    def all_latest(self) -> list[Record]:
        """:meth:`latest` for the work of every record, in the order of their first records."""
        kept = {id(record): record for record in map(self.latest, self.records) if record is not None}
        return list(kept.values())


def _same(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return record["label"] == wanted["label"] and same_work(record, wanted)


def same_work(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two records are of one recipe, model, protocol, text and tasks, and of one text to calibrate and to train on if ``wanted``
    reads them; their labels may differ."""
    if work_of(record) != work_of(wanted):
        return False
    calibration = wanted.get("calibration")  # None: this recipe reads no text, even if one was given
    return calibration is None or texts_read(record) == texts_read(wanted)


def texts_read(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Hashes of what a record's recipe calibrated and trained on; None: nothing."""
    calibration = record.get("calibration") or {}
    return calibration.get("sha256"), (calibration.get("training") or {}).get("sha256")


def work_of(record: Mapping[str, Any]) -> tuple:
    """What identifies a record's work but for its calibration text: the recipe, names and hashes, without names of hashed things."""
    protocol = record["protocol"]
    more = protocol.get("tasks"), protocol.get("speed")
    return record["recipe"], record["model"]["sha256"], protocol["name"], protocol["sha256"], *more


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
