"""Writes docs/methods/<name>.md, and the index that `lowbit methods` reads, from the registry and the methods' docstrings.

`make docs` runs it. A test runs it again and compares, so that neither can say anything that the code does not.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from lowbit.catalog import INDEX
from lowbit.recipes import METHODS, Method

DIRECTORY = Path(__file__).parent / "methods"


def page(method: Method) -> str:
    """The page of one method."""
    recipe, described = method.recipe(), method.describe()
    weight = next(rule.weight for rule in recipe.scheme.rules if rule.weight is not None)
    text = inspect.getdoc(method.build) or ""
    return "\n".join(
        [
            f"# {method.name}",
            "",
            text,
            "",
            "| | |",
            "|---|---|",
            f"| paper | {method.paper or 'none'} |",
            f"| family | {method.family} |",
            f"| needs | {', '.join(described['needs']) or 'no data'} |",
            f"| inputs of its steps | {'of the original model' if recipe.feed == 'fp' else 'from the quantized blocks before'} |",
            f"| stored by default | `{weight.grid} {weight.granularity}` |",
            f"| steps | {', then '.join(f'`{type(step).__name__}`' for step in recipe.steps)} |",
            "",
            "## Options",
            "",
            "| option | type | default |",
            "|---|---|---|",
            *(f"| `{name}` | `{_type(p)}` | `{p.default!r}` |" for name, p in method.options.items()),
            "",
            "## Use",
            "",
            f"    lowbit quantize MODEL --method {method.name} --calibration TEXT -o DIRECTORY",
            "",
            f'    lowbit.quantize(model, lowbit.recipe("{method.name}"), "python-docs", out="directory")',
            "",
            "What it runs on and mixes with: [matrix](../matrix.md).",
            "",
        ]
    )


def _type(parameter: inspect.Parameter) -> str:
    said: Any = parameter.annotation
    text = said if isinstance(said, str) else inspect.formatannotation(said)
    return text.replace("typing.", "").replace("|", "or")


def index() -> str:
    """The file that :func:`lowbit.list_methods` reads."""
    return json.dumps([METHODS[name].describe() for name in sorted(METHODS)], indent=1) + "\n"


def main() -> None:
    INDEX.write_text(index(), encoding="utf-8")
    DIRECTORY.mkdir(exist_ok=True)
    for stale in {path.stem for path in DIRECTORY.glob("*.md")} - set(METHODS):
        (DIRECTORY / f"{stale}.md").unlink()
    for name, method in METHODS.items():
        (DIRECTORY / f"{name}.md").write_text(page(method))


if __name__ == "__main__":
    main()
