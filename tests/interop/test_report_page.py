"""The page of lowbit report in a browser: no error, figures, sorting, filtering, saving, and what axe says of access to it.

Needs playwright, axe-playwright-python and a Chromium of the system; LOWBIT_SCREENSHOTS names a directory for pictures of the page.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowbit.reporting import write_report

from measurements import HOSTILE, write_all

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")

VIEWS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 400, "height": 800}},
}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("page")
    write_report(write_all(place), place / "report.html", HOSTILE)
    return place / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, page_file) -> Iterator[Any]:
    """The page in a browser without a network; leaving fails if it complained."""
    complaints: list[str] = []
    context = browser.new_context(**VIEWS["light"], offline=True)
    page = context.new_page()
    _listen(page, complaints)
    page.goto(page_file.as_uri())
    yield page
    context.close()
    assert not complaints


def _listen(page: Any, complaints: list[str]) -> None:
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_clean_accessible_and_fits(browser, page_file, view):
    complaints: list[str] = []
    context = browser.new_context(**VIEWS[view], offline=True)
    page = context.new_page()
    _listen(page, complaints)
    page.goto(page_file.as_uri())
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= VIEWS[view]["viewport"]["width"]
    found = axe.Axe().run(page)
    if directory := os.environ.get("LOWBIT_SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{view}.png")
    context.close()
    assert not complaints
    assert found.violations_count == 0, found.generate_report()


def test_every_figure_is_drawn_with_its_marks_and_a_name(opened):
    figures = opened.locator("figure")
    assert figures.count() == 13
    for i in range(figures.count()):
        image = figures.nth(i).get_by_role("img")
        box = image.bounding_box()
        assert box["width"] > 200 and box["height"] > 80
        assert len(image.get_attribute("aria-label")) > 20
    assert opened.locator(".mark title").count() > 30


def test_a_heading_sorts_by_number_both_ways_and_says_so(opened):
    table = opened.locator("#section-1 > .table table")
    head = table.get_by_role("columnheader", name="perplexity")
    values = "rows => rows.map(row => row.cells[1].textContent.trim())"
    for state, order in (("ascending", 1), ("descending", -1)):
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == state
        texts = table.locator("tbody tr").evaluate_all(values)
        numbers = [float(text) for text in texts if text]
        assert numbers == sorted(numbers, reverse=order < 0) and len(numbers) == 6
        assert texts[-1] == ""  # the row that failed comes last either way


def test_the_filter_hides_rows_and_fades_their_marks(opened):
    section = opened.locator("#section-1")
    section.get_by_role("searchbox").last.fill("small")
    rows = section.locator("> .table tbody tr:visible")
    assert rows.count() == 1
    assert section.get_by_role("status").last.inner_text() == "1 of 7 rows"
    away = section.locator(".mark.away").evaluate_all("marks => marks.map(mark => mark.dataset.key)")
    assert set(away) == {"large", "worse and larger", HOSTILE}


def test_figures_are_saved_as_svg_and_tables_as_csv(opened):
    section = opened.locator("#section-1")
    with opened.expect_download() as saved:
        section.get_by_role("button", name="SVG").click()
    text = saved.value.path().read_text()
    assert text.startswith("<svg") and "var(" not in text and "lowbit-mark" not in text
    with opened.expect_download() as saved:
        section.locator("> .table").get_by_role("button", name="CSV").click()
    lines = saved.value.path().read_text().splitlines()
    assert lines[0].startswith("row,perplexity,") and len(lines) == 8
    assert saved.value.suggested_filename.endswith(".csv")


def test_a_row_leads_to_its_recipe_by_the_keyboard(opened):
    link = opened.locator("#section-1 > .table tbody a").nth(1)
    target = link.get_attribute("href")
    link.press("Enter")
    assert opened.locator(target).get_attribute("open") is not None
    assert "method" in opened.locator(target).inner_text() or "scheme" in opened.locator(target).inner_text()


def test_on_paper_everything_is_open(opened):
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.locator("details:not([open])").count() == 0
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.locator("details[open]").count() == 0
