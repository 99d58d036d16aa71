"""How long work reports that it goes on: one signature for every part of the package."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, float, str], None]
"""``progress(done, total, what)``: units of work done (with fractions), units in all, and what is being done, in words."""


def silent(done: float, total: float, what: str) -> None:
    """Reports nothing."""


__all__ = ["Progress", "silent"]
