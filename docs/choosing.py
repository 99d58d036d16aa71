"""Writes docs/choosing.md, and the measurements that `lowbit recommend` stands on, from benchmarks/results.

`make docs` runs it. A test runs it again and compares, so that neither can say anything that was not measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lowbit.comparison import ORIGINAL
from lowbit.recipes import KV_FAMILY, METHODS, Recipe, as_recipe, from_plain, recipe
from lowbit.reporting.choices import ENGINES
from lowbit.reporting.comparisons import front
from lowbit.reporting.measured import FILE, Measured, MeasuredRow
from lowbit.reporting.sources import read_sources

DOCS = Path(__file__).parent
PAGE = DOCS / "choosing.md"
BENCHMARKS = DOCS.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
TABLES = ("weight_only", "weight_activation")
CACHES = ("kv-cache", "kv-cache-quality", "kv-cache-amx")
UNSAID = ({}, {"amp": True})
"""Options that a grid may leave out of what it was once measured with."""


def data() -> dict[str, Any]:
    """What the package keeps of the results."""
    measured = {table: read_sources([RESULTS / f"{table}.jsonl"]).records for table in TABLES}
    protocols = {(r["model"]["name"], r["protocol"]["sha256"]) for records in measured.values() for r in records}
    assert len(protocols) == 1, "rows of several models or texts cannot be compared"
    first = measured[TABLES[0]][0]
    protocol = first["protocol"]
    return {
        "model": first["model"]["name"],
        "text": f"{protocol['text']}, {protocol['windows']} windows of {protocol['seq_len']} tokens",
        "rows": [row for table, records in measured.items() for row in _rows(table, records)],
        "caches": _caches(),
        "beside": _beside(),
        "beside_table": "benchmarks/results/llama-7b.json",
    }


def _rows(table: str, records: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    grid = {entry["label"]: entry for entry in yaml.safe_load((BENCHMARKS / f"{table}.yaml").read_text())}
    original = next(record["perplexity"] for record in records if record["label"] == ORIGINAL)
    times = _times()
    for record in records:
        entry = grid.get(record["label"])
        if entry is None or record.get("problems") or not record.get("perplexity"):
            continue
        asked = _asked(entry, from_plain(record["recipe"]))
        if asked is None:
            continue
        yield {
            "label": record["label"],
            "table": f"benchmarks/results/{table}.jsonl",
            "bits": record["bits_per_weight"],
            "perplexity": record["perplexity"],
            "original": original,
            "loss": math.log(record["perplexity"] / original),
            "kl": record.get("kl"),
            "time": times.get(asked.get("method", "")),
            **asked,
        }


def _asked(entry: dict[str, Any], measured: Recipe) -> dict[str, Any] | None:
    """How a row is asked for today; None if that is no single command, or another recipe than was measured."""
    options = {key: value for key, value in entry.items() if key not in ("label", "method", "recipe")}
    if "method" in entry:
        for more in UNSAID:
            if more.keys() <= _options(entry["method"]) and recipe(entry["method"], **options, **more) == measured:
                return {"method": entry["method"], "options": {**options, **more}}
    elif not entry["recipe"].endswith(".yaml") and as_recipe(entry["recipe"]) == measured:
        return {"recipe_name": entry["recipe"]}
    return None


def _options(method: str) -> set[str]:
    return {option for part in method.split("+") for option in METHODS[part].options}


def _times() -> dict[str, float]:
    """Seconds of each method on the widest layer that was timed, over GPTQ's."""
    rows = [json.loads(line) for line in (RESULTS / "speed.jsonl").read_text().splitlines()]
    seconds = {row["method"]: row["seconds"][-1] for row in rows}
    return {method: each / seconds["gptq"] for method, each in seconds.items()}


def _caches() -> list[dict[str, Any]]:
    """Caches that ``--kv NAME:BITS`` asks for; measured twice, the first counts."""
    found: dict[str, dict[str, Any]] = {}
    for table in CACHES:
        for row in json.loads((RESULTS / f"{table}.json").read_text())["quality"]:
            name = re.fullmatch(r"([\w-]+)(?: (\d+))?", row["name"])
            if name is None or name[1] not in METHODS or METHODS[name[1]].family != KV_FAMILY:
                continue
            found.setdefault(
                row["name"],
                {
                    "name": name[1] if name[2] is None else f"{name[1]}:{name[2]}",
                    "table": f"benchmarks/results/{table}.json",
                    "bits": row["bits"],
                    "loss": row["log_ratio"],
                    "kl": row["kl"],
                },
            )
    return list(found.values())


def _beside() -> list[int]:
    models = json.loads((RESULTS / "llama-7b.json").read_text())["models"]
    beside = [each["running_memory"] - each["weight_memory"] for each in models]
    return [min(beside), max(beside)]


# The page


def page(known: Measured) -> str:
    """The text of docs/choosing.md."""
    weights = [row for row in known.rows if not row.quantizes_inputs]
    inputs = [row for row in known.rows if row.quantizes_inputs]
    return "\n".join(
        [
            "# Which method for what",
            "",
            f"Written by `make docs` from [benchmarks/results](../benchmarks/results): {known.model}, perplexity on {known.text}; the "
            f"original has {known.rows[0].original:.2f}. A small model loses more than a large one: take the order of the rows, not "
            "their losses, and measure yours:",
            "",
            "```sh",
            "lowbit recommend MODEL --memory 4GB --engine lowbit   # these tables, and the sizes of your model",
            "lowbit compare MODEL --method rtn --method gptq --method awq --bits 4,3 --group-size 64 -o results.jsonl",
            "```",
            "",
            "## By bits",
            "",
            "The best of each size: no other row that is as small or smaller loses less. Bits are those that are stored for the "
            "quantized linears. Time is that of the method over GPTQ's on one layer, where it was measured. Recipes that train take "
            "hours and the memory of the whole model.",
            "",
            "### Weights",
            "",
            *_table([weights[i] for i in front([(row.bits, row.loss) for row in weights])]),
            "",
            "### Weights and inputs",
            "",
            "Products of integers.",
            "",
            *_table([inputs[i] for i in front([(row.bits, row.loss) for row in inputs])]),
            "",
            "## By patience",
            "",
            "The least perplexity with at most so many stored bits, among methods that take at most so many times GPTQ's time.",
            "",
            *_by_patience(weights),
            "",
            "Without calibration text:",
            "",
            *_table(sorted((row for row in weights if not row.recipe.needs_calibration), key=lambda row: row.loss)[:5]),
            "",
            "## By engine",
            "",
            *_by_engine(),
            "",
            "## Caches of keys and values",
            "",
            "`--kv NAME:BITS`, in lowbit. Losses are those of the cache alone, on the first 2 windows.",
            "",
            "| cache | bits a number | ln ratio | KL, nats |",
            "|---|---:|---:|---:|",
            *(
                f"| `{each.name}` | {each.bits:.2f} | {each.loss:+.4f} | {each.kl:.5f} |"
                for each in sorted(known.caches, key=lambda each: each.kl)
            ),
            "",
            *_ADVICE.splitlines(),
            "",
        ]
    )


_ADVICE = """## Not measured, and good to know

**Groups.** A smaller group has more scales: better, and larger. A scale of 16 bits and a zero point cost about 0.3 bits a weight in
groups of 64. `--group-size channel` (or -1) has one scale for each output channel.

**Mixes.** [Composing](composing.md) describes recipes that lose less than any method alone, and `lowbit allocate`, which gives every
layer a width of its own: rows `composed` in [the table](../benchmarks/results/weight_only.md).

**Text.** Calibrate on text that is like what the model will read. `python-docs` needs no network. A chat model is best
calibrated on conversations: a file of rows with a column `messages`. Where there is no text, the model can [write
some](data.md)."""


def _table(rows: Iterable[MeasuredRow]) -> list[str]:
    lines = ["| row | bits | perplexity | ln ratio | time | asked for by |", "|---|---:|---:|---:|---:|---|"]
    for row in rows:
        time = "" if row.time is None else f"{row.time:.2g}"
        words = " ".join(row.words())
        text = "" if row.recipe.needs_calibration else ", no text"
        trains = ", trains" if row.trains else ""
        lines.append(
            f"| {row.label} | {row.bits:.2f} | {row.perplexity:.4g} | {row.loss:+.4f} | {time} | `{words}`{text}{trains} |"
        )
    return lines


def _by_patience(rows: list[MeasuredRow]) -> list[str]:
    limits = (0.1, 1.0, 3.0, 30.0)
    lines = [f"| bits | {' | '.join(f'{limit:g} x' for limit in limits)} |", "|---|" + "---|" * len(limits)]
    for bits in (4.5, 3.5, 2.5):
        cells = []
        for limit in limits:
            able = [row for row in rows if row.bits <= bits and row.time is not None and row.time <= limit]
            best = min(able, key=lambda row: row.loss, default=None)
            cells.append("" if best is None else f"{best.label}: {best.perplexity:.4g}")
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    return lines


def _by_engine() -> list[str]:
    return [
        "| engine | file format | what it can hold |",
        "|---|---|---|",
        f"| lowbit, transformers | {ENGINES['lowbit'][0]} | every row above |",
        f"| vLLM | `--format {ENGINES['vllm'][0]}` | integers of weights per group or channel; no inputs, no rotations, no outliers |",
        f"| llama.cpp | {', '.join(f'`--format {each}`' for each in ENGINES['llama.cpp'])} | grids of its own, which the method "
        "rounds to; their losses are not in these tables |",
        "",
        "What was run in which engine: [interoperability](interoperability.md).",
    ]


def main() -> None:
    found = data()
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(Measured.from_dict(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
