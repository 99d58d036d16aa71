"""Calibration text in evaluated text, found by passages of 13 words (the length that GPT-3's paper looks for, arXiv:2005.14165, C).

A method that was calibrated on the text it is judged on looks better than it is. Texts are compared as words in lower case without
punctuation, so another layout, another tokenizer or other quotation marks hide nothing; a translation or a paraphrase does.

Independent texts of one kind share a few such passages: headings, quotations, boilerplate. WikiText-2's validation and test splits
share none; the two parts of python-docs share 0.1 %, in passages of up to 20 words. So a text leaks from :data:`TOLERATED` of its
passages on, or with one common passage of :data:`LONG` words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WORDS = 13
TOLERATED, LONG = 0.005, 50
_SHOWN = 12  # words of the passage in a message


@dataclass(frozen=True)
class Leakage:
    """What of an evaluated text is in the calibration text.

    Attributes:
        share: of its passages of 13 words.
        longest: words of the longest common passage.
        passage: its beginning; empty without one.
    """

    share: float
    longest: int = 0
    passage: str = ""

    @property
    def leaks(self) -> bool:
        """Whether this is more than independent texts have in common."""
        return self.share >= TOLERATED or self.longest >= LONG

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of its passages of {WORDS} words, the longest of {self.longest} words, which begins "
            f"“{self.passage} …”"
        )


def find_leakage(calibration: str, evaluated: str) -> Leakage:
    """How much of ``evaluated`` is in ``calibration``. Texts of fewer than 13 words have no passage."""
    seen = set(_passages(_words(calibration)))
    words = _words(evaluated)
    found = [passage in seen for passage in _passages(words)]
    if not any(found):
        return Leakage(0.0)
    longest, end, run = 0, 0, 0
    for i, common in enumerate(found):
        run = run + 1 if common else 0
        if run > longest:
            longest, end = run, i
    begin = end - longest + 1
    return Leakage(sum(found) / len(found), longest + WORDS - 1, " ".join(words[begin : begin + _SHOWN]))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _passages(words: list[str]) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(WORDS))))
