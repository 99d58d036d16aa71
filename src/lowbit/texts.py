"""Texts by name: a file, a file of rows, a dataset of a hub, or the documentation that every Python carries."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from lowbit.generation import Strategy, is_generated
from lowbit.rows import RowError, has_rows, text_of, texts_of

Split = Literal["calibration", "evaluation"]

PYTHON_DOCS = "python-docs"
SELF = "self"
_HUB_ALIASES = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1")}
_HUB_SPLITS = {"calibration": ("train",), "evaluation": ("test", "validation")}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?(:[\w.\-]*){0,3}")
_HUB_TIMEOUT = 3  # seconds; how long a hub may take to answer before it counts as absent
_FORMS = (
    "Expected python-docs, a text file, a file of rows (.jsonl, .json, .csv or .parquet with a column text or messages), "
    "a hub dataset (wikitext2, or name:config:split:column), a directory of lowbit generate-data, or self, self:greedy, self:sampled."
)


class TextError(ValueError):
    """A text that cannot be used as given; the message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Text:
    """A text, what to call it in a report, and the sha256 of its UTF-8 bytes; the rows that it was joined from, if any."""

    name: str
    text: str
    sha256: str
    rows: tuple[str, ...] = ()


def load_text(spec: str | Sequence[str], split: Split = "calibration", tokenizer: Any = None) -> Text:
    """Finds a text: ``python-docs``, a file, or a hub dataset (``wikitext2``, or ``name[:config[:split[:column]]]``).

    ``python-docs`` (the documentation that every Python carries) has disjoint parts for the two values of ``split``; a hub
    dataset gives its train split for calibration and its test split for evaluation unless the spec names one; a file is
    whole for both. Rows of a dataset, of a file and of a list are joined by a blank line.

    Args:
        spec: a text file; a file of rows (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, or ``FILE:COLUMN``); a name; or a
            list of texts.
        tokenizer: its chat template turns rows of messages into text.

    Raises:
        TextError: nothing there that can be used.
    """
    if not isinstance(spec, str):
        return _list_text(spec)
    if spec == PYTHON_DOCS:
        return _python_docs(split)
    if spec == "none" and not Path(spec).exists():  # what lowbit quantize takes; elsewhere a hub would be asked for it
        raise TextError(f"{spec}: text is needed here. {_FORMS}")
    if own_strategy(spec) is not None:
        raise TextError(f"{spec} is text that the model writes; it needs a loaded model (calibration_set(model=...)).")
    path = Path(spec).expanduser()
    if path.is_file():
        return _file_text(path, None, tokenizer)
    file, _, column = spec.rpartition(":")
    if file and Path(file).expanduser().is_file():
        return _file_text(Path(file).expanduser(), column, tokenizer)
    close = get_close_matches(spec, [PYTHON_DOCS, SELF, *_HUB_ALIASES], n=1)
    hint = f" Did you mean {close[0]}?" if close and close[0] != spec else ""
    if is_generated(path):
        raise TextError(
            f"{spec}: generated token ids, for calibration; for their text name a column, such as FILE.parquet:text."
        )
    if path.is_dir():
        raise TextError(f"{spec}: a directory. {_FORMS}")
    if not _HUB_NAME.fullmatch(spec) or path.suffix in (".txt", ".raw", ".md", ".json", ".jsonl", ".csv", ".parquet"):
        raise TextError(f"{spec!r}: no such file.{hint} {_FORMS}")
    return _hub_text(spec, split, hint)


def own_strategy(spec: str) -> Strategy | None:
    """How a model is to write its own text where ``spec`` asks for that (``self``, ``self:STRATEGY``); None: it names another text.

    Raises:
        TextError: no such strategy.
    """
    head, colon, strategy = spec.partition(":")
    if head != SELF or Path(spec).exists():
        return None
    if not colon:
        return "hybrid"
    known: dict[str, Strategy] = {name: name for name in get_args(Strategy)}
    if strategy not in known:
        raise TextError(f"{spec}: a model writes {', '.join(known)} text, such as self:greedy.")
    return known[strategy]


def _text(name: str, text: str, rows: Sequence[str] = ()) -> Text:
    if not text.strip():
        raise TextError(f"{name}: the text is empty. {_FORMS}")
    return Text(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest(), tuple(rows))


def _rows_text(name: str, rows: Sequence[str]) -> Text:
    return _text(name, "\n\n".join(rows), rows)


def _list_text(texts: Sequence[str]) -> Text:
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TextError(f"found a text of type {type(texts).__name__}, expected a name, a list of texts, or token ids.")
    return _rows_text(f"{len(texts)} texts", texts)


def _file_text(path: Path, column: str | None, tokenizer: Any) -> Text:
    content = path.read_bytes()  # bytes: read_text would rewrite line ends
    try:
        if column is None and not has_rows(path, content):
            return _text(path.name, text_of(path, content))
        rows = texts_of(path, content, column, tokenizer)
    except RowError as error:
        raise TextError(f"{error}.") from error
    return _rows_text(f"{path.name} ({len(rows)} rows)", rows)


def _python_docs(split: Split) -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError(
            "python-docs: this Python carries no pydoc_data (some distributions package it apart). Pass a text file."
        ) from None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    parts = dict(zip(("calibration", "evaluation"), disjoint_parts(topics), strict=True))
    return _text(f"{PYTHON_DOCS} (Python {version}, {split} part)", parts[split])


def disjoint_parts(topics: Mapping[str, str], shared: int = 60) -> tuple[str, str]:
    """Cuts titled texts into two parts of about the same length that share no paragraph of `shared` characters or more.

    Some topics quote others whole, so cutting between titles is not enough: topics with a paragraph in common stay
    together. A paragraph is kept once. Deterministic: groups are dealt in order of size, each to the shorter part.
    """
    paragraphs = {key: topics[key].strip("\n").split("\n\n") for key in sorted(topics)}
    long = {key: _long(texts, shared) for key, texts in paragraphs.items()}
    groups: list[list[str]] = []
    for key in paragraphs:
        touching = [group for group in groups if any(long[key] & long[other] for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([key, *(other for group in touching for other in group)])
    texts = [_once([text for key in sorted(group) for text in paragraphs[key]], shared) for group in groups]
    parts: tuple[list[str], list[str]] = ([], [])
    for text in sorted(texts, key=lambda text: (-len(text), text)):
        min(parts, key=lambda part: sum(map(len, part))).append(text)
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def _long(paragraphs: list[str], shared: int) -> set[str]:
    return {flat for text in paragraphs if len(flat := " ".join(text.split())) >= shared}


def _once(paragraphs: list[str], shared: int) -> str:
    seen: set[str] = set()
    kept = []
    for text in paragraphs:
        flat = " ".join(text.split())
        if flat not in seen:
            kept.append(text)
        if len(flat) >= shared:
            seen.add(flat)
    return "\n\n".join(kept)


def _hub_text(spec: str, split: Split, hint: str) -> Text:
    name, config, wanted, column = (spec.split(":") + [""] * 3)[:4]
    name, config = _HUB_ALIASES.get(name, (name, config))
    import huggingface_hub

    try:
        from datasets import get_dataset_split_names, load_dataset
    except ImportError:
        raise TextError(f"{spec}: hub datasets need the package datasets. Run: pip install datasets") from None
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:  # asked first: loading retries for half a minute otherwise
            huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
        if not wanted:
            known = get_dataset_split_names(name, config or None)
            wanted = next((each for each in _HUB_SPLITS[split] if each in known), known[0])
        rows: Any = load_dataset(name, config or None, split=wanted)
    except Exception as error:  # network, cache and format errors have no common base but this
        raise TextError(
            f"{spec}: not a file, and the hub gave no dataset {name!r} ({type(error).__name__}: {error}).{hint} "
            f"Without a network use python-docs or a text file; HF_HUB_OFFLINE=1 reads the hub's cache. {_FORMS}"
        ) from error
    column = column or ("text" if "text" in rows.column_names else "")
    if column not in rows.column_names:
        raise TextError(
            f"{spec}: columns are {', '.join(rows.column_names)}; name one: {name}:{config}:{wanted}:COLUMN."
        )
    return _rows_text(":".join(part for part in (name, config, wanted) if part), rows[column])
