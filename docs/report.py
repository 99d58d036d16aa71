"""Writes docs/report/index.html: the committed results as one page, to be opened in a browser.

`make docs` runs it. A test checks that the page was made of these very files with this template, without making it again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lowbit.reporting import write_report

DOCS = Path(__file__).parent
PAGE = DOCS / "report" / "index.html"
RESULTS = DOCS.parent / "benchmarks" / "results"
TEMPLATE = DOCS.parent / "src" / "lowbit" / "reporting" / "template"
TITLE = "What lowbit measured"
FIRST = ("weight_only.jsonl", "weight_activation.jsonl", "ablation.jsonl", "training.jsonl")
"""What the page begins with; other results follow by name."""
LEFT_OUT = ("fidelity.jsonl",)
"""One record for each layer of each method: benchmarks/results/fidelity.md is its page."""


def files() -> list[Path]:
    """The results that the page shows, in order."""
    found = sorted(path for path in RESULTS.iterdir() if path.suffix in (".json", ".jsonl"))
    first = [RESULTS / name for name in FIRST]
    return [*first, *(path for path in found if path not in first and path.name not in LEFT_OUT)]


def outdated(page: str) -> list[str]:
    """What of the page is not of today's files, by name: results, and the template's style and script."""
    changed = [path.name for path in files() if hashlib.sha256(path.read_bytes()).hexdigest() not in page]
    parts = [path for path in TEMPLATE.iterdir() if path.suffix in (".css", ".js")]
    return changed + [part.name for part in parts if part.read_text(encoding="utf-8").strip() not in page]


if __name__ == "__main__":
    write_report(files(), PAGE, TITLE)
