"""What a report is made of: files that other commands wrote, told apart by what is in them.

* JSON lines of ``lowbit compare``, of a training's course, of several trainings with their courses, of answers to prompts, and of
  other rows that say of a label, a method or a model what was measured;
* ``lowbit-report.json`` of a checkpoint, ``inspection.json`` with ``channels.safetensors``, results of ``benchmarks``,
  and what ``lowbit generate --json`` and ``lowbit evaluate --chat --json`` print;
* a directory: what it holds of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from lowbit.checkpoints.model_card import REPORT
from lowbit.checkpoints.shards import read_json
from lowbit.comparison.results import DECISIVE, flaw_of, texts_read, whole_lines, work_of
from lowbit.rows import lines_of
from lowbit.tables import Table, of_mappings, text_of

Json = dict[str, Any]
INSPECTION, CHANNELS = "inspection.json", "channels.safetensors"
_KNOWN = (REPORT, INSPECTION, "training-*.jsonl")
_READS = (
    "results of `lowbit compare`, a checkpoint or its lowbit-report.json, the directory of `lowbit inspect`, the rows of a "
    "training, answers to prompts, tables as JSON, or as JSON lines with figures of a label, a method or a model"
)


_LAYER = {"name": str, "role": str, "bits_per_weight": (int, float), "error": (int, float, type(None))}
_RUN = {"recipe": dict, "layers": [_LAYER], "block_errors": list, "bits_per_weight": (int, float)}
_INSPECTION = {"model": str, "calibration": str, "layers": [dict], "inputs": [{"name": str, "role": str, "block": int}]}
_STEP = {"step": int, "tokens": int, "loss": (int, float, type(None))}
_ANSWER = dict.fromkeys(("prompt", "original", "model"), str)
_CACHES = {"quality": [{"name": str, "bits": (int, float)}], "speed": [{"name": str, "context": int}]}
"""What files must hold: types, objects with their keys, and lists of one of these."""


class SourceError(ValueError):
    """A file that no report can be made of; the message names it, and says what was found and what was expected."""


@dataclass(frozen=True)
class Sample:
    """A prompt, and by the name of who wrote it each answer."""

    prompt: str
    answers: Mapping[str, str]


@dataclass
class Sources:
    """What was read, in the order of the files.

    Attributes:
        files: of each its name, its sha256 and its bytes.
        records: of ``lowbit compare``; of several of the same work the last that has figures.
        runs: reports of checkpoints, by name.
        curves: rows of a training, by name.
        inspections: by name what ``inspection.json`` holds, and the file of channels beside it, which may not exist.
        caches: by name rows ``quality`` and ``speed`` of packed caches.
        samples: prompts with answers, those of one prompt together.
        tables: everything else, by name.
    """

    files: list[tuple[str, str, int]] = field(default_factory=list)
    records: list[Json] = field(default_factory=list)
    runs: dict[str, Json] = field(default_factory=dict)
    curves: dict[str, list[Json]] = field(default_factory=dict)
    inspections: dict[str, tuple[Json, Path]] = field(default_factory=dict)
    caches: dict[str, Json] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    tables: dict[str, list[Table]] = field(default_factory=dict)


def read_sources(paths: Iterable[str | PathLike[str]]) -> Sources:
    """Reads files and directories.

    Raises:
        SourceError: one that does not exist, cannot be understood, or of which a report cannot be made.
    """
    sources = Sources()
    for path in paths:
        for file in _files(Path(path).expanduser()):
            _read(file, sources)
    sources.records = _latest(sources.records)
    return sources


def _files(path: Path) -> list[Path]:
    """``path`` itself, or of a directory what commands write, else all its JSON."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or directory; expected {_READS}")
    found = [file for pattern in _KNOWN for file in sorted(path.glob(pattern))]
    if not found and _is_model(path):
        raise SourceError(
            f"{path}: found a model without {REPORT}, which says what lowbit measured of it; expected {_READS}. "
            f"`lowbit inspect {path} -o DIR` and `lowbit evaluate {path} --json > FILE.json` measure a model"
        )
    found = found or sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    if not found:
        raise SourceError(f"{path}: it holds no .json and no .jsonl file; expected {_READS}")
    return found


def _is_model(path: Path) -> bool:
    """Whether a directory holds a model as transformers saves it."""
    config = path / "config.json"
    return config.is_file() and "model_type" in read_json(config)


def _read(file: Path, sources: Sources) -> None:
    data = file.read_bytes()
    name = f"{file.parent.name}/{file.name}" if _is_known(file) else file.name
    if name in {each for each, *_ in sources.files}:
        name = str(file)
    sources.files.append((name, hashlib.sha256(data).hexdigest(), len(data)))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: not UTF-8 text (byte {error.start}); expected {_READS}") from None
    if file.suffix == ".jsonl":
        _rows(file, name, _lines(file, text), sources)
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{file}: not JSON ({error.msg}, line {error.lineno}); expected {_READS}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{file}: found a JSON {type(value).__name__}, expected an object: {_READS}")
    _object(file, name, value, sources)


def _is_known(file: Path) -> bool:
    return any(file.match(pattern) for pattern in _KNOWN)


def _lines(file: Path, text: str) -> list[Json]:
    """JSON objects, one a line. A last line that a kill has torn is left out, as ``lowbit compare`` leaves it out."""
    whole = whole_lines(text.encode()).decode()
    rows = []
    for number, line in enumerate(lines_of(whole), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{file}, line {number}: not JSON ({error.msg}); expected {_READS}") from None
        if not isinstance(row, dict):
            raise SourceError(f"{file}, line {number}: found a {type(row).__name__}, expected an object")
        rows.append(row)
    if not rows:
        raise SourceError(f"{file}: it holds no whole line; expected {_READS}")
    return rows


def _rows(file: Path, name: str, rows: list[Json], sources: Sources) -> None:
    if all(all(key in row for key in DECISIVE) for row in rows):
        for number, row in enumerate(rows, start=1):
            if (flaw := flaw_of(row)) is not None:
                raise SourceError(f"{file}, record {number}: {flaw}")
        sources.records += [{"calibration": None, **row, "file": name} for row in rows]
    elif all({"step", "tokens", "loss"} <= row.keys() for row in rows):
        sources.curves[name] = rows
    elif all({"label", "curve"} <= row.keys() for row in rows):
        for row in rows:
            _add_curve(file, f"{name}: {row['label']}", row["curve"], sources)
        short = [{key: value for key, value in row.items() if key not in ("curve", "recipe")} for row in rows]
        sources.tables[name] = [of_mappings(name, short)]
    elif all({"prompt", "answers"} <= row.keys() for row in rows):
        for number, row in enumerate(rows, start=1):
            _add_sample(f"{file}, line {number}", row["prompt"], row["answers"], sources)
    else:
        for number, row in enumerate(rows, start=1):
            if not _is_measured(row):
                raise SourceError(
                    f"{file}, line {number}: found {', '.join(row)[:60] or 'an empty object'}; expected {_READS}"
                )
        sources.tables[name] = [of_mappings(name, rows)]


def _is_measured(row: Json) -> bool:
    """Whether a row has figures, and says of what."""
    figures = [each for value in row.values() for each in (value if isinstance(value, list) else [value])]
    named = any(isinstance(row.get(key), str) for key in ("label", "method", "model"))
    return named and any(isinstance(each, int | float) and not isinstance(each, bool) for each in figures)


def _object(file: Path, name: str, value: Json, sources: Sources) -> None:
    if {"recipe", "layers", "block_errors"} <= value.keys():
        sources.runs[name] = _checked(file, value, _RUN)
    elif {"inputs", "layers", "rules"} <= value.keys():
        sources.inspections[name] = (_checked(file, value, _INSPECTION), file.with_name(CHANNELS))
    elif {"quality", "speed"} <= value.keys():
        sources.caches[name] = _checked(file, value, _CACHES)
    elif {"prompt", "text"} == value.keys():
        _add_sample(str(file), value["prompt"], {file.stem: value["text"]}, sources)
    else:
        sources.tables[name] = _tables(file, name, _without_answers(file, value, sources))


def _without_answers(file: Path, value: Json, sources: Sources) -> Json:
    """What ``lowbit evaluate --chat --json`` printed without the answers, which become samples."""
    chat = value.get("chat")
    if not isinstance(chat, dict) or "answers" not in chat:
        return value
    for answer in _checked(file, chat["answers"], [_ANSWER], "chat.answers"):
        _add_sample(str(file), answer["prompt"], {"original": answer["original"], file.stem: answer["model"]}, sources)
    return {**value, "chat": {key: each for key, each in chat.items() if key != "answers"}}


def _checked(file: Path, value: Any, form: Any, place: str = "") -> Any:
    """``value`` if it has the ``form``."""
    if isinstance(form, dict):
        good = isinstance(value, dict) and form.keys() <= value.keys()
        parts = [(value[key], each, f"{place}.{key}") for key, each in form.items()] if good else []
    elif isinstance(form, list):
        good = isinstance(value, list)
        parts = [(each, form[0], f"{place}[{i}]") for i, each in enumerate(value)] if good else []
    else:
        good, parts = isinstance(value, form), []
    if not good:
        wanted = (
            f"an object with {', '.join(form)}"
            if isinstance(form, dict)
            else "a list"
            if isinstance(form, list)
            else form
        )
        raise SourceError(
            f"{file}: {place.lstrip('.') or 'the whole'}: expected {wanted}, found {text_of(value)[:60]!r}"
        )
    for each, inner, where in parts:
        _checked(file, each, inner, where)
    return value


def _add_curve(file: Path, name: str, rows: Any, sources: Sources) -> None:
    """The course of one of several trainings; empty where it was not kept."""
    if rows:
        sources.curves[name] = _checked(file, rows, [_STEP], "curve")


def _add_sample(place: str, prompt: Any, answers: Any, sources: Sources) -> None:
    texts = isinstance(answers, dict) and all(isinstance(text, str) for text in answers.values())
    if not isinstance(prompt, str) or not texts:
        raise SourceError(f'{place}: expected {{"prompt": TEXT, "answers": {{NAME: TEXT}}}}')
    for place_in_list, other in enumerate(sources.samples):
        if other.prompt == prompt:
            sources.samples[place_in_list] = Sample(prompt, {**other.answers, **answers})
            return
    sources.samples.append(Sample(prompt, answers))


def _tables(file: Path, name: str, value: Json) -> list[Table]:
    """Lists of objects and objects of objects, each as a table, and the rest as one of names and values."""
    tables, rest = [], {}
    for key, each in value.items():
        if isinstance(each, list) and each and all(isinstance(row, dict) for row in each):
            tables.append(of_mappings(f"{name}: {key}", each))
        elif isinstance(each, dict) and each and all(isinstance(row, dict) for row in each.values()):
            tables.append(of_mappings(f"{name}: {key}", ({"": label, **row} for label, row in each.items())))
        elif isinstance(each, dict):
            rest |= {f"{key}: {inner}": text_of(one) for inner, one in each.items()}
        else:
            rest[key] = text_of(each)
    if rest:
        tables.append(Table(f"{name}: the rest", ("", "value"), tuple(rest.items())))
    if not tables:
        raise SourceError(f"{file}: an empty object; expected {_READS}")
    return tables


def _latest(records: Sequence[Json]) -> list[Json]:
    """Of several records of the same work the last that has figures, else the last, at the place of the first."""
    kept: dict[str, Json] = {}
    for record in records:
        key = json.dumps([record["label"], *work_of(record), *texts_read(record)], sort_keys=True)
        if key not in kept or "error" in kept[key] or "error" not in record:
            kept[key] = record
    return list(kept.values())
