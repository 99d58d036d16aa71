"""Generated pages match the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lowbit.catalog import INDEX
from lowbit.recipes import METHODS

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def pages():
    """docs/methods.py as a module."""
    spec = importlib.util.spec_from_file_location("methods_pages", DOCS / "methods.py")
    assert spec is not None and spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    return pages


def test_every_method_has_its_page_and_the_page_is_up_to_date(pages):
    found = {path.stem: path.read_text() for path in (DOCS / "methods").glob("*.md")}
    assert found == {name: pages.page(method) for name, method in METHODS.items()}, "run `make docs`"


def test_the_index_of_methods_is_up_to_date(pages):
    assert INDEX.read_text(encoding="utf-8") == pages.index(), "run `make docs`"
