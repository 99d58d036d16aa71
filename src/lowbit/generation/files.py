"""Generated texts on disk: parquet shards of token ids beside text, and what they were made from.

Training reads the very ids, because text that is tokenized again gives others. What made the texts stands in the metadata of
every shard and in ``provenance.json``, with the shards' hashes; so a shard alone can be read too, and a directory that
has lost one is refused. Nothing depends on time, so a repeated run gives the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lowbit.checkpoints.shards import file_sha256
from lowbit.generation.quality import Quality, judge
from lowbit.generation.writing import Written

PROVENANCE, REPORT = "provenance.json", "report.json"
FORMAT = "lowbit generated text, version 1"
_KEY = b"lowbit"
SHARD_TOKENS = 4 * 2**20
"""Tokens of a shard, about; a text is never cut."""


class DataError(ValueError):
    """Generated texts that cannot be used; the message says what was found, what was expected and what to do."""


SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("ended", pa.bool_()),
        ("confidence", pa.float64()),
    ]
)
"""``prompt`` and ``completion`` are null in texts without a prompt; ``prompt_tokens`` are the first of ``ids`` that were given,
not chosen. ``text``, ``prompt`` and ``completion`` are without special tokens, for people; null without a tokenizer."""


def as_table(texts: Sequence[Written], tokenizer: Any, *, prompted: bool) -> pa.Table:
    """Rows of texts."""

    def decoded(ids: Sequence[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(list(ids), skip_special_tokens=True)

    rows = []
    for each in texts:
        given = len(each.start.ids)
        row = {"number": each.start.number, "text": decoded(each.ids), "ids": each.ids, "prompt_tokens": given}
        if prompted:
            row |= {"prompt": decoded(each.ids[:given]), "completion": decoded(each.ids[given:])}
        rows.append(row | {"ended": each.ended, "confidence": each.confidence})
    return pa.Table.from_pylist(rows, SCHEMA)


def write_table(table: pa.Table, path: Path, provenance: Mapping[str, Any]) -> None:
    """Writes a shard."""
    metadata = {_KEY: json.dumps({"format": FORMAT, **provenance}, sort_keys=True).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def read_tables(paths: Sequence[Path]) -> pa.Table:
    """The rows of several shards, in the order of their numbers."""
    return pa.concat_tables([pq.read_table(path) for path in paths]).sort_by("number")


def shards_of(table: pa.Table, limit: int = SHARD_TOKENS) -> list[pa.Table]:
    """Cuts rows into shards of about ``limit`` tokens."""
    lengths = np.diff(_whole(table["ids"]).offsets.to_numpy())
    shard_of = (np.cumsum(lengths) - lengths) // limit
    cuts = [*(int(i) for i in np.flatnonzero(np.diff(shard_of, prepend=-1))), len(table)]
    return [table.slice(a, b - a) for a, b in itertools.pairwise(cuts)]


def _whole(column: pa.ChunkedArray) -> Any:
    return column.combine_chunks()


@dataclass(frozen=True, eq=False)
class GeneratedText:
    """Texts that a model wrote.

    Attributes:
        name: of the directory or file.
        provenance: what made them.
        ids: the tokens of all texts, one text behind another, int32 ``[tokens]``.
        lengths: tokens of each text ``[texts]``.
        prompt_tokens: how many of them were given ``[texts]``.
        ended: whether the model ended it, bool ``[texts]``.
        confidences: the mean of the model's probabilities of what it chose ``[texts]``.
    """

    name: str
    provenance: Mapping[str, Any]
    ids: np.ndarray
    lengths: np.ndarray
    prompt_tokens: np.ndarray
    ended: np.ndarray
    confidences: np.ndarray

    @classmethod
    def of(cls, name: str, provenance: Mapping[str, Any], table: pa.Table) -> GeneratedText:
        """The texts of a table of :data:`SCHEMA`."""
        lists = _whole(table["ids"])
        plain = ("prompt_tokens", "ended", "confidence")
        return cls(
            name,
            provenance,
            lists.flatten().to_numpy(),
            np.diff(lists.offsets.to_numpy()),
            *(_whole(table[column]).to_numpy(zero_copy_only=False) for column in plain),
        )

    @classmethod
    def written(cls, name: str, texts: Sequence[Written]) -> GeneratedText:
        """Texts as the model wrote them, which are kept nowhere."""
        return cls.of(name, {}, as_table(texts, None, prompted=False))

    def quality(self, vocabulary: Collection[int]) -> Quality:
        """What the texts look like, where ``vocabulary`` is all ids that there are."""
        chosen = self.lengths - self.prompt_tokens
        confidence = float((self.confidences * chosen).sum() / chosen.sum()) if chosen.sum() else None
        return judge(self.ids, self.lengths, self.ended, confidence, vocabulary)


def is_generated(place: str | Path) -> bool:
    """Whether a path is a directory of generated texts, or a shard of one."""
    path = Path(place).expanduser()
    if path.is_dir():
        return (path / PROVENANCE).is_file()
    if path.suffix != ".parquet" or not path.is_file():
        return False
    try:
        return _KEY in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def read_generated(place: str | Path) -> GeneratedText:
    """The texts in a directory of ``lowbit generate-data``, or in one of its shards.

    Raises:
        DataError: a directory that has lost or changed a shard, a damaged shard, or another version's.
    """
    path = Path(place).expanduser()
    try:
        if path.is_dir():
            provenance = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
            files = [path / name for name in provenance["files"]]
            for file in files:
                if not file.is_file() or file_sha256(file) != provenance["files"][file.name]:
                    raise DataError(
                        f"{file} is missing or changed since {PROVENANCE} was written; generate the texts again"
                    )
        else:
            provenance, files = json.loads((pq.read_schema(path).metadata or {})[_KEY]), [path]
        if provenance.get("format") != FORMAT:
            raise DataError(
                f"{path}: found {provenance.get('format')!r}, expected {FORMAT!r}; generate the texts again"
            )
        table = read_tables(files)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: not generated texts ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error
    if not table.schema.equals(SCHEMA) or not len(table):
        raise DataError(f"{path}: found {len(table)} rows of {table.schema.names}, expected rows of {SCHEMA.names}")
    return GeneratedText.of(path.resolve().name, provenance, table)
