"""SpQR: which options make which recipe, and the invariants of its section."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.methods.spqr import spqr
from lowbit.numerics import Gram, Int, PerGroup, Sparse, Spec
from lowbit.solve import Gptq, LeaveOneOut

from helpers import sqnr_db

O, I = 64, 96


@pytest.fixture(scope="module")
def layer():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, I, generator=g) @ (torch.eye(I) + 0.2 * torch.randn(I, I, generator=g))
    x[:, [5, 77]] *= 20
    w = torch.randn(O, I, generator=g)
    w[torch.arange(O), torch.arange(O)] *= 6
    return w, x


def _solve(recipe, layer):
    w, x = layer
    return recipe.steps[-1].solver.solve(w, recipe.scheme.rules[0].weight, {Gram(): x.T @ x})


def _values(solution):
    w = solution.q.dequantize() + sum(term.dense((O, I)) for term in solution.side)
    for permute in solution.pre:
        w = w[:, permute.index.argsort()]
    return w


def _error(solution, layer) -> float:
    w, x = layer
    return float(((x @ (_values(solution) - w).T) ** 2).sum() / ((x @ w.T) ** 2).sum())


def _share(solution) -> float:
    return sum(len(term.value) for term in solution.side if isinstance(term, Sparse)) / (O * I)


def test_bits_of_codes_and_statistics_are_the_papers_formula(layer):
    # b + (b_s + b_z) / 16 + 64 / 256: 3-bit scales and zeros, and two float16 pairs for each 16 x 16 weights
    solution = _solve(spqr(), layer)
    assert solution.q.bits_per_weight == pytest.approx(3 + 6 / 16 + 64 / 256)


def test_outliers_are_few_and_halve_the_error(layer):
    plain, kept = _solve(spqr(threshold=float("inf")), layer), _solve(spqr(), layer)
    assert plain.side == () and 0.001 < _share(kept) < 0.05
    assert _error(kept, layer) < 0.5 * _error(plain, layer)


def test_the_order_of_groups_is_stored_or_not_paid_for(layer):
    act, group = _solve(spqr(), layer), _solve(spqr(order="group"), layer)
    assert len(act.pre) == 1 and group.pre == ()
    assert _error(group, layer) < 2 * _error(act, layer)


def test_greedy_passes_lower_the_error_at_no_bits(layer):
    without, with_passes = _solve(spqr(greedy_passes=0), layer), _solve(spqr(), layer)
    assert _share(without) == _share(with_passes)
    assert _error(with_passes, layer) < _error(without, layer)


def test_with_everything_off_it_is_gptq(layer):
    w, x = layer
    spec = Spec(Int(3, zero="real"), PerGroup(16), Spec(Int(3, zero="real"), PerGroup(16)))
    off = _solve(spqr(threshold=float("inf"), order="none", greedy_passes=0, damp=0.01), layer)
    assert torch.equal(off.q.codes, Gptq().solve(w, spec, {Gram(): x.T @ x}).q.codes)


def test_the_recipe_says_what_was_asked():
    recipe = spqr(bits=4, group_size=8, stats_bits=4, stats_group=64, threshold=0.1, simplified=True)
    spec, solver = recipe.scheme.rules[0].weight, recipe.steps[-1].solver
    assert spec == Spec(Int(4, zero="real"), PerGroup(8), Spec(Int(4, zero="real"), PerGroup(64)))
    assert solver.outliers == LeaveOneOut(0.1, simplified=True)
    assert spqr(threshold=float("inf")).steps[-1].solver.outliers is None


@pytest.mark.parametrize("order", ["act", "group"])
def test_the_packed_layer_runs_what_was_solved_and_counts_every_bit(layer, order):
    w, x = layer
    linear = torch.nn.Linear(I, O, bias=False)
    linear.weight.data.copy_(w)
    packed, solution = lowbit.quantize_linear(linear, x, spqr(order=order)), _solve(spqr(order=order), layer)
    rows, channels = 32 * (O + 1) / (O * I), 32 / O if order == "act" else 0
    assert packed.bits_per_weight == pytest.approx(3.625 + 32 * _share(solution) + rows + channels)
    torch.testing.assert_close(packed.effective_weight(), _values(solution), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert sqnr_db(linear(x), packed(x)) > 25
        assert sqnr_db(x @ packed.effective_weight().T, packed(x)) > 100
