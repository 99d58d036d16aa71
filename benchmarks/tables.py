"""Rows of papers' tables that other comparisons measured already, beside the published figures.

    python benchmarks/tables.py smoothquant-levels survey

A row of a table is taken from benchmarks/results/{weight_only,weight_activation}.jsonl if a record there has its very recipe; its
record names the file and the label there. Nothing is measured. `lowbit compare --table NAME -o FILE` measures the other rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lowbit.comparison import ORIGINAL, preset_names, read_preset
from lowbit.comparison.presets import Preset, markdown_beside
from lowbit.comparison.results import Record, Results
from lowbit.comparison.table import markdown
from lowbit.numerics import to_dict

RESULTS = Path(__file__).parent / "results"
MEASURED = ("weight_only", "weight_activation")


def rows_of(preset: Preset) -> list[Record]:
    """The original, and the rows that were measured, under the table's labels."""
    known = [(name, record) for name in MEASURED for record in Results(RESULTS / f"{name}.jsonl").all_latest()]
    wanted = [(ORIGINAL, None), *((row.label, to_dict(row.recipe)) for row in preset.rows)]
    rows = []
    for label, recipe in wanted:
        for name, record in known:
            if record["recipe"] == recipe and "error" not in record:
                taken = {"file": f"{name}.jsonl", "label": record["label"]}
                rows.append(record | {"label": label, "taken_from": taken})
                break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=preset_names())
    for name in parser.parse_args().tables:
        preset = read_preset(name)
        rows = rows_of(preset)
        results = Results(RESULTS / f"table-{name}.jsonl")
        for row in rows:
            if results.latest(row) is None:
                results.add(row)
        labels = [row.label for row in preset.rows]
        page = "\n".join([markdown_beside(preset, rows), markdown(rows, labels)])
        results.path.with_suffix(".md").write_text(page, encoding="utf-8")
        print(f"{results.path}: {len(rows) - 1} of {len(labels)} rows")


if __name__ == "__main__":
    main()
