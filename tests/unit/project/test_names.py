"""The core never asks which method or which model it runs."""

from __future__ import annotations

import ast
from pathlib import Path

import transformers.models

import lowbit
from lowbit.catalog import KV_FAMILY
from lowbit.methods import USUAL_CACHE
from lowbit.recipes import METHODS

SOURCE = Path(lowbit.__file__).parent
PROTOCOLS = {"gptq", "llama.cpp", "word"}  # names of evaluation protocols, not of methods
MODELS = {path.name for path in Path(transformers.models.__file__).parent.iterdir() if path.is_dir()} - {
    "auto",
    "timm",
    "encoder_decoder",
}


def _compared_strings(path: Path) -> set[str]:
    """Strings that a file compares with in ``==``, ``in`` or ``match``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue):
            found |= {
                each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
    return found


FILES = [str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.py"))]


def test_no_branch_names_a_method_outside_methods():
    for file in FILES:
        names = _compared_strings(SOURCE / file) & set(METHODS)
        allowed = PROTOCOLS if file.startswith("evaluate/") else set()
        assert file.startswith("methods/") or not names - allowed, file


def test_no_code_names_a_method_for_caches_outside_methods():
    caches = {name for name, each in METHODS.items() if each.family == KV_FAMILY}
    assert USUAL_CACHE in caches
    for file in FILES:
        constants = {node.value for node in ast.walk(ast.parse((SOURCE / file).read_text())) if _is_text(node)}
        assert file.startswith("methods/") or not constants & caches, file


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_no_branch_names_a_model_outside_architectures():
    for file in FILES:
        assert file.startswith("architectures/") or not _compared_strings(SOURCE / file) & MODELS, file


def test_every_method_fits_on_a_page():
    for path in sorted((SOURCE / "methods").glob("*.py")):
        assert path.name == "__init__.py" or len(path.read_text().splitlines()) <= 60, path.name


def test_every_method_says_where_it_is_from_and_what_its_options_mean():
    for name, method in METHODS.items():
        text = method.build.__doc__ or ""
        assert len(method.summary) > 30, name
        missing = [option for option in method.options if option not in text and option not in ("bits", "group_size")]
        assert not missing, f"{name}: {missing} are not explained"
