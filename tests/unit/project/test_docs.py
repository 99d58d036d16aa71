"""Generated pages match the code."""

from __future__ import annotations

import importlib.util
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lowbit.catalog import INDEX
from lowbit.recipes import METHODS
from lowbit.reporting.measured import Measured
from lowbit.reporting.page import MOST_BYTES

DOCS = Path(__file__).parents[3] / "docs"


def script(name: str) -> Any:
    """docs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages():
    return script("methods")


def test_every_method_has_its_page_and_the_page_is_up_to_date(pages):
    found = {path.stem: path.read_text() for path in (DOCS / "methods").glob("*.md")}
    assert found == {name: pages.page(method) for name, method in METHODS.items()}, "run `make docs`"


def test_the_index_of_methods_is_up_to_date(pages):
    assert INDEX.read_text(encoding="utf-8") == pages.index(), "run `make docs`"


def test_what_recommendations_stand_on_and_the_page_for_choosing_say_what_was_measured():
    choosing = script("choosing")
    data = choosing.data()
    assert json.loads(choosing.FILE.read_text(encoding="utf-8")) == data, "run `make docs`"
    assert choosing.PAGE.read_text(encoding="utf-8") == choosing.page(Measured.from_dict(data)), "run `make docs`"


def test_the_page_of_results_is_made_of_todays_results_and_template_and_opens_quickly():
    report = script("report")
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.outdated(page) == [], "run `make docs`"
    assert len(page.encode()) <= MOST_BYTES
    changed = page.replace(sha256(report.files()[0].read_bytes()).hexdigest(), "")
    assert report.outdated(changed) == ["weight_only.jsonl"]
