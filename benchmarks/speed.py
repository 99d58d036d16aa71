"""Seconds that each method takes on one linear, and how they grow with its width.

    python benchmarks/speed.py [--widths 512,1024,2048,4096] [--only METHOD]...

Random layers [d, d] (heavy-tailed columns of the input, as real ones have) and 2048 tokens, in windows of 256. All figures
of a row are of one process and one run, so their ratios mean something and their seconds only roughly. `x gptq` is the
time over gptq's at the same width. Results go to benchmarks/results/speed.{jsonl,md}; seconds for a whole model are in the
tables of `lowbit compare`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Screen
from torch import nn

import lowbit
from lowbit.tables import Table, markdown

RESULTS = Path(__file__).parent / "results"
TOKENS = 2048
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3, "group_size": 64},
    "gptq": {"bits": 3, "group_size": 64},
    "quip": {"bits": 3},
    "awq": {"bits": 3, "group_size": 64},
    "owq": {"bits": 3},
    "spqr": {"bits": 3},
    "squeezellm": {"bits": 3},
    "lut-gemm": {"bits": 3, "group_size": 128},
    "nf4": {"double_quant": True},
    "hqq": {"bits": 3, "group_size": 64},
    "autoround": {"bits": 3, "group_size": 64},
    "omniquant": {"bits": 3, "group_size": 64, "epochs": 4, "batch": 4},
}
# Why a method may take more than ten times as long as gptq.
REASONS = {
    "autoround": "200 gradient steps, each a product of 8 windows forward and backward, as published",
    "omniquant": "gradient steps over all windows, as published",
    "awq": "80 grids are tried, each a product of all tokens",
}


def seconds(name: str, width: int) -> float:
    """Of one `quantize_linear`, statistics of its inputs included."""
    generator = torch.Generator().manual_seed(width)
    linear = nn.Linear(width, width, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(width, width, generator=generator) * width**-0.5)
    sizes = torch.randn(width, generator=generator).exp()
    x = torch.randn(TOKENS // 256, 256, width, generator=generator) * sizes
    recipe = lowbit.recipe(name, **METHODS[name])
    needs = {"fisher": torch.rand(width, width, generator=generator)} if recipe.needs_fisher else {}
    start = time.perf_counter()
    lowbit.quantize_linear(linear, x if recipe.needs_calibration and not needs else None, recipe, **needs)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="512,1024,2048,4096", help="in and out features, comma-separated")
    parser.add_argument(
        "--only", action="append", default=[], help="a method; may be repeated (gptq is always measured)"
    )
    arguments = parser.parse_args()
    widths = [int(part) for part in arguments.widths.split(",")]
    console = Console()
    chosen = [name for name in METHODS if not arguments.only or name in (*arguments.only, "gptq")]
    for name in chosen:
        seconds(name, 64)  # what is compiled or imported at the first use
    taken: dict[str, list[float]] = {name: [] for name in chosen}
    RESULTS.mkdir(exist_ok=True)
    for done, width in enumerate(widths, 1):
        for name in chosen:
            taken[name].append(seconds(name, width))
            console.print(f"{name} {width}: {taken[name][-1]:.2f} s")
        threads = torch.get_num_threads()
        rows = [
            {"method": name, "options": METHODS[name], "widths": widths[:done], "seconds": times, "threads": threads}
            for name, times in taken.items()
        ]  # after every width: whoever stops the run keeps those before
        (RESULTS / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = write(rows, widths[:done], taken["gptq"])
    console.print(table)


def write(rows: list[dict], widths: list[int], gptq: list[float]) -> Screen:
    """The table, as Markdown and for the screen."""
    heads = ["method", *(f"d = {width}, s" for width in widths), "x gptq, widest", "growth, last doubling"]
    lines = [
        "# Seconds for one random linear [d, d], 2048 tokens",
        "",
        f"Written by `python benchmarks/speed.py`; {torch.get_num_threads()} thread(s); compare ratios, not seconds.",
        "",
    ]
    screen, cells = Screen(*heads), []
    for row in rows:
        times = row["seconds"]
        growth = f"{times[-1] / times[-2]:.1f}" if len(times) > 1 else ""
        cells.append((row["method"], *(f"{t:.2f}" for t in times), f"{times[-1] / gptq[-1]:.1f}", growth))
        screen.add_row(*cells[-1])
    slow = [row["method"] for row in rows if row["seconds"][-1] > 10 * gptq[-1]]
    lines += [
        markdown(Table("", tuple(heads), tuple(cells))),
        *(f"* {name} takes over ten times as long as gptq: {REASONS.get(name, 'NO REASON')}." for name in slow),
        "",
    ]
    (RESULTS / "speed.md").write_text("\n".join(lines))
    return screen


if __name__ == "__main__":
    main()
