"""Compares many recipes on one model under one protocol, in one table: ``lowbit compare`` and ``lowbit.compare``."""

from lowbit.comparison.before import Cost, costs
from lowbit.comparison.presets import Preset, preset_names, read_preset
from lowbit.comparison.rows import ORIGINAL, Row, as_rows, label_of, method_rows, read_grid, with_seeds
from lowbit.comparison.run import compare

__all__ = [
    "ORIGINAL",
    "Cost",
    "Preset",
    "Row",
    "as_rows",
    "compare",
    "costs",
    "label_of",
    "method_rows",
    "preset_names",
    "read_grid",
    "read_preset",
    "with_seeds",
]
