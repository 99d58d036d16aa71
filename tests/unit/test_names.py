"""The core asks neither which method nor which model it runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers.models

import lowbit
from lowbit.recipes import METHODS

SOURCE = Path(lowbit.__file__).parent
PROTOCOLS = {"gptq", "llama.cpp", "word"}  # names of evaluation protocols, not of methods
MODELS = {path.name for path in Path(transformers.models.__file__).parent.iterdir() if path.is_dir()} - {
    "auto",
    "timm",
    "encoder_decoder",
}


def _compared_strings(path: Path) -> set[str]:
    """Strings that a file compares something with, in ``==``, ``in`` or ``match``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue):
            found |= {
                each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
    return found


FILES = [str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.py"))]


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("methods/")])
def test_no_branch_names_a_method_outside_methods(file):
    names = _compared_strings(SOURCE / file) & set(METHODS)
    assert not (names - PROTOCOLS if file.startswith("evaluate/") else names)


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("architectures/")])
def test_no_branch_names_a_model_outside_architectures(file):
    assert not _compared_strings(SOURCE / file) & MODELS


@pytest.mark.parametrize(
    "file", sorted(path.name for path in (SOURCE / "methods").glob("*.py") if path.name != "__init__.py")
)
def test_every_method_fits_on_a_page(file):
    assert len((SOURCE / "methods" / file).read_text().splitlines()) <= 60


def test_every_method_says_where_it_is_from_and_what_its_options_mean():
    for name, method in METHODS.items():
        text = method.build.__doc__ or ""
        assert len(method.summary) > 30, name
        missing = [option for option in method.options if option not in text and option not in ("bits", "group_size")]
        assert not missing, f"{name}: {missing} are not explained"
