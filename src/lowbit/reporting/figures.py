"""Figures as SVG that take the colours of the page, with a title for every mark.

matplotlib draws them, which the package has for ``lowbit inspect``. plotly's script alone has more bytes than a page may have,
and its figures are empty for a screen reader, on paper and where scripts are off.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lowbit.inspection.plots import COLOURS, plain
from lowbit.tables import Table


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        title: its caption.
        summary: what it shows, for those who cannot see it.
        svg: markup, safe to put into a page.
        table: its numbers.
    """

    title: str
    summary: str
    svg: str
    table: Table


@dataclass
class Marks:
    """Titles of marks, which a browser shows under the pointer."""

    titles: list[tuple[str, str]] = field(default_factory=list)

    def add(self, artist: Any, key: str, title: str) -> None:
        """Gives a matplotlib artist a title; ``key`` is the first cell of its row in the table."""
        artist.set_gid(f"lowbit-mark-{len(self.titles)}")
        self.titles.append((key, title))


_LIGHT = {
    "#000000": "ink",
    "#b0b0b0": "line",
    "#cccccc": "line",
    "#808080": "faint",
    "#0072b2": "c0",
    "#d55e00": "c1",
    "#009e73": "c2",
    "#cc79a7": "c3",
    "#e69f00": "c4",
    "#56b4e9": "c5",
    "#f0e442": "c6",
}
"""Colours that are drawn, and the variables of the page that replace them where it is dark."""
FAINT = "#808080"
_OPTIONS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lowbit",  # the same figure has the same bytes
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_OPTIONS):
        yield


def draw(
    title: str, summary: str, table: Table, paint: Callable[[Any, Marks], None], size: tuple[float, float] = (8.0, 4.4)
) -> Picture:
    """A figure with one pair of axes.

    Args:
        title, summary, table: of the :class:`Picture`.
        paint: draws on the axes, and gives titles to marks.
        size: inches.
    """
    marks = Marks()
    with _style():
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots(), marks)
        svg = _svg(figure, table.title, summary, marks.titles)
    return Picture(title, summary, svg, table)


def picture_of(title: str, summary: str, table: Table, make: Callable[[], Any]) -> Picture:
    """The matplotlib figure that ``make`` returns."""
    with _style():
        return Picture(title, summary, _svg(make(), table.title, summary, ()), table)


def _svg(figure: Any, name: str, label: str, titles: Sequence[tuple[str, str]]) -> str:
    written = io.StringIO()
    figure.savefig(
        written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    unique = "f" + hashlib.sha256((name + text).encode()).hexdigest()[:8] + "-"  # ids are the page's, not the figure's
    text = re.sub(r'\bid="', f'id="{unique}', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{unique}", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{_LIGHT[m[0]]}, {m[0]})" if m[0] in _LIGHT else m[0], text)
    for i, (key, title) in enumerate(titles):
        mark = f'<g class="mark" data-key="{escape(key)}"><title>{escape(title)}</title>'
        text = text.replace(f'<g id="{unique}lowbit-mark-{i}">', mark, 1)
    head = re.match(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', text)
    assert head is not None
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} {head[1]} role="img" aria-label="{escape(label)}">' + text[head.end() :].rstrip()


def log_axis(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 on an axis with a logarithmic scale."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_points(axes: Any, labels: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]]) -> None:
    """Writes labels next to points, where they cover neither other labels nor other points; those without room stay away.

    Args:
        labels: x, y and text, the most important first.
        points: all that must stay free. The axes have their scales and limits already.
    """
    axes.figure.draw_without_rendering()  # places the axes
    unit = axes.figure.dpi / 72  # pixels of a point of text
    taken = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in axes.transData.transform(points)]
    for x, y, text in labels:
        (px, py), width, height = axes.transData.transform((x, y)), 4.6 * unit * len(text), 9 * unit
        for right, up in ((False, False), (True, True), (True, False), (False, True)):
            left, low = px + (7 * unit if right else -7 * unit - width), py + (5 * unit if up else -5 * unit - height)
            box = (left, low, left + width, low + height)
            inside = axes.bbox.x0 <= box[0] and box[2] <= axes.bbox.x1 + 40 * unit and axes.bbox.y0 <= box[1]
            if inside and not any(_overlap(box, other) for other in taken):
                axes.annotate(
                    plain(text),
                    (x, y),
                    xytext=(7 if right else -7, 5 if up else -5),
                    textcoords="offset points",
                    ha="left" if right else "right",
                    va="bottom" if up else "top",
                    fontsize=8,
                )
                taken.append(box)
                break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def lines(
    title: str, summary: str, table: Table, series: dict[str, tuple[list[float], list[float]]], x: str, y: str
) -> Picture:
    """A line for each of ``series``, by name, over a logarithmic y axis where all values are positive."""

    def paint(axes: Any, marks: Marks) -> None:
        for number, (name, (xs, ys)) in enumerate(series.items()):
            colour = COLOURS[number % len(COLOURS)]
            dash = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
            (drawn,) = axes.plot(xs, ys, dash, color=colour, marker="." if len(xs) < 60 else "", label=plain(name))
            marks.add(drawn, name, name)
        if all(value > 0 for _, ys in series.values() for value in ys):
            axes.set_yscale("log")
            log_axis(axes.yaxis)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.4)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return draw(title, summary, table, paint)


def heat_map(
    title: str, summary: str, table: Table, cells: dict[tuple[str, int], tuple[float, str]], scale: str
) -> Picture:
    """Values in cells of named rows and numbered columns, on a logarithmic scale of colours.

    Args:
        cells: by row and column the value, not negative, and the title of its mark.
        scale: what the colours mean.
    """
    names = list(dict.fromkeys(row for row, _ in cells))
    positive = [value for value, _ in cells.values() if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    norm = LogNorm(low, high if high > low else 2 * low)
    last = max(column for _, column in cells)

    def paint(axes: Any, marks: Marks) -> None:
        colours = colormaps["viridis"]
        for (row, column), (value, words) in cells.items():
            colour = colours(norm(max(value, low)))
            place = (column - 0.5, names.index(row) - 0.5)
            marks.add(axes.add_patch(Rectangle(place, 1, 1, facecolor=colour, linewidth=0)), row, words)
        axes.set(xlim=(-0.5, last + 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="block")
        axes.set_yticks(range(len(names)), [plain(name) for name in names])
        bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=scale, pad=0.01)
        log_axis(bar.ax.yaxis)

    return draw(title, summary, table, paint, (9.0, 1.4 + 0.34 * len(names)))
