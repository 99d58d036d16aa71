"""A table of texts, and its forms for other programs."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns.

    Attributes:
        title: what it shows; empty: forms have no heading and no caption.
        columns: their names.
        rows: one text for each column, empty where there is none.
        links: for each row the id of what explains it on the page; empty: no row has one.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    links: tuple[str, ...] = ()

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Of each column: whether all its texts begin with a number, and there is one."""
        filled = [[row[i] for row in self.rows if row[i]] for i in range(len(self.columns))]
        return tuple(bool(texts) and all(map(_NUMBER.match, texts)) for texts in filled)

    def filled(self) -> Table:
        """The table without columns that are empty in every row; the first stays."""
        kept = [i for i in range(len(self.columns)) if i == 0 or any(row[i] for row in self.rows)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)

    def sort_key(self, row: int, column: int) -> str:
        """The number at the beginning of a cell of a numeric column, as text that JavaScript reads; empty: none."""
        found = _NUMBER.match(self.rows[row][column])
        return repr(float(found[0])) if found else ""


def of_mappings(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table of JSON objects: their keys are the columns, in the order of their first appearance."""
    rows = list(rows)
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Table(title, columns, tuple(tuple(text_of(row.get(key)) for key in columns) for row in rows))


def text_of(value: Any) -> str:
    """A JSON value as the text of a cell: numbers in five digits, lists and objects as compact JSON."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and all(isinstance(each, int | float | str) for each in value):
        return ", ".join(map(text_of, value))
    return json.dumps(value, separators=(", ", ": ")) if isinstance(value, dict | list) else str(value)


def markdown(table: Table) -> str:
    """The title in bold, and a table of Markdown."""
    rule = "|".join("---:" if numeric else "---" for numeric in table.numeric)
    rows = ("| " + " | ".join(map(_markdown_cell, row)) + " |" for row in (table.columns, *table.rows))
    head, *body = rows
    title = [f"**{_markdown_cell(table.title)}**", ""] if table.title else []
    return "\n".join([*title, head, f"|{rule}|", *body]) + "\n"


def _markdown_cell(text: str) -> str:
    return " ".join(re.sub(r"[\\|<>*_`]", r"\\\g<0>", text).split())


def latex(table: Table) -> str:
    """A tabular of the package booktabs; with a title in an environment that has it as its caption."""
    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    head, *body = (" & ".join(map(_latex_cell, row)) + r" \\" for row in (table.columns, *table.rows))
    lines = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if table.title:
        lines = [r"\begin{table}", rf"\caption{{{_latex_cell(table.title)}}}", *lines, r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_cell(text: str) -> str:
    words = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    return re.sub(r"[\\{}$&#%_^~]", lambda match: words.get(match[0], "\\" + match[0]), " ".join(text.split()))


def comma_separated(table: Table) -> str:
    """CSV with a header line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    return text.getvalue()


FORMS: dict[str, Callable[[Table], str]] = {"csv": comma_separated, "latex": latex, "markdown": markdown}
"""By name, what writes a table for other programs."""
