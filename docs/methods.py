"""Writes docs/methods/<name>.md, and the index that `lowbit methods` reads, from the registry and the methods' docstrings.

`make docs` runs it. A test runs it again and compares, so that neither can say anything that the code does not.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from lowbit.catalog import INDEX, KV_FAMILY
from lowbit.plan.cache import cache_texts
from lowbit.recipes import METHODS, Method, Recipe

DIRECTORY = Path(__file__).parent / "methods"


def page(method: Method) -> str:
    """The page of one method."""
    recipe, described = method.recipe(), method.describe()
    caches = method.family == KV_FAMILY
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
            *(() if caches else _weight_rows(recipe)),
            *(_cache_rows(recipe) if recipe.scheme.cache else ()),
            "",
            "## Options",
            "",
            "| option | type | default |",
            "|---|---|---|",
            *(f"| `{name}` | `{_type(p)}` | `{p.default!r}` |" for name, p in method.options.items()),
            "",
            "## Use",
            "",
            *_use(recipe, caches).format(name=method.name).splitlines(),
            "",
        ]
    )


_USE = """    lowbit quantize MODEL --method {name} --calibration TEXT -o DIRECTORY

    lowbit.quantize(model, lowbit.recipe("{name}"), "python-docs", out="directory")

What it runs on and mixes with: [matrix](../matrix.md)."""
_CACHE_USE = """    lowbit generate MODEL --prompt TEXT --kv {name}
    lowbit quantize MODEL --method gptq --bits 4 --kv {name} --calibration TEXT -o DIRECTORY
    lowbit quantize MODEL --method {name} -o DIRECTORY

    model.generate(ids, cache=lowbit.kv_cache(model, "{name}"))

The last command leaves the weights as they are. How caches are held, stored and measured:
[composing](../composing.md#caches-of-keys-and-values)."""


_CALIBRATED_USE = """    lowbit quantize MODEL --method gptq --bits 4 --kv {name} --calibration TEXT -o DIRECTORY
    lowbit quantize MODEL --method {name} --calibration TEXT -o DIRECTORY
    lowbit generate DIRECTORY --prompt TEXT

    model = lowbit.load("directory")
    model.generate(ids, cache=lowbit.kv_cache(model, "{name}"))

The second command leaves the weights as they are. What calibration finds is stored with the model, so `--kv {name}` goes with
such a checkpoint, and with no other model. How caches are held, stored and measured:
[composing](../composing.md#caches-of-keys-and-values)."""


def _use(recipe: Recipe, caches: bool) -> str:
    if not caches:
        return _USE
    return _CALIBRATED_USE if recipe.cache_stages else _CACHE_USE


def _weight_rows(recipe: Recipe) -> list[str]:
    weight = next(rule.weight for rule in recipe.scheme.rules if rule.weight is not None)
    return [
        f"| inputs of its steps | {'of the original model' if recipe.feed == 'fp' else 'from the quantized blocks before'} |",
        f"| stored by default | `{weight.grid} {weight.granularity}` |",
        f"| steps | {', then '.join(f'`{type(step).__name__}`' for step in recipe.steps)} |",
    ]


def _cache_rows(recipe: Recipe) -> list[str]:
    spec = recipe.scheme.kv
    rows = [f"| by default | {'; '.join(cache_texts(recipe.scheme.cache))} |"]
    return rows if spec is None else [*rows, f"| bits for each number, heads of 128 channels | {spec.bits(128):.4g} |"]


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
