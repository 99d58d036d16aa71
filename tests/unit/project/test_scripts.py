"""Scripts beside the package, which the suite does not run, still import what the package has."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(file for folder in ("benchmarks", "examples", "docs") for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_what_a_script_imports_from_the_package_is_there(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowbit":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize(
    "script", [file for file in SCRIPTS if file.parent.name == "benchmarks"], ids=lambda file: file.stem
)
def test_a_script_makes_tables_of_markdown_as_the_package_does(script):
    assert "|--" not in script.read_text(encoding="utf-8"), "use lowbit.tables.markdown"
