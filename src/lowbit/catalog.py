"""What comes with the package, by name: methods and recipe files. Read from files, so that listing them imports nothing.

``methods/index.json`` is written by ``make docs`` from the registry; a test checks that it is up to date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KV_FAMILY = "kv-cache"
"""The family of methods that say how a cache is held."""
_PACKAGE = Path(__file__).parent
INDEX = _PACKAGE / "methods" / "index.json"


def list_methods() -> list[dict[str, Any]]:
    """Every method that comes with lowbit: name, family, paper, summary, needs, options with their defaults."""
    return json.loads(INDEX.read_text(encoding="utf-8"))


def builtin_recipes() -> dict[str, Path]:
    """The recipe files that come with the package, by name."""
    return {path.stem: path for path in sorted((_PACKAGE / "recipes").glob("*.yaml"))}


__all__ = ["INDEX", "KV_FAMILY", "builtin_recipes", "list_methods"]
