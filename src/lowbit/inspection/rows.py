"""The rows of an inspection, and its tables for people.

The limits are conventions. A channel is an outlier if its largest magnitude exceeds ``OUTLIER`` times the median
channel's in the same input. A token is massive if its largest magnitude exceeds ``MASSIVE`` times the median token's. A
layer's hardness is the relative squared error of its output on sampled tokens when only its weight is rounded to
nearest in ``ROUNDED``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.numerics import Int, PerGroup, Spec

OUTLIER = 6.0
MASSIVE = 50.0
ROUNDED = Spec(Int(4), PerGroup(64))
_HARDEST = "## Hardest layers\n\nRelative squared output error when rounded to nearest, 4 bits, groups of 64."


@dataclass(frozen=True)
class MassiveToken:
    """A token with a very large magnitude.

    Attributes:
        window, position: None if an expert saw only some of the tokens.
        ratio: of its magnitude to the median token's.
    """

    window: int | None
    position: int | None
    magnitude: float
    ratio: float


@dataclass(frozen=True)
class InputRow:
    """One shared input.

    Attributes:
        largest: largest magnitude of all channels.
        median_channel: median over channels of their largest magnitudes.
        median_token: median over tokens of their largest magnitudes.
        outliers: ``(channel, ratio to the median channel)``, largest first.
        massive: massive tokens, largest first.
    """

    name: str
    role: str
    block: int
    readers: tuple[str, ...]
    channels: int
    largest: float
    median_channel: float
    median_token: float
    outliers: tuple[tuple[int, float], ...]
    massive: tuple[MassiveToken, ...]


@dataclass(frozen=True)
class LayerRow:
    """One linear: its weight's range, and its relative squared output error (None if it saw no token)."""

    name: str
    role: str
    input: str
    shape: tuple[int, int]
    weight_min: float
    weight_max: float
    weight_std: float
    error: float | None


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection.

    Attributes:
        rows: linears in the model's order.
        inputs: the inputs that they read.
        files: written files.
    """

    model: str
    calibration: str
    rows: tuple[LayerRow, ...]
    inputs: tuple[InputRow, ...]
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def hardest(self) -> list[LayerRow]:
        """Layers by descending output error."""
        return sorted((row for row in self.rows if row.error is not None), key=lambda row: -(row.error or 0.0))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Inspection:
        """From plain data of :meth:`to_dict`.

        Raises:
            ValueError: keys that are missing or unknown.
        """
        try:
            inputs = [
                InputRow(
                    **row
                    | {
                        "readers": tuple(row["readers"]),
                        "outliers": tuple((channel, ratio) for channel, ratio in row["outliers"]),
                        "massive": tuple(MassiveToken(**token) for token in row["massive"]),
                    }
                )
                for row in data["inputs"]
            ]
            rows = [LayerRow(**row | {"shape": tuple(row["shape"])}) for row in data["layers"]]
            return cls(data["model"], data["calibration"], tuple(rows), tuple(inputs), tuple(data["warnings"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not what `lowbit inspect` writes ({error})") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "model": self.model,
            "calibration": self.calibration,
            "rules": {"outlier_channel": OUTLIER, "massive_token": MASSIVE, "rounded": "int4 asymmetric, groups of 64"},
            "layers": [dataclasses.asdict(row) for row in self.rows],
            "inputs": [dataclasses.asdict(row) for row in self.inputs],
            "warnings": list(self.warnings),
            "files": [str(file) for file in self.files],
        }


def input_row(
    name: str, local: str, block: int, readers: tuple[str, ...], peak_I: Tensor, peak_T: Tensor, shape: tuple[int, int]
) -> InputRow:
    """The row of an input.

    Args:
        name, local: in the model and in its block.
        peak_I, peak_T: the largest magnitude of each channel and of each token, in order.
        shape: windows, and tokens of each; where ``peak_T`` has fewer, tokens have no place.
    """
    head, _, last = local.rpartition(".")
    median_channel, median_token = peak_I.median().item(), peak_T.median().item()
    outliers = [(i, peak_I[i].item() / median_channel) for i in _over(peak_I, OUTLIER * median_channel)]
    whole = len(peak_T) == shape[0] * shape[1]
    massive = [
        MassiveToken(
            t // shape[1] if whole else None,
            t % shape[1] if whole else None,
            peak_T[t].item(),
            peak_T[t].item() / median_token,
        )
        for t in _over(peak_T, MASSIVE * median_token)
    ]
    return InputRow(
        name,
        head if head and last.isdigit() else local,
        block,
        readers,
        len(peak_I),
        peak_I.max().item(),
        median_channel,
        median_token,
        tuple(outliers),
        tuple(massive),
    )


def _over(values: Tensor, limit: float) -> list[int]:
    """Indices of the values over ``limit``, largest first. Empty if the limit is zero (a mostly dead input)."""
    if limit <= 0:
        return []
    order = values.argsort(descending=True)
    return order[: int((values > limit).sum())].tolist()


def markdown(inspection: Inspection, count: int = 20) -> str:
    """Tables of the hardest layers (if any has an error), the widest inputs and the massive tokens, up to ``count`` rows each."""
    widest = sorted(inspection.inputs, key=lambda row: -row.largest / max(row.median_channel, 1e-30))[:count]
    massive = [(row.name, token) for row in inspection.inputs for token in row.massive]
    massive = sorted(massive, key=lambda pair: -pair[1].magnitude)[:count]
    hard = [
        (row.name, f"{row.error:.3g}", f"{row.weight_min:.3g} .. {row.weight_max:.3g}", f"{row.weight_std:.3g}")
        for row in inspection.hardest[:count]
    ]
    wide = [
        (
            row.name,
            f"{row.largest:.4g}",
            f"{row.median_channel:.3g}",
            len(row.outliers),
            ", ".join(f"{channel} ({ratio:.0f}x)" for channel, ratio in row.outliers[:5]),
        )
        for row in widest
    ]
    tokens = [(name, _at(token), f"{token.magnitude:.4g}", f"{token.ratio:.0f}x") for name, token in massive]
    parts = [
        f"# {inspection.model}\n\nOn {inspection.calibration}.",
        *(f"Warning: {warning}" for warning in inspection.warnings),
        *(_HARDEST, _table(("layer", "error", "weight range", "weight std"), hard)) * bool(hard),
        f"## Widest inputs\n\nOutlier channels are over {OUTLIER:g} times the median channel's largest magnitude.",
        _table(("input", "largest", "median channel", "outliers", "the first (ratio to the median)"), wide),
        f"## Massive tokens\n\nTheir largest magnitude is over {MASSIVE:g} times the median token's.",
        _table(("input", "window, position", "magnitude", "ratio"), tokens) if tokens else "None.",
    ]
    return "\n\n".join(parts) + "\n"


def _at(token: MassiveToken) -> str:
    return "unknown" if token.window is None else f"{token.window}, {token.position}"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
