"""The race of candidates over samples: whole sums decide, and hopeless candidates leave early."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor

from lowbit.steps.race import race, spread


def run(table: Tensor, **options) -> tuple[int, int]:
    """The winner of a race by ``table`` ``[candidates, samples]``, and how many of its numbers were looked at."""
    looked = 0

    def errors(i: int, part: slice, beyond: float) -> Tensor:
        nonlocal looked
        looked += part.stop - part.start
        return table[i, part].double()

    return race(len(table), table.shape[1], errors, **options).winner, looked


def noisy(count: int, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    level = 1 + torch.rand(count, 1, generator=generator)
    return (
        level * (1 + 0.2 * torch.rand(count, samples, generator=generator)) * torch.rand(samples, generator=generator)
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_winner_is_that_of_whole_sums_and_most_samples_are_not_looked_at(seed):
    table = noisy(20, 256, seed)
    winner, looked = run(table, first=16)
    assert winner == table.double().sum(1).argmin() and looked < 0.35 * table.numel()


def test_candidates_that_chance_may_explain_stay_to_the_end():
    generator = torch.Generator().manual_seed(0)
    table = 1 + torch.rand(5, 64, generator=generator)
    table[3, 32:] -= 0.2
    winner, looked = run(table, first=8)
    assert winner == 3 == table.sum(1).argmin() and looked > 0.8 * table.numel()


def test_equal_candidates_stay_and_the_first_wins():
    assert run(torch.ones(4, 64), first=8) == (0, 4 * 64)


def test_a_candidate_that_is_kept_wins_even_after_a_hopeless_start():
    table = torch.ones(2, 64)
    table[1, :32], table[1, 32:] = 2, -2
    assert run(table, first=8)[0] == 0
    assert run(table, first=8, kept=(1,))[0] == 1


def test_samples_apart_count_as_they_are_and_speak_for_no_others():
    table = torch.ones(2, 128)
    table[1] = 0.9
    table[1, :8] = 3  # costs 16 where it is known, and would seem to cost 256 in all if it spoke for the others
    assert run(table, first=16)[0] == 0 and run(table, first=16, apart=8)[0] == 0
    table[1, 8:] = 0.8
    assert run(table, first=16, apart=8)[0] == 1


def test_certain_races_are_decided_by_whole_sums_alone():
    table = torch.tensor([[2.0] * 32, [0.0] * 31 + [100.0], [3.0] * 32])
    assert run(table, first=8)[0] == 1  # what chance cannot explain
    assert run(table, first=8, certain=True)[0] == 0


@pytest.mark.parametrize("certain", [True, False])
def test_nan_comes_last_and_infinity_before_it(certain):
    assert run(torch.tensor([[nan] * 16, [inf] * 16, [1.0] * 16]), first=2, certain=certain)[0] == 2
    assert run(torch.tensor([[1.0] * 15 + [nan], [inf] * 16]), first=2, certain=certain)[0] == 1


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_beginnings_of_a_spread_are_even(count):
    order = spread(count)
    assert sorted(order) == list(range(count))
    for size in range(1, count + 1):
        begun = sorted(order[:size])
        gaps = [b - a for a, b in zip([-1, *begun], [*begun, count], strict=True)]
        assert max(gaps) <= 3 * count / size + 1
