"""Compares many recipes on one model under one protocol, in one table: ``lowbit compare`` and ``lowbit.compare``."""

from lowbit.comparison.rows import ORIGINAL, Row, as_rows, label_of, method_rows, read_grid
from lowbit.comparison.run import compare

__all__ = ["ORIGINAL", "Row", "as_rows", "compare", "label_of", "method_rows", "read_grid"]
