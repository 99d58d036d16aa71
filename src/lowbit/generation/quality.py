"""Whether generated text is worth training on: what can be counted without another model.

Counts are exact, over token ids. They find text that repeats itself, says everything twice, ends at once or is noise; they do
not find text that is fluent and wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LOOP_UNIT, LOOP_TIMES, LOOP_TOKENS = 64, 3, 16
"""A loop is a unit of at most so many tokens that stands at least so often in a row, and is so many tokens long together."""


@dataclass(frozen=True)
class Quality:
    """What texts look like.

    Attributes:
        texts, tokens: how much there is.
        shortest, median, longest: tokens of a text.
        ended: share of the texts that the model ended itself.
        vocabulary: share of the vocabulary that occurs. Ids outside it, which a model may have rows for, are not counted.
        distinct: for n = 1 to 4, how many of the n-grams of all texts differ, as a share.
        repeated: share of the 4-grams of a text that stood in the same text before.
        looping: share of the tokens that are in a loop (:data:`LOOP_UNIT`).
        longest_loop, loop_in: tokens of the longest loop, and the place of its text, from 0.
        duplicates: share of the texts that are copies of an earlier one.
        confidence: mean over tokens of the model's own probability of what it chose; None: not known.
        problems: what makes these texts bad data, with the thresholds.
    """

    texts: int
    tokens: int
    shortest: int
    median: float
    longest: int
    ended: float
    vocabulary: float
    distinct: tuple[float, float, float, float]
    repeated: float
    looping: float
    longest_loop: int
    loop_in: int
    duplicates: float
    confidence: float | None
    problems: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The figures that have thresholds, in a line."""
        confidence = "" if self.confidence is None else f"; mean probability {self.confidence:.3f}"
        return (
            f"{self.texts} texts, {self.tokens} tokens, a median of {self.median:g}; 4-grams: {self.distinct[3]:.1%} differ, "
            f"{self.repeated:.1%} repeated in their text; {self.looping:.1%} of the tokens in loops, {self.duplicates:.1%} of the texts "
            f"copies{confidence}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the thresholds and the summary."""
        return asdict(self) | {"thresholds": [threshold.text for threshold in THRESHOLDS], "summary": self.summary}


@dataclass(frozen=True)
class Threshold:
    """A figure of a :class:`Quality` from which on texts are bad data."""

    text: str
    passed: Callable[[Quality], bool]
    found: Callable[[Quality], str]


def _share(name: str) -> Callable[[Quality], str]:
    return lambda q: f"{getattr(q, name):.1%}"


THRESHOLDS = (
    Threshold(
        "more than 25% of the 4-grams of a text are repeated in it: the texts go in circles",
        lambda q: q.repeated > 0.25,
        _share("repeated"),
    ),
    Threshold("more than 10% of the tokens are in loops", lambda q: q.looping > 0.1, _share("looping")),
    Threshold(
        "fewer than 50% of all 4-grams differ: the texts say the same",
        lambda q: q.tokens > 0 and q.distinct[3] < 0.5,
        lambda q: f"{q.distinct[3]:.1%}",
    ),
    Threshold("more than 5% of the texts are copies of another", lambda q: q.duplicates > 0.05, _share("duplicates")),
    Threshold(
        "half of the texts have fewer than 16 tokens", lambda q: q.median < 16, lambda q: f"a median of {q.median:g}"
    ),
    Threshold(
        "the mean probability of the tokens is above 0.9: the model was hardly drawn from",
        lambda q: q.confidence is not None and q.confidence > 0.9,
        lambda q: f"{q.confidence:.2f}",
    ),
    Threshold(
        "the mean probability of the tokens is below 0.05: the texts are noise",
        lambda q: q.confidence is not None and q.confidence < 0.05,
        lambda q: f"{q.confidence:.3f}",
    ),
)
"""What makes texts bad data. Text of people is far from all of them: WikiText-2 and Python's documentation, in SmolLM2's tokens and
texts of 256 to 1024 tokens, repeat 3 to 9 % of their 4-grams, 83 to 85 % of all 4-grams differ, and nothing is in a loop."""


def judge(
    ids: np.ndarray, lengths: np.ndarray, ended: np.ndarray, confidence: float | None, vocabulary: Collection[int]
) -> Quality:
    """Measures texts.

    Args:
        ids: the tokens of all texts, one text behind another, integers ``[tokens]``.
        lengths: tokens of each text ``[texts]``; one text at least, and no empty one.
        ended: bool ``[texts]``.
        confidence: mean probability of the chosen tokens.
        vocabulary: the ids that there are, each once.
    """
    text_of = np.repeat(np.arange(len(lengths)), lengths)
    codes = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    tokens, grams, distinct = codes, codes, []
    for n in range(1, 5):
        if n > 1:  # codes of n-grams, from those of the (n-1)-grams and the token behind each
            pairs = grams[:-1] * (int(tokens.max()) + 1) + tokens[n - 1 :]
            grams = np.unique(pairs, return_inverse=True)[1].astype(np.int64) if len(pairs) else pairs
        inside = text_of[: len(grams)] == text_of[n - 1 :]
        own = grams[inside]
        distinct.append(len(np.unique(own)) / len(own) if len(own) else 1.0)
    fours = grams[inside]
    in_text = text_of[: len(grams)][inside] * (int(fours.max()) + 1) + fours if len(fours) else fours
    looping, longest, at = _loops(ids, text_of)
    starts = np.cumsum(lengths) - lengths
    copies = len(lengths) - len({ids[a : a + n].tobytes() for a, n in zip(starts, lengths, strict=True)})
    quality = Quality(
        texts=len(lengths),
        tokens=len(ids),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        ended=float(ended.mean()),
        vocabulary=float(np.isin(list(vocabulary), ids).mean()) if vocabulary else 0.0,
        distinct=(distinct[0], distinct[1], distinct[2], distinct[3]),
        repeated=1 - len(np.unique(in_text)) / len(in_text) if len(in_text) else 0.0,
        looping=looping,
        longest_loop=longest,
        loop_in=int(text_of[at]),
        duplicates=copies / len(lengths),
        confidence=confidence,
    )
    problems = tuple(f"{each.text} ({each.found(quality)})" for each in THRESHOLDS if each.passed(quality))
    return Quality(**{**{name: getattr(quality, name) for name in quality.__dataclass_fields__}, "problems": problems})


def _loops(ids: np.ndarray, text_of: np.ndarray) -> tuple[float, int, int]:
    """The share of tokens in loops, the tokens of the longest loop, and where that begins."""
    depth = np.zeros(len(ids) + 1, dtype=np.int64)
    longest, at = 0, 0
    for unit in range(1, min(LOOP_UNIT, len(ids) - 1) + 1):
        same = (ids[unit:] == ids[:-unit]) & (text_of[unit:] == text_of[:-unit])
        edges = np.diff(same.astype(np.int8), prepend=0, append=0)
        first, behind = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) + unit
        loops = behind - first >= max(LOOP_TIMES * unit, LOOP_TOKENS)
        first, behind = first[loops], behind[loops]
        np.add.at(depth, first, 1)
        np.add.at(depth, behind, -1)
        if len(first) and (most := int((behind - first).max())) > longest:
            longest, at = most, int(first[(behind - first).argmax()])
    return float((np.cumsum(depth[:-1]) > 0).mean()), longest, at
