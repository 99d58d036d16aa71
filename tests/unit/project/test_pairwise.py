"""The combinations that stand for all combinations: they contain every pair, and are few."""

from __future__ import annotations

from itertools import combinations, product

import pytest

import pairwise
from pairwise import cases, cover, enough

SIZES = [(63, 10, 5), (16, 5, 2, 4), (3, 3, 3, 3), (2,) * 8, (4, 1, 3), (7, 6)]


@pytest.fixture(autouse=True)
def in_pairs(monkeypatch):
    monkeypatch.setattr(pairwise, "EXHAUSTIVE", False)


def held(rows) -> set:
    """Every value with its factor, and every two of them that a row combines."""
    return {part for row in rows for n in (1, 2) for part in combinations(enumerate(row), n)}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_pair_of_values_is_held(sizes):
    factors = [range(size) for size in sizes]
    assert held(cases(*factors)) == held(product(*factors))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_combinations_are_few_and_those_of_the_product_in_its_order(sizes):
    found, whole = cases(*(range(size) for size in sizes)), list(product(*(range(size) for size in sizes)))
    assert found == sorted(set(found)) and set(found) <= set(whole)
    largest = sorted(sizes)[-2:]
    assert len(found) <= 2 * largest[0] * largest[1]  # at most twice what these two factors need
    assert len(found) < len(whole) or len([size for size in sizes if size > 1]) <= 2


def test_three_factors_of_63_10_and_5_values_need_no_more_than_the_pairs_of_the_first_two():
    assert len(cases(range(63), range(10), range(5))) == 630


def test_what_cannot_go_together_is_left_out_and_every_other_pair_is_held():
    factors = range(5), range(4), range(3)

    def where(a: int, b: int, c: int) -> bool:
        return a != b and (a, c) != (4, 2)

    found = cases(*factors, where=where)
    assert all(where(*row) for row in found)
    assert held(found) == held(row for row in product(*factors) if where(*row))
    assert cases(*factors, where=lambda *_: False) == [] == cases(range(3), [])


def test_pairs_of_traits_stand_for_pairs_of_values_and_every_value_is_held():
    formats = list(product(range(8), "ab", range(5)))
    found = cases(formats, "xyz", traits=lambda form, kind: (*form, kind))
    assert held((*form, kind) for form, kind in found) == held((*form, kind) for form, kind in product(formats, "xyz"))
    assert {form for form, _ in found} == set(formats)
    assert len(found) < len(formats) * 3 / 2


def test_values_need_be_neither_hashable_nor_different():
    assert cases([[1], [1]], [{}]) == [([1], {}), ([1], {})]


def test_enough_values_have_every_trait_or_every_two_traits_that_any_has():
    values = list(product(range(4), range(3), range(3)))
    every, two = enough(values, lambda v: v), enough(values, lambda v: v, together=2)
    assert {trait for v in every for trait in enumerate(v)} == {trait for v in values for trait in enumerate(v)}
    assert held(two) == held(values)
    assert len(every) == 4 and 12 <= len(two) < 18


def test_a_cover_holds_all_that_any_set_holds_and_takes_no_set_that_adds_nothing():
    sets = [{1, 2}, {2, 3, 4}, {4}, {1, 2, 5}, {3}]
    assert cover(sets) == [1, 3]
    assert cover([]) == [] == cover([set()])


def test_everything_runs_where_everything_is_asked(monkeypatch):
    monkeypatch.setattr(pairwise, "EXHAUSTIVE", True)
    assert cases(range(3), "ab", range(2)) == list(product(range(3), "ab", range(2)))
    assert cases(range(3), "ab", where=lambda n, _: n > 1, traits=lambda n, _: (n,)) == [(2, "a"), (2, "b")]
    assert enough(range(9), lambda n: (n % 2,)) == list(range(9))
