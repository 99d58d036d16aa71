"""The page: everything in one file that works without a network, and its tables alone."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import jinja2
from markupsafe import Markup

from lowbit.reporting.comparisons import comparison_sections
from lowbit.reporting.outliers import inspection_sections
from lowbit.reporting.runs import cache_section, curve_section, run_section, sample_section
from lowbit.reporting.sections import Section
from lowbit.reporting.sources import Sources, read_sources
from lowbit.tables import FORMS, Table
from lowbit.version import __version__
from lowbit.whole_file import write_whole

MOST_BYTES = 3_000_000
"""Of a page: what is larger opens slowly and does not go by mail."""
_TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: its heading.
        sections: in order.
        files: what it was made of.
    """

    title: str
    sections: tuple[Section, ...]
    files: Table

    def html(self) -> str:
        """The page. Everything that comes from a file is escaped; no script but the page's own may run in it."""
        # Everything is escaped but the page's own parts, which are marked as they are.
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATE),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        script = (_TEMPLATE / "page.js").read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        return environment.get_template("page.html").render(
            page=self,
            version=__version__,
            style=Markup((_TEMPLATE / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=digest,
            markup=Markup,
            finite=math.isfinite,
        )

    def tables(self, form: str) -> str:
        """All tables in one of :data:`lowbit.tables.FORMS`; the numbers of figures too."""
        return "\n".join(FORMS[form](table) for section in self.sections for table in _tables(section))


def _tables(section: Section) -> list[Table]:
    """The tables of a section, and those of its pictures that are not among them."""
    found = [*section.tables]
    return found + [picture.table for picture in section.pictures if picture.table not in found]


def make_page(sources: Sources, title: str = "lowbit report") -> Page:
    """The page on what was read."""
    sections = comparison_sections(sources.records)
    sections += [run_section(i, name, report) for i, (name, report) in enumerate(sources.runs.items(), start=1)]
    sections += [curve_section(name, rows) for name, rows in sources.curves.items()]
    sections += inspection_sections(sources.inspections) if sources.inspections else []
    sections += [cache_section(name, measured) for name, measured in sources.caches.items()]
    sections += [sample_section(sources.samples)] if sources.samples else []
    sections += [Section(name, (), tables=tuple(tables)) for name, tables in sources.tables.items()]
    rows = tuple((name, f"{count:,}", sha256) for name, sha256, count in sources.files)
    return Page(title, tuple(sections), Table("Files of this report", ("file", "bytes", "sha256"), rows))


def write_report(paths: Iterable[str | PathLike[str]], out: str | PathLike[str], title: str = "lowbit report") -> Page:
    """Makes one page of files that other commands wrote.

    Args:
        paths: see :mod:`lowbit.reporting.sources`.
        out: the ``.html`` file.
        title: the page's heading.

    Raises:
        ValueError: a file that cannot be understood; another suffix; a page of more than 3 MB.
    """
    target = Path(out).expanduser()
    check_target(target)
    page = make_page(read_sources(paths), title)
    text = page.html().encode("utf-8")
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"the page has {len(text):,} bytes, over the limit of {MOST_BYTES:,}: make several of fewer files, or leave out "
            f"those with the most rows ({max(page.files.rows, key=lambda row: int(row[1].replace(',', '')))[0]})"
        )
    write_whole(target, lambda file: file.write_bytes(text))
    return page


def check_target(target: Path) -> None:
    """Raises ValueError unless ``target`` can be a page."""
    if target.suffix not in (".html", ".htm"):
        raise ValueError(f"a report is a page: expected a file name that ends in .html, found {target}")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a directory: make it, or choose another file")
