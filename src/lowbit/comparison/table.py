"""Records as a table for people: the cells of a row, the table, and a Markdown page with a section for each model and protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowbit.comparison.over import accuracy_change, mean_accuracy, over_seeds
from lowbit.comparison.results import Record
from lowbit.comparison.rows import ORIGINAL
from lowbit.tables import Table
from lowbit.tables import markdown as markdown_table

COLUMNS = (
    "",
    "perplexity",
    "95 % interval",
    "ln ratio",
    "KL, nats",
    "top-1",
    "asked",
    "bits, linears",
    "bits, model",
    "bits, cache",
    "weight files",
    "tasks",
    "tokens/s",
    "quantize",
    "peak memory",
    "remarks",
)


def cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    """One text for each of ``COLUMNS``, empty if it was not measured."""
    low_high = record.get("perplexity_interval")
    more, around = record.get("log_perplexity_difference"), record.get("log_perplexity_difference_interval")
    return (
        record["label"],
        _text(record.get("perplexity"), ".5g"),
        "" if low_high is None else f"{low_high[0]:.4g} to {low_high[1]:.4g}",
        _text(more, ".4f") + ("" if around is None else f" ± {(around[1] - around[0]) / 2:.4f}"),
        _text(record.get("kl"), ".4f"),
        _text(record.get("top1_agreement"), ".1%"),
        _text(record.get("asked_bits"), ".4g"),
        _text(record.get("bits_per_weight"), ".3f"),
        _text(record.get("model_bits_per_weight"), ".3f"),
        _text(record.get("cache_bits"), ".3f"),
        _text(record.get("bytes"), ".1f", 1e6, " MB"),
        _tasks(record),
        _text((record.get("speed") or {}).get("decode_tokens_per_s"), ".1f"),
        _text(record.get("quantize_seconds"), ".0f", 1, " s"),
        _text(record.get("peak_rss_bytes"), ".2f", 1e9, " GB"),
        _remark(record),
    )


def as_table(records: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """All columns, a row for each record."""
    return Table(title, COLUMNS, tuple(map(cells, records)))


def markdown(records: Sequence[Record], labels: Sequence[str]) -> str:
    """The page: the original first, then rows in the order of ``labels``, then other rows."""
    place = {label: i for i, label in enumerate((ORIGINAL, *labels))}
    ordered = sorted(records, key=lambda record: place.get(record["label"], len(place)))
    sections: dict[tuple, list[Record]] = {}
    for record in ordered:
        key = (record["model"]["sha256"], record["protocol"]["name"], record["protocol"]["sha256"])
        sections.setdefault(key, []).append(record)
    return "\n".join(_section(section) for section in sections.values())


def _section(records: list[Record]) -> str:
    model, protocol = records[0]["model"]["name"], records[0]["protocol"]
    texts = _unlike(_calibration(record) for record in records if record.get("calibration"))
    machines = _unlike(_machine(record) for record in records if record.get("machine"))
    lines = [
        f"# {model}: {protocol['text']}, {protocol['windows']} windows of {protocol['seq_len']} tokens "
        f"(protocol {protocol['name']})",
        "",
        "Written by `lowbit compare`; the recipes and everything else are in the JSON lines next to this file.",
        "The ln ratio is the logarithm of the perplexity over the original's: a mean of differences window by window, with its 95 % "
        "interval. Bits are those of a code, as asked, and stored bits a weight, of the quantized linears and of the whole model.",
        *(f"Calibrated on {text}." for text in texts),
        *(f"Seconds and memory on {machine}." for machine in machines),
        "",
    ]
    seeds = over_seeds(records)
    lines += ["Over seeds, the ln ratio: " + "; ".join(seeds) + ".", ""] if seeds else []
    leaks = _unlike(_leak(record) for record in records if (record.get("calibration") or {}).get("leakage"))
    lines += [*leaks, ""] if leaks else []
    if tasks := protocol.get("tasks"):
        asked = ", ".join(f"{name} ({entry['items']} items)" for name, entry in tasks.items())
        lines += [
            f"Tasks: {asked}, without examples; acc_norm where lm-eval reports it, else acc; change on the same items.",
            "",
        ]
    table = as_table(records)
    if len(texts) > 1:
        table = replace(table, rows=tuple(map(_with_calibration, table.rows, records)))
    return "\n".join(lines) + "\n" + markdown_table(table.filled())


def _with_calibration(row: tuple[str, ...], record: Record) -> tuple[str, ...]:
    """The cells of a record, which of several calibration texts it read among the remarks."""
    if not record.get("calibration"):
        return row
    return (*row[:-1], ", ".join(filter(None, (f"calibrated on {_calibration(record)}", row[-1]))))


def _tasks(record: Mapping[str, Any]) -> str:
    """The mean accuracy, and by how much it changed, with the 95 % interval over all items of all tasks."""
    mean = mean_accuracy(record)
    if mean is None:
        return ""
    changed = accuracy_change(record)
    return f"{mean:.2%}" + ("" if changed is None else f", change {changed[0]:+.2%} ± {changed[1]:.2%}")


def _remark(record: Mapping[str, Any]) -> str:
    if "error" in record:
        return f"failed: {' '.join(record['error'].split())}"
    through = record.get("read", "").partition(", ")[2]
    taken = f"from {record['taken_from']['file']}" if "taken_from" in record else ""
    broken = f"broken: {'; '.join(record['problems'])}" if record.get("problems") else ""
    return "; ".join(filter(None, (through, taken, broken)))


def _leak(record: Record) -> str:
    leak = record["calibration"]["leakage"]
    return (
        f"Of the evaluated text {leak['share']:.2%} of the passages of 13 words are in the calibration text, the longest of "
        f"{leak['longest']} words."
    )


def _calibration(record: Record) -> str:
    used = record["calibration"]
    return f"{used['text']}, {used['windows']} windows of {used['tokens']} tokens"


def _machine(record: Record) -> str:
    machine = record["machine"]
    return f"{machine['cpu']}, threads: {machine['threads']}"


def _unlike(texts: Any) -> list[str]:
    return list(dict.fromkeys(texts))


def _text(value: float | None, form: str, unit: float = 1, suffix: str = "") -> str:
    return "" if value is None else f"{value / unit:{form}}{suffix}"
