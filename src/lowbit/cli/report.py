"""``lowbit report``: what many runs cost, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import common

EXAMPLE = "Example: lowbit report results.jsonl smollm2-w4 smollm2-inspection -o report.html"


def command(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="Results of compare, checkpoints, directories of inspect, rows of a training, answers of generate --json, tables of "
            "benchmarks; or a directory of these.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="The page.")] = None,
    title: Annotated[str, typer.Option(help="The page's heading.")] = "lowbit report",
    latex: Annotated[bool, typer.Option("--latex", help="Print every table for LaTeX (booktabs).")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print every table as Markdown.")] = False,
) -> None:
    """Write one page with figures and tables of everything that was measured.

    The page is one file that needs no network: size against quality, errors by layer, outliers, courses of trainings, caches, answers
    side by side, recipes, hashes and commands.
    """
    if latex and markdown:
        raise typer.BadParameter("found both --latex and --markdown; give one of them")
    if out is None and not (latex or markdown):
        raise typer.BadParameter("give -o FILE.html, --latex or --markdown", param_hint="--out / -o")
    from lowbit.reporting import make_page, read_sources, write_report

    page = make_page(read_sources(results), title) if out is None else write_report(results, out, title)
    if latex or markdown:
        typer.echo(page.tables("latex" if latex else "markdown"), nl=False)
    if out is not None:
        common.say(f"{out}: {common.size(out.stat().st_size)}, {len(page.sections)} sections")
