"""Which combinations of factors a test runs: every pair of values in `make test`, every combination in `make exhaustive`.

Faults that tests find hang on one value or on two values together far more often than on three, and the combinations that
hold every pair of values are few: 63 x 10 x 5 values have 3150 combinations, and 630 of them hold every pair.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations, product
from typing import Any

EXHAUSTIVE = os.environ.get("LOWBIT_EXHAUSTIVE") == "1"


def cases(
    *factors: Iterable[Any],
    where: Callable[..., bool] | None = None,
    traits: Callable[..., tuple[Hashable, ...]] | None = None,
) -> list[tuple[Any, ...]]:
    """Combinations of one value of each factor: all of them where LOWBIT_EXHAUSTIVE=1 is set, otherwise enough for pairs.

    Args:
        factors: the values of each factor; a combination has one of each, in this order.
        where: says of a combination's values whether they can go together; all can where it is not given.
        traits: what a combination's values consist of, where a factor is itself a product (bits and groups of a format):
            pairs of traits are covered instead of pairs of whole values. Each whole value is covered in any case.

    Returns:
        The chosen combinations in the order of the product. Every value, and every pair of values of two factors (or pair of
        traits), that some combination holds is held by one of those chosen.
    """
    lists = [list(factor) for factor in factors]
    numbered = product(*(enumerate(values) for values in lists))
    rows = [tuple(zip(*row, strict=True)) for row in numbered]  # of each combination its numbers and its values
    rows = [(numbers, values) for numbers, values in rows if where is None or where(*values)]
    if EXHAUSTIVE:
        return [values for _, values in rows]
    held = [
        set(enumerate(numbers)) | set(combinations(enumerate(traits(*values) if traits else numbers), 2))
        for numbers, values in rows
    ]
    return [rows[i][1] for i in cover(held)]


def enough(values: Iterable[Any], traits: Callable[[Any], tuple[Hashable, ...]], together: int = 1) -> list[Any]:
    """Values that have between them every trait that any has: all of them where LOWBIT_EXHAUSTIVE=1 is set.

    Args:
        values: the values of one factor.
        traits: what a value consists of.
        together: 1 for every trait, 2 for every pair of traits.
    """
    every = list(values)
    if EXHAUSTIVE:
        return every
    return [every[i] for i in cover([set(combinations(enumerate(traits(value)), together)) for value in every])]


def cover(sets: list[set[Any]]) -> list[int]:
    """Indices, in order, of few sets that together hold whatever any of them holds.

    Greedy: the set with the most that is new comes next, of equal ones the first. What a set adds only shrinks as others
    are taken, so one look at the set that promised most tells whether it still does.
    """
    missing, taken = set().union(*sets), []
    promised = [(-len(each), i) for i, each in enumerate(sets)]
    heapq.heapify(promised)
    while missing:
        _, i = heapq.heappop(promised)
        adds = len(sets[i] & missing)
        if promised and (-adds, i) > promised[0]:
            heapq.heappush(promised, (-adds, i))
        else:
            taken.append(i)
            missing -= sets[i]
    return sorted(taken)
