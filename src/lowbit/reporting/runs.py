"""Sections on one checkpoint, on a training, on packed caches and on answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.inspection.plots import COLOURS
from lowbit.reporting.comparisons import quantize_command, recipe_text
from lowbit.reporting.figures import Marks, Picture, draw, heat_map, label_points, lines, log_axis
from lowbit.reporting.sections import Entry, Section
from lowbit.reporting.sources import Json, Sample
from lowbit.tables import Table, of_mappings, text_of

_FIGURES = {
    "asked_bits": "bits of a code, as asked",
    "bits_per_weight": "bits a weight of the quantized linears, everything stored",
    "model_bits_per_weight": "bits a weight of the whole model",
    "cache_bits": "bits a number of the cache, everything stored",
    "bytes": "bytes of the weight files",
    "source_bytes": "bytes of the original's weights",
    "coverage": "share of the blocks' weights that is quantized",
    "kl": "KL divergence from the original, nats a token",
    "top1_agreement": "top-1 agreement with the original",
    "measured_on": "measured on",
    "outside_cost": "cost of the packed embedding and head, nats a token",
}


def run_section(number: int, name: str, report: Json) -> Section:
    """The report of a checkpoint: what was measured, and the error of every layer."""
    header = report.get("header", {})
    figures = [(words, text_of(report[key])) for key, words in _FIGURES.items() if report.get(key) is not None]
    link = f"run-{number}"
    facts = [(key, text_of(value)) for key, value in header.items() if key != "recipe"]
    facts += [("calibrated on", report.get("calibration") or "nothing")]
    facts += [("text that a model wrote", each["summary"]) for each in [report.get("generated_text")] if each]
    facts += [("broken", text) for text in report.get("problems", ())]
    facts += [("warning", text) for text in report.get("warnings", ())]
    command = quantize_command("MODEL", _calibration(report.get("calibration") or ""))
    words = ("Relative squared error of each layer's output on calibration tokens; of experts, the worst.",)
    layers = Table(
        f"{name}: layers",
        ("layer", "role", "bits a weight", "output error", "notes"),
        tuple(
            (x["name"], x["role"], f"{x['bits_per_weight']:.3f}", text_of(x["error"]), "; ".join(x.get("notes", ())))
            for x in report["layers"]
        ),
    )
    return Section(
        f"Checkpoint {name.removesuffix('/lowbit-report.json')}",
        words if report["layers"] else (),
        pictures=tuple(filter(None, [error_map(name, report["layers"]), _block_errors(name, report["block_errors"])])),
        tables=(
            Table(f"{name}: what was measured", ("figure", "value"), tuple(figures), (link,) * len(figures)),
            *((layers,) if layers.rows else ()),
        ),
        entries=(Entry(name, link, tuple(facts), recipe_text(report["recipe"]), (command,)),),
    )


def _calibration(text: str) -> dict[str, Any] | None:
    """What a run says of its calibration text, ``NAME, [windows, tokens]``, as a record has it; None: it read none."""
    found = re.fullmatch(r"(.*), \[(\d+), (\d+)\]", text)
    return None if found is None else {"text": found[1], "windows": int(found[2]), "tokens": int(found[3])}


def error_map(name: str, layers: Sequence[Mapping[str, Any]]) -> Picture | None:
    """A heat map of errors by role and block; None where no layer in a numbered block has one."""
    worst: dict[tuple[str, int], tuple[float, str]] = {}
    for layer in layers:
        block = re.search(r"\.(\d+)\.", layer["name"])
        error = layer["error"]
        if block is None or error is None or not math.isfinite(error):
            continue
        place = (layer["role"], int(block[1]))
        if place not in worst or error > worst[place][0]:
            worst[place] = (error, f"{layer['name']}: {error:.4g}")
    if not worst:
        return None
    rows = tuple((role, str(block), f"{error:.6g}") for (role, block), (error, _) in worst.items())
    hardest = max(worst.values())
    return heat_map(
        "Error by layer and block",
        f"Relative squared output error of {len(worst)} cells of role and block. The largest is {hardest[1]}.",
        Table(f"{name}: error by layer and block", ("role", "block", "output error"), rows),
        worst,
        "relative squared output error",
    )


def _block_errors(name: str, errors: Sequence[float | None]) -> Picture | None:
    known = [(float(i), error) for i, error in enumerate(errors) if error is not None and math.isfinite(error)]
    if len(known) < 2:
        return None
    table = Table(
        f"{name}: error behind each block", ("block", "error"), tuple((f"{i:g}", f"{e:.6g}") for i, e in known)
    )
    xs, ys = [i for i, _ in known], [error for _, error in known]
    summary = f"The relative squared difference of the hidden states grows from {ys[0]:.3g} to {ys[-1]:.3g}."
    return lines(
        "Error behind each block", summary, table, {"hidden states": (xs, ys)}, "block", "relative squared error"
    )


def curve_section(name: str, rows: Sequence[Json]) -> Section:
    """The course of a training."""
    series, last = {}, []
    for key, words in (("loss", "loss"), ("held_out_kl", "held-out KL, nats")):
        known = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
        if known:
            series[words] = ([float(x) for x, _ in known], [float(y) for _, y in known])
            last.append(f"{words} from {known[0][1]:.4g} to {known[-1][1]:.4g}")
    summary = f"{'; '.join(last)}, over {rows[-1]['tokens']} tokens."
    table = of_mappings(f"{name}: steps", rows)
    return Section(f"Training {name}", (), (lines("Loss", summary, table, series, "tokens", "nats a token"),))


def cache_section(name: str, measured: Json) -> Section:
    """Packed caches of keys and values: bits against divergence, and speed."""
    pictures, tables = [], []
    if quality := [row for row in measured["quality"] if row.get("kl", 0) > 0]:
        pictures.append(_cache_quality(name, quality))
    if speed := measured["speed"]:
        by_name: dict[str, tuple[list[float], list[float]]] = {}
        for row in speed:
            xs, ys = by_name.setdefault(row["name"], ([], []))
            xs.append(row["context"])
            ys.append(row["milliseconds"])
        table = of_mappings(f"{name}: speed", speed)
        summary = "Milliseconds for a token at each length of the context: " + "; ".join(
            f"{each} {ys[-1]:.3g} at {xs[-1]:g}" for each, (xs, ys) in by_name.items()
        )
        pictures.append(lines("Time for a token", summary, table, by_name, "tokens in the cache", "milliseconds"))
    rest = {key: text_of(value) for key, value in measured.items() if key not in ("quality", "speed")}
    tables = [of_mappings(f"{name}: {key}", measured[key]) for key in ("quality", "speed") if measured[key]]
    tables += [Table(f"{name}: the rest", ("", "value"), tuple(rest.items()))] if rest else []
    return Section(f"Caches of keys and values: {name}", (), tuple(pictures), tuple(tables))


def _cache_quality(name: str, rows: Sequence[Json]) -> Picture:
    def paint(axes: Any, marks: Marks) -> None:
        for row in rows:
            (drawn,) = axes.plot(row["bits"], row["kl"], "o", color=COLOURS[0], markersize=6)
            marks.add(drawn, row["name"], f"{row['name']}: {row['kl']:.4g} nats at {row['bits']:.4g} bits")
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        axes.margins(x=0.15)
        axes.set(xlabel="bits a number, scales and zero points counted", ylabel="KL divergence, nats a token")
        axes.grid(alpha=0.4)
        points = [(row["bits"], row["kl"]) for row in rows]
        label_points(axes, [(*point, row["name"]) for point, row in zip(points, rows, strict=True)], points)

    best = min(rows, key=lambda row: row["kl"])
    summary = f"{len(rows)} caches. The smallest divergence: {best['name']}, {best['kl']:.3g} nats at {best['bits']:.3g} bits."
    table = Table(
        f"{name}: bits and divergence",
        ("cache", "bits", "KL, nats"),
        tuple((row["name"], f"{row['bits']:.6g}", f"{row['kl']:.6g}") for row in rows),
    )
    return draw("Bits against divergence", summary, table, paint)


def sample_section(samples: Sequence[Sample]) -> Section:
    """Answers to the same prompts, side by side."""
    names = dict.fromkeys(name for sample in samples for name in sample.answers)
    rows = tuple((sample.prompt, *(sample.answers.get(name, "") for name in names)) for sample in samples)
    table = Table("Answers", ("prompt", *names), rows)
    return Section("Answers side by side", (), tables=(table,))
