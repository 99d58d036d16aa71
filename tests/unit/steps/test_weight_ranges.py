"""The search of a weight's format and ranges, and the errors that judge it."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics import Clipped, Float, PerChannel, PerGroup, PerTensor, Spec, fake_quantize
from lowbit.steps.product_errors import ProductErrors
from lowbit.steps.weight_ranges import WeightRanges

O, I, T = 24, 40, 300
SHARES = (1.0, 0.5, 0.7, 0.9, 1.1)
FORMATS = Float(2, 1).splits()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [20, T])
@pytest.mark.parametrize("same", [True, False])
def test_errors_are_squared_differences_of_products(tokens, same):
    a, exact, q = drawn(O, I), drawn(tokens, I, seed=1), drawn(O, I, seed=2)
    b = exact if same else exact + 0.1 * drawn(tokens, I, seed=3)
    expected = (b @ q.T - exact @ a.T).square().sum(0)
    errors = ProductErrors(a, b, exact)
    torch.testing.assert_close(errors.of(q), expected, rtol=1e-4, atol=1e-3)
    rows = torch.tensor([3, 7, 8])
    torch.testing.assert_close(errors.of(q[rows], rows), expected[rows], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("grain", [PerChannel(), PerGroup(16), PerTensor()])
def test_a_candidate_is_restored_as_it_will_be_stored(grain):
    w, spec = drawn(O, I), Spec(Float(2, 1), grain, scale_dtype="bfloat16")
    ranges = WeightRanges(w, spec, FORMATS, SHARES)
    for c in range(len(FORMATS) * len(SHARES)):
        share = torch.full((1, 1), SHARES[c % len(SHARES)])
        here = Spec(FORMATS[c // len(SHARES)], grain, scale_dtype="bfloat16")
        expected = fake_quantize(w, here, Clipped(share, share))
        assert torch.equal(ranges.restored(c), expected)
        if ranges.by_row:
            rows = torch.tensor([0, 5, 23])
            assert torch.equal(ranges.restored(c, rows), expected[rows])


@pytest.mark.parametrize("grain", [PerChannel(), PerGroup(16), PerTensor()])
def test_the_first_search_finds_the_best_of_all(grain):
    w, x = drawn(O, I), drawn(T, I, seed=1)
    spec, clip = WeightRanges(w, Spec(Float(2, 1), grain), FORMATS, SHARES).search(ProductErrors(w, x, x))
    lost = {}
    for grid in FORMATS:
        each = torch.stack([_lost(w, x, Spec(grid, grain), share) for share in SHARES])
        lost[grid] = (each.sum(1).min() if grain == PerTensor() else each.min(0).values.sum()).item()
    assert lost[spec.grid] == min(lost.values())
    found = (x @ (fake_quantize(w, spec, clip) - w).T).square().sum().item()
    assert found == pytest.approx(min(lost.values()), rel=1e-4)


def test_a_format_that_is_far_behind_is_looked_at_on_few_channels():
    w, x = drawn(640, I), drawn(T, I, seed=1)
    looked = []

    class Counting(ProductErrors):
        def of(self, q_RI, rows=slice(None)):
            looked.append(len(q_RI))
            return super().of(q_RI, rows)

    formats = (Float(2, 1), Float(3, 0))  # on normal weights powers of two lose more
    spec, _ = WeightRanges(w, Spec(formats[0], PerChannel()), formats, SHARES).search(Counting(w, x, x))
    assert spec.grid == formats[0] and looked == [640] * 5 + [80] * 5


def _lost(w, x, spec, share):
    each = torch.full((1, 1), share)
    return (x @ (fake_quantize(w, spec, Clipped(each, each)) - w).T).square().sum(0)


def test_a_later_search_loses_no_more_than_the_choice_before_and_leaves_out_formats_far_behind():
    w, x, seen = drawn(O, I), drawn(T, I, seed=1), drawn(T, I, seed=1) + 0.3 * drawn(T, I, seed=2)
    formats = (Float(2, 1), Float(1, 2), Float(4, 0))
    ranges = WeightRanges(w, Spec(Float(2, 1), PerChannel()), formats, tuple(0.3 + 0.05 * i for i in range(14)))
    before = ranges.search(ProductErrors(w, x, x))
    errors = ProductErrors(w, seen, x)
    after = ranges.search(errors)
    kept, found = (errors.of(fake_quantize(w, *choice)).sum().item() for choice in (before, after))
    assert found <= kept
    assert 2 not in ranges.rivals and formats.index(before[0].grid) in ranges.rivals
