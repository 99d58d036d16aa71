"""Which windows of calibration text a run computes of each stream: those that something reads."""

from __future__ import annotations

from math import ceil

from lowbit.recipes import Recipe

MEASURED = 2000
"""Tokens that the result is measured on at least, where there are as many."""
_FEWEST, _MOST = 4, 8
"""Windows in which those tokens are: some, since the tokens of one window resemble each other, and not more than are held out."""


def watched_windows(calibrated: int, held_out: int, tokens: int) -> range:
    """The windows that the result is measured on: the first of those held out, or of the others, as many as hold
    :data:`MEASURED` tokens. They pass through every block in float32, in each stream: each costs more than one of the others.

    Args:
        calibrated: windows that steps see.
        held_out: windows behind them that no step sees.
        tokens: of a window.
    """
    enough = min(_MOST, max(_FEWEST, ceil(MEASURED / tokens)))
    return range(calibrated, calibrated + min(enough, held_out)) or range(min(enough, calibrated))


def stream_windows(
    recipe: Recipe, calibrated: int, held_out: int, tokens: int, *, original: bool = False
) -> dict[str, range]:
    """The windows of each array of hidden states: ``fp`` and ``next``, of the original model before and behind a block;
    ``quant``, of the blocks quantized so far; ``packed``, the same behind a packed embedding; ``ahead``, of the original model
    behind the blocks to which steps look ahead.

    Args:
        recipe: what is to be done.
        calibrated, held_out, tokens: as for :func:`watched_windows`.
        original: whether all windows of the original stream are wanted, whatever the recipe reads.
    """
    watched = watched_windows(calibrated, held_out, tokens)
    of_original = range(calibrated + held_out) if original or recipe.reads_original else watched
    of_quantized = range(max(calibrated, watched.stop)) if recipe.reads_inputs and recipe.feed == "quant" else watched
    of_next = range(calibrated if recipe.looks_ahead else 0)
    return {"fp": of_original, "quant": of_quantized, "next": of_original, "packed": watched, "ahead": of_next}
