"""Sections on rows of ``lowbit compare``: size against quality, the table, and how to repeat each row."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from lowbit.comparison import ORIGINAL
from lowbit.comparison.table import as_table
from lowbit.inspection.plots import COLOURS
from lowbit.reporting.figures import FAINT, Marks, Picture, draw, label_points, log_axis
from lowbit.reporting.sections import Entry, Section
from lowbit.tables import Table

Record = Mapping[str, Any]


def comparison_sections(records: Sequence[Record]) -> list[Section]:
    """A section for each model, protocol and text."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        protocol = record["protocol"]
        groups.setdefault((record["model"]["sha256"], protocol["name"], protocol["sha256"]), []).append(record)
    return [_section(number, group) for number, group in enumerate(groups.values(), start=1)]


def _section(number: int, records: Sequence[Record]) -> Section:
    model, protocol = records[0]["model"], records[0]["protocol"]
    ordered = sorted(records, key=lambda record: record["label"] != ORIGINAL)
    links = tuple(f"row-{number}-{i}" for i in range(len(ordered)))
    table = replace(as_table(ordered, f"{model['name']}: all rows").filled(), links=links)
    table = replace(table, columns=("row", *table.columns[1:]))
    windows = f"{protocol['windows']} windows of {protocol['seq_len']} tokens, " if "windows" in protocol else ""
    return Section(
        f"{model['name']} on {protocol['text']}",
        (
            f"Protocol {protocol['name']}: {windows}tokens {protocol['sha256'][:12]}; model {model['sha256'][:12]}. "
            "Bits count everything that is stored. Intervals are of 95 %.",
        ),
        pictures=tuple(filter(None, [_pareto(records)])),
        tables=(table,),
        entries=tuple(_entry(record, link) for record, link in zip(ordered, links, strict=True)),
    )


# Size against quality


def stored(records: Sequence[Record]) -> tuple[str, str, float]:
    """The key of a record's size, what it is called, and what it is divided by: bits of the whole model where all have them."""
    if all(record.get("model_bits_per_weight") for record in records):
        return "model_bits_per_weight", "bits a weight of the whole model", 1.0
    return "bytes", "weight files, MB", 1e6


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points ``(size, loss)`` that no other is at most as large as and better than, by growing size."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    best, kept = float("inf"), []
    for i in order:
        if points[i][1] < best:
            best = points[i][1]
            kept.append(i)
    return kept


def _pareto(records: Sequence[Record]) -> Picture | None:
    measured = [record for record in records if record.get("perplexity") and record["label"] != ORIGINAL]
    shown = [record for record in measured if not record.get("problems")]
    key, size, unit = stored(shown)
    shown = [record for record in shown if record.get(key)]
    if not shown:
        return None
    points = [(record[key] / unit, record["perplexity"]) for record in shown]
    best = front(points)
    original = next((each for each in records if each["label"] == ORIGINAL and each.get("perplexity")), None)

    def paint(axes: Any, marks: Marks) -> None:
        axes.plot(
            [points[i][0] for i in best],
            [points[i][1] for i in best],
            color=COLOURS[0],
            drawstyle="steps-post",
            zorder=1,
        )
        for i, (record, (x, y)) in enumerate(zip(shown, points, strict=True)):
            of_inputs = _quantizes_inputs(record)
            (drawn,) = axes.plot(
                x, y, "s" if of_inputs else "o", color=COLOURS[0] if i in best else FAINT, markersize=6, zorder=2
            )
            marks.add(drawn, record["label"], f"{record['label']}: perplexity {y:.5g}, {x:.4g} {size}")
        if original is not None:
            axes.axhline(original["perplexity"], color=COLOURS[1], linestyle="--", linewidth=1)
            axes.annotate(
                f"original, {original['perplexity']:.4g}",
                (1, original["perplexity"]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
            )
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        axes.margins(x=0.12, y=0.1)
        axes.set(xlabel=size, ylabel="perplexity")
        axes.grid(alpha=0.4)
        label_points(axes, [(*points[i], shown[i]["label"]) for i in best], points)

    left_out = len(measured) - len(shown)
    words = (
        "Circles quantize weights, squares inputs of layers too. Those on the line are the best of their size or less."
    )
    words += f" {left_out} broken rows are not shown; the table has them." if left_out else ""
    named = ", ".join(f"{shown[i]['label']} ({points[i][0]:.4g}, {points[i][1]:.4g})" for i in best)
    table = Table(
        "Size and quality",
        ("row", size, "perplexity", "best of its size"),
        tuple(
            (record["label"], f"{x:.6g}", f"{y:.6g}", "yes" if i in best else "")
            for i, (record, (x, y)) in enumerate(zip(shown, points, strict=True))
        ),
    )
    return draw(
        "Size against quality", f"{words} The best, with size and perplexity: {named}.", table, paint, (8.5, 5.6)
    )


def _quantizes_inputs(record: Record) -> bool:
    rules = ((record["recipe"] or {}).get("scheme") or {}).get("rules") or ()
    return any(rule.get("activation") for rule in rules)


# How to repeat a row


def _entry(record: Record, link: str) -> Entry:
    facts = [("model", f"{record['model']['name']}, fingerprint {record['model']['sha256']}")]
    if used := record["calibration"]:
        facts.append(
            ("calibration", f"{used['text']}, {used['windows']} windows of {used['tokens']} tokens, {used['sha256']}")
        )
        if trained := used.get("training"):
            facts.append(
                ("trained on", f"{trained['windows']} windows of {trained['tokens']} tokens, {trained['sha256']}")
            )
    facts.append(("evaluated on", f"{record['protocol']['text']}, {record['protocol']['sha256']}"))
    for name in ("machine", "versions", "converted"):
        if record.get(name):
            facts.append((name, ", ".join(f"{key} {value}" for key, value in record[name].items())))
    facts += [("warning", text) for text in record.get("warnings") or ()]
    facts += [("failed", record["error"])] if "error" in record else []
    facts.append(("file", record["file"]))
    return Entry(record["label"], link, tuple(facts), recipe_text(record["recipe"]), tuple(_commands(record)))


def recipe_text(recipe: Any) -> str:
    """A recipe as the YAML of a file for ``--recipe``; empty for the original."""
    return "" if recipe is None else yaml.safe_dump(recipe, sort_keys=False, width=120)


def quantize_command(model: str, used: Record | None, out: str = "DIR") -> str:
    """``lowbit quantize`` by a recipe in ``recipe.yaml``. ``used``: what a record says of its calibration."""
    words = ["lowbit", "quantize", model, "--recipe", "recipe.yaml"]
    if used:
        words += ["--calibration", used["text"], "--samples", str(used["windows"]), "--seq-len", str(used["tokens"])]
        words += ["--bos", used["bos"]] if used.get("bos", "auto") != "auto" else []
    return shlex.join([*words, "-o", out])


def _commands(record: Record) -> list[str]:
    model, protocol = record["model"]["name"], record["protocol"]
    words = ["lowbit", "evaluate", "DIR" if record["recipe"] else model, "--text", protocol["text"]]
    words += ["--protocol", protocol["name"]]
    if "windows" in protocol:
        words += ["--windows", str(protocol["windows"]), "--seq-len", str(protocol["seq_len"])]
    if record["recipe"] is None:
        return [shlex.join(words)]
    return [quantize_command(model, record["calibration"]), shlex.join([*words, "--against", model])]
