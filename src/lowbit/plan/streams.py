"""Which windows of calibration text a run computes of each stream: those that something reads."""

from __future__ import annotations

from lowbit.recipes import Recipe

WATCHED = 8
"""Calibration windows by which the report compares the result with the original, where none are held out."""


def watched_windows(calibrated: int, held_out: int) -> range:
    """The windows that the result is measured on: those held out, or the first of the others.

    Args:
        calibrated: windows that steps see.
        held_out: windows behind them that no step sees.
    """
    return range(calibrated, calibrated + held_out) or range(min(WATCHED, calibrated))


def stream_windows(recipe: Recipe, calibrated: int, held_out: int, *, original: bool = False) -> dict[str, range]:
    """The windows of each array of hidden states: ``fp`` and ``next``, of the original model before and behind a block;
    ``quant``, of the blocks quantized so far; ``packed``, the same behind a packed embedding; ``ahead``, of the original model
    behind the blocks to which steps look ahead.

    Args:
        recipe: what is to be done.
        calibrated, held_out: as for :func:`watched_windows`.
        original: whether all windows of the original stream are wanted, whatever the recipe reads.
    """
    every, watched = range(calibrated + held_out), watched_windows(calibrated, held_out)
    of_original = every if original or recipe.reads_original else watched
    of_quantized = every if recipe.reads_inputs and recipe.feed == "quant" else watched
    of_next = range(calibrated if recipe.looks_ahead else 0)
    return {"fp": of_original, "quant": of_quantized, "next": of_original, "packed": watched, "ahead": of_next}
