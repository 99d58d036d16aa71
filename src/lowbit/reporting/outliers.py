"""Sections on what ``lowbit inspect`` found: SmoothQuant's figures (arXiv:2211.10438) of every input, and two of them compared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from lowbit.inspection import InputRow, Inspection
from lowbit.inspection.plots import DRAWINGS
from lowbit.inspection.rows import MASSIVE, OUTLIER
from lowbit.reporting.figures import Picture, lines, picture_of
from lowbit.reporting.runs import error_map
from lowbit.reporting.sections import Section
from lowbit.reporting.sources import Json, SourceError
from lowbit.tables import Table, text_of

_TITLES = {
    "channel_maxima.png": "Largest magnitude of each channel",
    "massive_tokens.png": "Largest magnitude of a token",
    "hardest_layers.png": "The hardest layers",
}


def inspection_sections(found: Mapping[str, tuple[Json, Path]]) -> list[Section]:
    """A section for each inspection, and one for each but the first that compares it with the first."""
    read = {name: _read(name, data, file) for name, (data, file) in found.items()}
    sections = [inspection_section(name, *each) for name, each in read.items()]
    (first, (before, _)), *others = read.items()
    for name, (after, _) in others:
        if compared := _compared((first, before), (name, after)):
            sections.append(compared)
    return sections


def _read(name: str, data: Json, file: Path) -> tuple[Inspection, dict[str, Tensor]]:
    try:
        inspection = Inspection.from_dict(data)
    except ValueError as error:
        raise SourceError(f"{name}: {error}") from None
    channels = load_file(file) if file.is_file() else {}
    missing = [row.name for row in inspection.inputs if row.name not in channels]
    if channels and missing:
        raise SourceError(f"{file}: it has no channels of {missing[0]}; expected those that belong to {name}")
    return inspection, channels


def inspection_section(name: str, inspection: Inspection, channels: Mapping[str, Tensor]) -> Section:
    """The figures and the tables of one inspection. Without ``channels`` there is no map of them."""
    inputs = _inputs_table(name, inspection)
    pictures: list[Picture | None] = []
    if inspection.inputs:
        widest = max(inspection.inputs, key=_ratio)
        summary = (
            f"The widest input is {widest.name}: {widest.largest:.4g}, {_ratio(widest):.0f} times its median channel. "
            f"Channels over {OUTLIER:g} times the median are outliers, tokens over {MASSIVE:g} times the median token massive."
        )
        for file in ("channel_maxima.png", "massive_tokens.png"):
            if channels or "channel" not in file:
                pictures.append(
                    picture_of(_TITLES[file], summary, inputs, partial(DRAWINGS[file], inspection, channels))
                )
    layers = inspection.to_dict()["layers"]
    pictures.append(error_map(name, layers))
    table = Table(
        f"{name}: layers",
        ("layer", "role", "error at 4 bits", "weights from", "to", "deviation"),
        tuple(
            (x.name, x.role, *map(text_of, (x.error, x.weight_min, x.weight_max, x.weight_std)))
            for x in inspection.rows
        ),
    ).filled()
    rounded = ("Errors are those of rounding to nearest, 4 bits in groups of 64.",) if inspection.hardest else ()
    words = (
        f"{inspection.model} on {inspection.calibration}.",
        *rounded,
        *(f"Warning: {text}" for text in inspection.warnings),
    )
    return Section(
        f"Inputs and layers of {name.removesuffix('/inspection.json')}",
        words,
        tuple(filter(None, pictures)),
        (inputs, table),
    )


def _ratio(row: InputRow) -> float:
    return row.largest / max(row.median_channel, 1e-30)


def _inputs_table(name: str, inspection: Inspection) -> Table:
    return Table(
        f"{name}: inputs",
        ("input", "block", "largest", "median channel", "outlier channels", "widest channel", "massive tokens"),
        tuple(
            (
                row.name,
                str(row.block),
                text_of(row.largest),
                text_of(row.median_channel),
                str(len(row.outliers)),
                str(row.outliers[0][0]) if row.outliers else "",
                str(len(row.massive)),
            )
            for row in inspection.inputs
        ),
    )


def _compared(before: tuple[str, Inspection], after: tuple[str, Inspection]) -> Section | None:
    """What became of outliers in the inputs that both have; None if there is none."""
    names = [name.removesuffix("/inspection.json") for name, _ in (before, after)]
    old, new = ({row.name: row for row in inspection.inputs} for _, inspection in (before, after))
    common = [name for name in old if name in new]
    if not common:
        return None
    series = {}
    for words, rows in zip(names, (old, new), strict=True):
        for role in dict.fromkeys(rows[name].role for name in common):
            worst: dict[float, float] = {}
            for row in (rows[name] for name in common if rows[name].role == role):
                worst[float(row.block)] = max(_ratio(row), worst.get(float(row.block), 0.0))
            series[f"{role}, {words}"] = (list(worst), list(worst.values()))
    table = Table(
        f"Outliers in {names[0]} and {names[1]}",
        ("input", *(f"{what}, {name}" for what in ("largest to median", "outlier channels") for name in names)),
        tuple(
            (
                name,
                *(f"{_ratio(rows[name]):.4g}" for rows in (old, new)),
                *(str(len(rows[name].outliers)) for rows in (old, new)),
            )
            for name in common
        ),
    )
    counts = [sum(len(rows[name].outliers) for name in common) for rows in (old, new)]
    widest = [max(_ratio(rows[name]) for name in common) for rows in (old, new)]
    summary = (
        f"Outlier channels in the inputs that both have: {counts[0]} in {names[0]}, {counts[1]} in {names[1]}. The largest channel "
        f"is {widest[0]:.0f} and {widest[1]:.0f} times the median one."
    )
    picture = lines("Largest channel over the median channel", summary, table, series, "block", "ratio")
    return Section(f"Outliers: {names[0]} and {names[1]}", (), (picture,), (table,))
