"""The tables of papers: rows with recipes, and what was published of them, as files of ``tables/``.

A published figure is of another model, trained, calibrated and evaluated elsewhere. What compares is the order of the rows and their
distances from the unquantized model, so perplexities come with the logarithm of their ratio to it, which is printed for ours too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import log
from typing import Any

import yaml

from lowbit.comparison.over import mean_accuracy
from lowbit.comparison.results import Record
from lowbit.comparison.rows import ORIGINAL, Row, as_rows
from lowbit.numerics import nearest
from lowbit.recipes.files import Loader

_FOLDER = files("lowbit.comparison") / "tables"
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Preset:
    """One table.

    Attributes:
        name: of its file.
        title, paper, note: what it is, where it was published, and how its figures were measured.
        columns: model and figure of each published column.
        rows: those that have a recipe.
        published: figures by label, that of the original under ``original``; None where none is known.
        labels: all labels in the table's order, those without a recipe too.
        tasks: zero-shot tasks that the table reports.
        speed: whether it reports tokens per second.
    """

    name: str
    title: str
    paper: str
    note: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    published: Mapping[str, tuple[float | None, ...]]
    labels: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    speed: bool = False

    def beside(self, records: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Our figures and the published ones: the columns, and a row of texts for each label and for the original."""
        ours = {record["label"]: record for record in records}
        header = ["", "perplexity (ln ratio)", "KL, nats"]
        header += ["tasks, %"] if self.tasks else []
        header += ["tokens/s", "GB of weights"] if self.speed else []
        header += [f"published: {model}, {_of(figure)}" for model, figure in self.columns]
        rows = []
        for label in (ORIGINAL, *self.labels):
            record = next(
                (found for name, found in ours.items() if name == label or name.startswith(f"{label}, seed ")), {}
            )
            rows.append((label, *self._ours(record), *self._published(label)))
        return tuple(header), rows

    def _ours(self, record: Mapping[str, Any]) -> Iterator[str]:
        if "error" in record:
            record = {}
        yield _ratio(record.get("perplexity"), record.get("log_perplexity_difference"))
        yield "" if record.get("kl") is None else f"{record['kl']:.4f}"
        if self.tasks:
            mean = mean_accuracy(record)
            yield "" if mean is None else f"{100 * mean:.2f}"
        if self.speed:
            yield "" if "speed" not in record else f"{record['speed']['decode_tokens_per_s']:.1f}"
            yield "" if "bytes" not in record else f"{record['bytes'] / 1e9:.3f}"

    def _published(self, label: str) -> Iterator[str]:
        none = (None,) * len(self.columns)
        for (_, figure), value, full in zip(
            self.columns, self.published.get(label, none), self.published[ORIGINAL], strict=True
        ):
            if figure == PERPLEXITY and label != ORIGINAL and value is not None and full is not None:
                yield _ratio(value, log(value / full))
            else:
                yield "" if value is None else f"{value:g}"


def preset_names() -> tuple[str, ...]:
    """The names of all tables."""
    return tuple(
        sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))
    )


def read_preset(name: str) -> Preset:
    """The table of this name.

    Raises:
        ValueError: there is none, with the nearest name.
    """
    if name not in preset_names():
        raise ValueError(f"no table {name!r}{nearest(name, list(preset_names()))}")
    content = yaml.load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader)
    published, entries, labels = {ORIGINAL: tuple(content["original"])}, [], []
    for entry in content["rows"]:
        labels.append(entry["label"])
        if "published" in entry:
            published[entry["label"]] = tuple(entry.pop("published"))
        if "method" in entry:
            entries.append(entry)
    return Preset(
        name=name,
        title=content["title"],
        paper=content["paper"],
        note=content["note"],
        columns=tuple((column["model"], column["figure"]) for column in content["columns"]),
        rows=tuple(as_rows(entries)),
        published=published,
        labels=tuple(labels),
        tasks=tuple(content.get("tasks", ())),
        speed=content.get("speed", False),
    )


def markdown_beside(preset: Preset, records: Sequence[Record]) -> str:
    """A section for the page: our rows beside the published ones."""
    header, rows = preset.beside(records)
    lines = [f"# {preset.title}", "", f"Published columns: {preset.paper}, on other models than ours. {preset.note}"]
    lines += ["The ln ratio is the logarithm of a perplexity over the original's.", "", f"| {' | '.join(header)} |"]
    lines += [f"|---|{'---:|' * (len(header) - 1)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _ratio(value: float | None, difference: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" + ("" if difference is None else f" ({difference:+.3f})")


def _of(figure: str) -> str:
    return f"{PERPLEXITY} (ln ratio)" if figure == PERPLEXITY else figure
