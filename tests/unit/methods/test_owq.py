"""OWQ: which options make which recipe, and the invariants of its section."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.methods.owq import owq
from lowbit.numerics import Gram, KeptColumns, MinMax, PerChannel, PerGroup
from lowbit.solve import Gptq, WeakColumns

from helpers import sqnr_db

O, I = 96, 128


def _solver(recipe) -> Gptq:
    return recipe.steps[-1].solver


def _spec(recipe):
    return recipe.scheme.rules[0].weight


@pytest.fixture(scope="module")
def layer():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, I, generator=g) @ (torch.eye(I) + 0.2 * torch.randn(I, I, generator=g))
    x[:, [5, 77]] *= 40
    return torch.randn(O, I, generator=g), x


def _solve(recipe, layer):
    w, x = layer
    return _solver(recipe).solve(w, _spec(recipe), {Gram(): x.T @ x})


def _error(solution, layer) -> float:
    w, x = layer
    q = solution.q.dequantize() + sum(term.dense((O, I)) for term in solution.side)
    return float(((x @ (q - w).T) ** 2).sum() / ((x @ w.T) ** 2).sum())


def _bits(solution) -> float:
    kept = [term for term in solution.side if isinstance(term, KeptColumns)]
    return (solution.q.stored_bits + sum(32 * len(k.index) + 16 * k.value.numel() for k in kept)) / (O * I)


def test_without_kept_columns_and_extras_it_is_gptq_bit_for_bit(layer):
    w, x = layer
    plain = owq(kept_columns=0, mse=False, order="none", greedy_passes=0, damp=0.01)
    ours = _solve(plain, layer)
    gptq = Gptq().solve(w, _spec(plain), {Gram(): x.T @ x})
    assert torch.equal(ours.q.codes, gptq.q.codes) and torch.equal(ours.q.params.scale, gptq.q.params.scale)
    assert ours.side == () and _solver(plain).fit == MinMax()


def test_the_columns_behind_outlier_activations_are_kept_and_pay_for_themselves(layer):
    solution = _solve(owq(kept_columns=2), layer)
    (kept,) = solution.side
    assert kept.index.tolist() == [5, 77]
    assert _error(solution, layer) < 0.2 * _error(_solve(owq(kept_columns=0), layer), layer)


def test_the_codes_of_kept_columns_stand_for_exact_zeros(layer):
    solution = _solve(owq(kept_columns=7, group_size=16), layer)
    (kept,) = solution.side
    assert (solution.q.dequantize()[:, kept.index.long()] == 0).all()


def test_the_default_target_is_a_tenth_of_a_bit():
    per_channel, grouped = owq(), owq(group_size=64)
    shape = (4096, 4096)
    assert _solver(per_channel).outliers == WeakColumns(target_bits=3.1)
    assert WeakColumns(target_bits=3.1).budget(_spec(per_channel), shape) == (24, ())  # (0.1 - 19 / 4096) * 4096 / 16
    assert _solver(grouped).outliers.budget(_spec(grouped), shape) == (25, ())  # 0.1 over the scales of the groups


def test_a_target_without_room_keeps_nothing_and_says_so(layer):
    solution = _solve(owq(target_bits=3.1), layer)
    assert solution.side == ()
    (note,) = solution.notes
    assert note.startswith(
        "no column kept: of 3.1 bits the codes and their scales take 3.148, and a column would take 0.128"
    )


@pytest.mark.parametrize("target", [3.25, 3.5, 4.0])
def test_a_target_is_used_up_and_not_passed(layer, target):
    bits = _bits(_solve(owq(target_bits=target), layer))
    assert target - 17 / I < bits <= target


def test_groups_stay_what_they_are_and_are_not_disturbed(layer):
    recipe = owq(group_size=32, kept_columns=4)
    solution = _solve(recipe, layer)
    assert solution.pre == () and _spec(recipe).granularity == PerGroup(32)
    assert _error(solution, layer) < _error(_solve(owq(kept_columns=4), layer), layer)


def test_the_target_and_the_count_exclude_each_other():
    with pytest.raises(ValueError, match="give one of them"):
        owq(target_bits=3.1, kept_columns=4)


def test_the_recipe_says_what_was_asked():
    recipe = owq(bits=4, target_bits=4.2, order="none")
    assert _solver(recipe).outliers == WeakColumns(target_bits=4.2) and _solver(recipe).order == "none"
    assert _spec(recipe).granularity == PerChannel() and _spec(recipe).grid.bits == 4


@pytest.mark.parametrize(
    "options", [{"kept_columns": 3}, {"group_size": 32, "kept_columns": 3, "order": "act"}], ids=str
)
def test_the_packed_layer_runs_what_was_solved(layer, options):
    w, x = layer
    linear = torch.nn.Linear(I, O)
    linear.weight.data.copy_(w)
    packed = lowbit.quantize_linear(linear, x, owq(**options))
    solution = _solve(owq(**options), layer)
    order = 32 / O if solution.pre else 0
    assert packed.bits_per_weight == pytest.approx(_bits(solution) + order)
    with torch.no_grad():
        assert sqnr_db(linear(x), packed(x)) > 20
        assert sqnr_db(x @ packed.effective_weight().T + linear.bias, packed(x)) > 100
