"""Texts in files, and in files of rows: JSON, JSON lines, CSV and parquet with a column of texts or of chat messages.

Not read by ``datasets``: it copies each file into its cache, and refuses mixed rows without saying which one is wrong.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TEXT, MESSAGES = "text", "messages"
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")


class RowError(ValueError):
    """A file of rows that cannot be read, or has no column of texts; the message names the file."""


def text_of(path: Path, content: bytes | None = None) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Args:
        path: names the file.
        content: its bytes, where they are read already.

    Raises:
        RowError: other bytes than UTF-8.
    """
    try:
        return (path.read_bytes() if content is None else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(f"{path}: not UTF-8 text (byte {error.start}); convert it, or pass a text file") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, ended as files end them; ``str.splitlines`` also cuts at characters such as U+2028 and U+0085, which JSON
    and passages hold inside a line."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def has_rows(path: Path, content: bytes) -> bool:
    """Whether a file holds rows: by its suffix, or because every line is a JSON object."""
    if path.suffix.lower() in SUFFIXES:
        return True
    lines = [line for line in content.splitlines() if line.strip()]
    return bool(lines) and all(_is_object(line) for line in lines)


def texts_of(path: Path, content: bytes, column: str | None, tokenizer: Any) -> list[str]:
    """The texts of a file of rows, without empty ones.

    Args:
        path: names the file; its suffix names the format.
        content: the file's bytes.
        column: which column to read; None: ``text``, else ``messages``.
        tokenizer: its chat template turns messages into text.

    Raises:
        RowError: damaged, no such column, a value that is neither text nor messages, or no chat template.
    """
    values = values_of(path, content, column)
    return [value if isinstance(value, str) else _chat(path, number, value, tokenizer) for number, value in values]


def values_of(path: Path, content: bytes, column: str | None) -> list[tuple[int, str | list[Any]]]:
    """The rows of a file that hold something: the number of each, from 1, and its text or its messages.

    Raises:
        RowError: damaged, no such column, or a value that is neither text nor messages.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet(path, content)
    else:
        text = text_of(path, content)
        rows = _csv(path, text) if suffix == ".csv" else _json(path, text, column)
    return _column(path, rows, column)


def _is_object(line: bytes) -> bool:
    try:
        return line.lstrip().startswith(b"{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json(path: Path, text: str, column: str | None) -> list[Any]:
    try:
        return _rows(path, json.loads(text), column)
    except json.JSONDecodeError:
        pass  # several documents: one for each line
    rows = []
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise RowError(f"{path}: line {number} is not JSON ({error.msg})") from None
    return rows


def _rows(path: Path, value: Any, column: str | None) -> list[Any]:
    """The rows of one JSON document: a list, an object of columns, one row, or an object that holds one list."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise RowError(f"{path}: found a JSON {type(value).__name__}, expected rows: a list of objects or of texts")
    lists = {key: each for key, each in value.items() if isinstance(each, list)}
    name = column or TEXT
    if name in lists and not all(map(_is_message, lists[name])):
        return [{name: each} for each in lists[name]]
    if not {name, TEXT, MESSAGES} & value.keys() and len(lists) == 1:
        return next(iter(lists.values()))
    return [value]


def _csv(path: Path, text: str) -> list[Any]:
    try:
        csv.field_size_limit(2**31 - 1)
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise RowError(f"{path}: not CSV with a header line ({error})") from None


def _parquet(path: Path, content: bytes) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise RowError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None


def _column(path: Path, rows: Iterable[Any], column: str | None) -> list[tuple[int, str | list[Any]]]:
    values = []
    for number, row in enumerate(rows, 1):
        value = row
        if isinstance(row, Mapping):
            name = column or next((each for each in (TEXT, MESSAGES) if each in row), None)
            if name is None or name not in row:
                found = ", ".join(map(str, row)) or "none"
                raise RowError(
                    f"{path}: row {number} has no column {name or f'{TEXT} or {MESSAGES}'}; its columns are {found}. "
                    f"Name one: {path}:COLUMN"
                )
            value = row[name]
        elif column is not None:
            raise RowError(f"{path}: row {number} has no column {column}: it is no object. Leave the column out")
        if value is None or value == "":
            continue
        if not isinstance(value, str | list):
            raise RowError(f"{path}: row {number} holds {type(value).__name__}, expected text or a list of messages")
        if isinstance(value, list) and not all(map(_is_message, value)):
            raise RowError(f"{path}: row {number}: messages need a role and a content each")
        values.append((number, value))
    return values


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _chat(path: Path, number: int, messages: list[Any], tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise RowError(f"{path}: it holds chat messages, and the model's tokenizer has no chat template for them")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs of their own
        raise RowError(f"{path}: row {number}: the model's chat template refuses its messages ({error})") from error
