"""The tables of papers: rows with recipes, and what was published of them, as files of ``tables/``.

A published figure is of another model, trained, calibrated and evaluated elsewhere. What compares is the order of the rows and their
distances from the unquantized model, so perplexities come with the logarithm of their ratio to it, which is printed for ours too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import log
from types import MappingProxyType
from typing import Any

import yaml

from lowbit.comparison.over import mean_accuracy
from lowbit.comparison.results import Record
from lowbit.comparison.rows import ORIGINAL, Row, as_rows
from lowbit.numerics import nearest
from lowbit.recipes import METHODS
from lowbit.recipes.files import Loader
from lowbit.tables import Table, markdown

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

    def beside(self, records: Sequence[Record]) -> Table:
        """Our figures and the published ones: a row for each label and for the original."""
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
            rows.append((label, *self._ours(record, ours.get(ORIGINAL, {})), *self._published(label)))
        return Table("", tuple(header), tuple(rows))

    def _ours(self, record: Mapping[str, Any], original: Mapping[str, Any]) -> Iterator[str]:
        if "error" in record:
            record = {}
        value, full = record.get("perplexity"), original.get("perplexity")
        yield _ratio(value, log(value / full) if value and full and record is not original else None)
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


def read_preset(name: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Preset:
    """The table of this name.

    Args:
        changes: options, such as ``epochs``, that every row whose method has them takes in place of its own. Labels of such rows say
            so, because the published figures beside them were made otherwise.

    Raises:
        ValueError: there is none, with the nearest name; an option that no method of the table has.
    """
    if name not in preset_names():
        raise ValueError(f"no table {name!r}{nearest(name, list(preset_names()))}")
    content = yaml.load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader)
    published, entries, labels = {ORIGINAL: tuple(content["original"])}, [], []
    entries_of_table = [_changed(entry, changes) for entry in content["rows"]]
    if unknown := sorted(key for key in changes if not any(_takes(entry, key) for entry in entries_of_table)):
        raise ValueError(f"no method of table {name} has an option {', '.join(map(repr, unknown))}")
    for entry in entries_of_table:
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


def _takes(entry: Mapping[str, Any], option: str) -> bool:
    """Whether a method of an entry has the option."""
    return any(option in METHODS[part].options for part in entry.get("method", "").split("+") if part)


def _changed(entry: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with those of ``changes`` that its method has, and what they change in its label."""
    own = {key: value for key, value in changes.items() if _takes(entry, key) and entry.get(key, ...) != value}
    said = "".join(f", {key} {value}" for key, value in own.items())
    return {**entry, **own, "label": f"{entry['label']}{said}"}


def markdown_beside(preset: Preset, records: Sequence[Record]) -> str:
    """A section for the page: our rows beside the published ones."""
    lines = [f"# {preset.title}", "", f"Published columns: {preset.paper}, on other models than ours. {preset.note}"]
    lines += ["The ln ratio is the logarithm of a perplexity over the original's.", ""]
    return "\n".join([*lines, markdown(preset.beside(records))])


def _ratio(value: float | None, difference: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" + ("" if difference is None else f" ({difference:+.3f})")


def _of(figure: str) -> str:
    return f"{PERPLEXITY} (ln ratio)" if figure == PERPLEXITY else figure
