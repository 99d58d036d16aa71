"""What training gives: perplexity on two texts before and after it, tokens a second, and the curves.

    python benchmarks/training.py --calibration wikitext2.valid.raw --text wikitext2.test.raw [--only PART]... [--threads N]

Rows are in benchmarks/training.yaml. Each is quantized by `lowbit quantize` and measured by `lowbit evaluate` on the text and on
Python's own documentation, both against the original. Results go to benchmarks/results/training.{jsonl,md,svg}; rows that
are there are not measured again. A killed row continues where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console

from lowbit.evaluation.machine import machine
from lowbit.tables import Table, markdown

MODEL = "smollm2-135m"
HERE = Path(__file__).parent
RESULTS = HERE / "results"
COLUMNS = ("row", "bits", "perplexity", "KL, nats", "perplexity, docs", "KL, docs", "tokens", "tokens/s", "processor s")
EVALUATION = ("--seq-len", "1024", "--against", MODEL, "--json", "--quiet")


def command(*arguments: str, log: Path) -> tuple[str, float]:
    """Output of a command of lowbit and its seconds of processor time, those of its children included."""
    with log.open("w") as errors:
        run = subprocess.Popen(
            [sys.executable, "-m", "lowbit", *arguments], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        process, used = psutil.Process(run.pid), 0.0
        assert run.stdout is not None
        while run.poll() is None:
            try:
                times = process.cpu_times()
                used = times.user + times.system
            except psutil.Error:
                break
            time.sleep(0.2)
        output = run.stdout.read()
    if run.wait() != 0:
        raise SystemExit(f"lowbit {' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")
    return output, used


def measure(row: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """One line of results."""
    place = arguments.scratch / row["label"].replace(" ", "-").replace("/", "-").replace(",", "")
    recipe, log = (place.with_name(f"{place.name}.{kind}") for kind in ("yaml", "log"))
    recipe.write_text(yaml.safe_dump(row["recipe"]))
    threads = ("--threads", str(arguments.threads))
    seconds, processor = 0.0, 0.0
    if not place.exists():  # else it was made before the last run stopped
        began = time.perf_counter()
        calibration = row.get("calibration", arguments.calibration)
        _, processor = command(
            *("quantize", MODEL, "--recipe", str(recipe), "--calibration", str(calibration), "-o", str(place)),
            *("--allow-broken", "--max-kl", "1e9", "--quiet", *threads),
            log=log,
        )
        seconds = time.perf_counter() - began
    report = json.loads((place / "lowbit-report.json").read_text())
    line = {
        "label": row["label"],
        "recipe": row["recipe"],
        "calibration": Path(row.get("calibration", arguments.calibration)).name,
        "bits_per_weight": report["bits_per_weight"],
        "notes": report.get("notes"),
        "seconds": round(seconds),
        "processor_seconds": round(processor),
        "machine": machine()["cpu"],
    }
    for name, text, windows in (("test", arguments.text, 20), ("docs", "python-docs", arguments.docs)):
        output, _ = command(
            *("evaluate", str(place), "--text", str(text), "--windows", str(windows), *EVALUATION, *threads),
            log=log,
        )
        found = json.loads(output)
        line |= {f"{name}_perplexity": found["perplexity"], f"{name}_kl": found["kl"], f"{name}_windows": windows}
    line["curve"] = [
        json.loads(text) for file in sorted(place.glob("training-*.jsonl")) for text in file.read_text().splitlines()
    ]
    shutil.rmtree(place)
    return line


def cells(line: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    last = line["curve"][-1] if line["curve"] else None
    tokens = "" if last is None else f"{last['tokens']:,}"
    rate = "" if last is None or not last["seconds"] else f"{last['tokens'] / last['seconds']:.0f}"
    return (
        *(line["label"], f"{line['bits_per_weight']:.3f}", f"{line['test_perplexity']:.5g}", f"{line['test_kl']:.4f}"),
        *(f"{line['docs_perplexity']:.5g}", f"{line['docs_kl']:.4f}", tokens, rate),
        str(line["processor_seconds"] or ""),
    )


def write(lines: list[dict[str, Any]]) -> None:
    """The page and the plot."""
    page = [
        "# What training gives: SmolLM2-135M",
        "",
        f"Written by `python benchmarks/training.py`. Perplexity and KL on {lines[0]['test_windows']} windows of 1,024 tokens of "
        f"WikiText-2's test text and {lines[0]['docs_windows']} of Python's documentation (docs); full precision has 23.229 on the "
        "first. Rows train on the text beside the calibration windows. Tokens a second are of the training alone, in wall time; "
        "processor seconds are of the whole row. Recipes and curves are in the JSON lines beside this file.",
        "",
        markdown(Table("", COLUMNS, tuple(map(cells, lines)))),
        "Curves: ![loss and held-out KL against tokens](training.svg)",
        "",
        f"Machines: {'; '.join(sorted({x['machine'] for x in lines}))}.",
        "",
    ]
    (RESULTS / "training.md").write_text("\n".join(page))
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("loss", "held_out_kl"), ("loss of a step", "held-out KL, nats a token"), strict=True
    ):
        for x in lines:
            points = [(row["tokens"], row[key]) for row in x["curve"] if row[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=x["label"], marker="." if key == "held_out_kl" else "")
        axes.set_xlabel("tokens")
        axes.set_title(title)
        axes.set_yscale("log")
    figure.axes[1].legend(fontsize=7)
    with rc_context({"svg.hashsalt": "lowbit"}):  # the same curves give the same bytes
        figure.savefig(RESULTS / "training.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="what is calibrated and trained on")
    parser.add_argument("--text", type=Path, required=True, help="what is measured")
    parser.add_argument("--docs", type=int, default=10, help="windows of Python's documentation (default: 10)")
    parser.add_argument("--only", action="append", default=[], help="part of a label; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "build" / "training")
    parser.add_argument("--table", action="store_true", help="write the table and the plot anew; nothing is measured")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    console, file = Console(), RESULTS / "training.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for row in yaml.safe_load((HERE / "training.yaml").read_text()):
        if "base" in row:
            recipe = yaml.safe_load((HERE / row["base"]).read_text())
            row["recipe"] = recipe | {"stages": [recipe["stages"][0], *row["train"]]}
        known = any(x["label"] == row["label"] and x["recipe"] == row["recipe"] for x in lines)
        if known or arguments.table or (arguments.only and not any(part in row["label"] for part in arguments.only)):
            continue
        line = measure(row, arguments)
        lines = [*(x for x in lines if x["label"] != row["label"]), line]
        file.write_text("".join(json.dumps(x) + "\n" for x in lines))
        write(lines)
        console.print(f"{row['label']}: perplexity {line['test_perplexity']:.3f}, KL {line['test_kl']:.4f}")
    if arguments.table:
        write(lines)


if __name__ == "__main__":
    main()
