"""Calibration text in evaluated text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lowbit.evaluation.leakage import find_leakage
from lowbit.texts import load_text

WIKITEXT = Path(__file__).parents[4] / "shared" / "data" / "text"


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices([f"w{i}" for i in range(500)], k=count))


def test_a_copied_passage_is_found_whatever_its_layout():
    text = words(2000, 1)
    copied = " ".join(text.split()[700:780]).upper().replace(" ", ",\n")
    found = find_leakage(text, words(300, 2) + ". " + copied + " " + words(300, 3))
    assert found.leaks and found.longest == 80
    assert found.passage.split() == text.split()[700:712]
    assert found.share == pytest.approx((80 - 12) / (680 - 12))
    assert "longest of 80 words" in str(found)


def test_independent_texts_and_passages_of_twelve_words_do_not_leak():
    text = words(2000, 1)
    twelve = " ".join(text.split()[:12])
    assert find_leakage(text, words(2000, 2) + " " + twelve + " " + words(50, 3)).share == 0
    assert not find_leakage(text, "a few words").leaks and not find_leakage("", text).leaks


def test_many_short_passages_leak_too():
    pieces = [words(15, seed) for seed in range(100)]
    found = find_leakage(" and then ".join(pieces), " but ".join(reversed(pieces)))
    assert found.leaks and found.longest < 20


def test_the_two_parts_of_the_documentation_do_not_leak():
    parts = [load_text("python-docs", split).text for split in ("calibration", "evaluation")]
    assert not find_leakage(*parts).leaks and not find_leakage(*reversed(parts)).leaks
    assert find_leakage(parts[0], parts[1] + parts[0][1000:5000]).leaks


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-2 lies beside the project only on its machines")
def test_wikitexts_validation_split_does_not_leak_into_its_test_split():
    valid, test = ((WIKITEXT / f"wikitext2.{split}.raw").read_text(encoding="utf-8") for split in ("valid", "test"))
    assert find_leakage(valid, test).share == 0
    assert find_leakage(valid + test[:3000], test).leaks
