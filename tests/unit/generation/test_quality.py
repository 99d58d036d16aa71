"""The report on texts made by hand, whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.generation import judge

RANDOM = np.random.default_rng(0)


def report(texts: list[list[int]], confidence: float | None = 0.4, ended: bool = True, vocabulary: int = 1000):
    ids, lengths = np.concatenate([np.array(text, dtype=np.int32) for text in texts]), np.array([len(t) for t in texts])
    return judge(ids, lengths, np.full(len(texts), ended), confidence, range(vocabulary))


def noise(count: int, tokens: int = 100, vocabulary: int = 1000) -> list[list[int]]:
    return RANDOM.integers(0, vocabulary, (count, tokens)).tolist()


def test_figures_of_texts_that_can_be_counted_by_hand():
    made = report([[1, 2, 1, 2, 1, 2], [3], [1, 2, 1]], vocabulary=6)
    assert (made.texts, made.tokens, made.shortest, made.median, made.longest) == (3, 10, 1, 3, 6)
    assert made.vocabulary == 0.5 and made.ended == 1 and made.duplicates == 0
    # pairs: 12 21 12 21 12 | 12 21; threes: 121 212 121 212 | 121; fours: 1212 2121 1212
    assert made.distinct == (3 / 10, 2 / 7, 2 / 5, 2 / 3)
    assert made.repeated == pytest.approx(1 / 3)
    assert made.looping == 0  # six tokens are no loop yet


def test_ids_outside_the_vocabulary_are_no_part_of_it():
    """A model may have rows for more ids than its tokenizer has tokens, and draw them."""
    made = report([[1, 2, 3, 4, 5, 6, 7, 8]], vocabulary=4)
    assert made.vocabulary == 0.75 and made.tokens == 8


def test_n_grams_do_not_reach_from_one_text_into_the_next():
    assert report([[1, 2], [3, 4], [1, 2], [3, 4]]).distinct[1:] == (0.5, 1.0, 1.0)
    assert report([[5] * 8, [5] * 8]).longest_loop == 0
    assert report([[7] * 20, [7] * 30]).longest_loop == 30


@pytest.mark.parametrize("unit", [1, 3, 20, 64])
def test_a_loop_is_found_with_its_length_and_place(unit):
    before, behind = noise(1, 50)[0], noise(1, 31)[0]
    loop = list(range(2000, 2000 + unit)) * max(4, 20 // unit + 1)
    made = report([noise(1)[0], [*before, *loop, *behind], noise(1)[0]], vocabulary=3000)
    assert made.longest_loop == len(loop) and made.loop_in == 1
    assert made.looping == pytest.approx(len(loop) / made.tokens)


def test_what_stands_twice_in_a_row_or_in_long_units_is_no_loop():
    twice = list(range(30)) * 2
    long = list(range(65)) * 4
    assert report([twice]).longest_loop == 0
    assert report([long]).longest_loop == 0 and report([long]).repeated > 0.7


def test_texts_without_fault_have_no_problem():
    assert report(noise(50)).problems == ()


@pytest.mark.parametrize(
    ("texts", "confidence", "words"),
    [
        ([*noise(10), *([text[:20] * 5 for text in noise(10)])], 0.4, "repeated in it: the texts go in circles"),
        ([*noise(10), [9] * 500], 0.4, r"more than 10% of the tokens are in loops \(33.3%\)"),
        ([text for text in noise(20) for _ in range(3)], 0.4, r"fewer than 50% of all 4-grams differ.*\(33.3%\)"),
        ([*noise(20), *noise(1) * 3], 0.4, r"more than 5% of the texts are copies of another \(8.7%\)"),
        ([*noise(4), *noise(5, 15)], 0.4, r"half of the texts have fewer than 16 tokens \(a median of 15\)"),
        (noise(9), 0.95, r"above 0.9: the model was hardly drawn from \(0.95\)"),
        (noise(9), 0.004, r"below 0.05: the texts are noise \(0.004\)"),
    ],
)
def test_bad_data_is_named_as_such(texts, confidence, words):
    import re

    problems = report(texts, confidence).problems
    assert any(re.search(words, problem) for problem in problems), problems


def test_the_shortest_texts_have_figures():
    made = report([[5]], confidence=None)
    assert made.distinct == (1.0, 1.0, 1.0, 1.0) and made.repeated == made.looping == 0.0


def test_a_report_as_data_has_its_thresholds():
    made = report([[7] * 90]).to_dict()
    assert len(made["thresholds"]) == 7 and made["problems"] and made["texts"] == 1
