"""Weights that solvers keep in float16: the rules, what they hide from fits, and the column solver around them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowbit.numerics import (
    NF4,
    Affine,
    Alternating,
    BinaryCoded,
    Block,
    ClipSearch,
    Codebook,
    Fisher,
    Float,
    Gram,
    Int,
    KeptColumns,
    KMeans,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    RmsRange,
    Sparse,
    Spec,
    Tokens,
    from_dict,
    stored_bits,
    to_dict,
)
from lowbit.solve import Gptq, LeaveOneOut, Nearest, RangeOutliers, Sensitive, Solution, WeakColumns
from lowbit.solve.columns import without
from lowbit.solve.factor import inverse_factor
from lowbit.solve.outliers import perturbation

from pairwise import cases

O, I = 20, 48
CHANNEL = Spec(Int(3), PerChannel(), scale_dtype="float32")
GROUPED = Spec(Int(3), PerGroup(16), scale_dtype="float32")
REAL = Spec(Int(3, zero="real"), PerGroup(16), Spec(Int(3, zero="real"), PerGroup(4)))
SPECS = [CHANNEL, GROUPED, REAL, Spec(Int(4), Block(3, 9), scale_dtype="float32"), Spec(Int(4), PerTensor())]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(seed: int = 1) -> Tensor:
    x = _random(300, I, seed=seed) @ _random(I, I, seed=seed + 100)
    return x * (torch.rand(I, generator=torch.Generator().manual_seed(seed)).double() * 2 + 0.2)


W, X = _random(O, I), _inputs()
H = X.T @ X
FISHER = _random(O, I, seed=7).square()
STATS = {Gram(): H, Fisher(): FISHER}


def _values(s: Solution, side: bool = True) -> Tensor:
    """The solved weight with columns in their original order and side terms added."""
    q = s.q
    w = q.spec.granularity.join(q.spec.grid.decode(q.spec.granularity.split(q.codes), q.params), q.shape).double()
    for term in s.side if side else ():
        w = w + term.dense((O, I)).double()
    for permute in reversed(s.pre):
        w = w[:, permute.index.argsort()]
    return w


def _loss(s: Solution, w: Tensor = W, h: Tensor = H) -> float:
    d = w - _values(s)
    return ((d @ h) * d).sum().item()


def _kept(s: Solution, kind: type) -> KeptColumns | Sparse | None:
    return next((term for term in s.side if isinstance(term, kind)), None)


def _mask(s: Solution) -> Tensor:
    sparse = _kept(s, Sparse)
    mask = torch.zeros(O, I, dtype=torch.bool)
    if sparse is not None:
        mask[sparse.row, sparse.column.long()] = True
    return mask


def _same(a: Solution, b: Solution) -> bool:
    return torch.equal(a.q.codes, b.q.codes) and all(torch.equal(p, q) for p, q in zip(a.q.params, b.q.params))


RULES = [WeakColumns(3), RangeOutliers(0.02), Sensitive(0.02), LeaveOneOut(0.3), LeaveOneOut(0.3, simplified=True)]
STATIC = [rule for rule in RULES if not rule.live]


# ------------------------------------------------------------------------------------------------- every rule, every solver


@pytest.mark.parametrize(
    ("solver", "rule", "spec"),
    cases([Nearest(), Gptq(), Gptq(order="group"), Gptq(static_groups=True), Gptq(order="act")], STATIC, SPECS),
    ids=str,
)
def test_what_is_kept_has_the_code_of_zero_and_comes_back_as_float16(solver, rule, spec):
    solution = type(solver)(**{**vars(solver), "outliers": rule}).solve(W, spec, STATS)
    columns, elements = _kept(solution, KeptColumns), _mask(solution)
    hidden = elements.clone()
    if columns is not None:
        hidden[:, columns.index.long()] = True
    assert hidden.any() and solution.q.spec == spec
    codes, params = spec.granularity.split(solution.q.codes), solution.q.params
    zero = spec.granularity.join(spec.grid.encode(torch.zeros_like(codes, dtype=torch.float64), params), (O, I))
    assert torch.equal(solution.q.codes[hidden], zero[hidden])
    if isinstance(solver, Nearest):
        gap = (_values(solution) - W)[hidden].abs()
        assert (gap <= 2.0**-11 * (W - _values(solution, side=False))[hidden].abs() + 1e-6).all()


@pytest.mark.parametrize("spec", [CHANNEL, GROUPED, REAL], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_keeping_weights_lowers_the_loss(rule, spec):
    plain, kept = Gptq().solve(W, spec, STATS), Gptq(outliers=rule).solve(W, spec, STATS)
    assert _loss(kept) < _loss(plain)


@pytest.mark.parametrize("rule", STATIC, ids=str)
def test_keeping_weights_brings_rounding_to_nearest_closer(rule):
    plain, kept = Nearest().solve(W, GROUPED, STATS), Nearest(outliers=rule).solve(W, GROUPED, STATS)
    assert (_values(kept) - W).square().sum() < (_values(plain) - W).square().sum()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("order", ["none", "act", "group"])
def test_the_block_size_changes_no_code_with_outliers_either(rule, order):
    reference = Gptq(order=order, outliers=rule).solve(W, GROUPED, STATS)
    for block in (1, 5, 23):
        other = Gptq(order=order, outliers=rule, block=block).solve(W, GROUPED, STATS)
        assert torch.equal(reference.q.codes, other.q.codes) and torch.equal(_mask(reference), _mask(other))


@pytest.mark.parametrize("solver", [Nearest, Gptq])
@pytest.mark.parametrize("none", [None, (), WeakColumns(0), RangeOutliers(0.0)], ids=str)
def test_keeping_nothing_changes_no_bit(solver, none):
    plain, kept = solver().solve(W, GROUPED, STATS), solver(outliers=none).solve(W, GROUPED, STATS)
    assert _same(plain, kept) and kept.side == ()


def test_leave_one_out_at_infinity_is_the_plain_column_solver():
    for spec in (CHANNEL, GROUPED, REAL):
        kept = Gptq(outliers=LeaveOneOut(float("inf"))).solve(W, spec, STATS)
        assert _same(Gptq().solve(W, spec, STATS), kept) and kept.side == ()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_are_plain_data_and_back(rule):
    for solver in (Gptq(outliers=rule), Gptq(outliers=(rule, Sensitive(0.001)))):
        assert from_dict(json.loads(json.dumps(to_dict(solver)))) == solver
    assert Gptq(outliers=rule).needs == {Gram(), Tokens()} | rule.needs


def test_several_rules_take_what_those_before_left():
    solution = Nearest(outliers=(Sensitive(0.01), RangeOutliers(0.02), WeakColumns(2))).solve(W, GROUPED, STATS)
    columns, elements = _kept(solution, KeptColumns), _mask(solution)
    assert columns is not None and len(columns.index) == 2
    assert int(elements.sum()) == int(0.01 * O * I) + int(0.02 * O * I)  # none twice, none in a kept column
    assert not elements[:, columns.index.long()].any()


def test_nothing_that_was_given_is_changed():
    w, h, fisher = W.float(), H.float(), FISHER.float()
    before = w.clone(), h.clone(), fisher.clone()
    for rule in RULES:
        Gptq(outliers=rule).solve(w, REAL, {Gram(): h, Fisher(): fisher})
    assert all(torch.equal(a, b) for a, b in zip((w, h, fisher), before))


def test_without_a_usable_gram_matrix_the_rules_that_do_not_need_it_still_hold():
    rules = (Sensitive(0.01), WeakColumns(2), LeaveOneOut(0.2))
    solution = Gptq(outliers=rules).solve(W, GROUPED, {**STATS, Gram(): torch.full((I, I), float("nan"))})
    assert _same(solution, Nearest(outliers=Sensitive(0.01)).solve(W, GROUPED, STATS))
    assert "rounded to nearest" in solution.notes and int(_mask(solution).sum()) == int(0.01 * O * I)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nearest(outliers=LeaveOneOut()), "use the solver Gptq"),
        (lambda: Gptq(outliers=(LeaveOneOut(), LeaveOneOut(0.1))), "at most one outlier rule"),
        (lambda: WeakColumns(), "either count or target_bits"),
        (lambda: WeakColumns(3, 4.0), "either count or target_bits"),
        (lambda: WeakColumns(-1), "at least 0"),
        (lambda: RangeOutliers(1.0), "below 1"),
        (lambda: LeaveOneOut(-0.1), "at least 0"),
        (lambda: Nearest(importance="hessian"), "'none', 'fisher' or 'inputs'"),  # pyright: ignore[reportArgumentType]
        (lambda: Gptq(rank="size"), "'diagonal' or 'perturbation'"),  # pyright: ignore[reportArgumentType]
        (lambda: Gptq(greedy_passes=-1), "greedy_passes"),
        (lambda: Gptq(asymmetric=2), "between 0 and 1"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_kept_weight_beyond_float16_is_refused():
    w = W.clone()
    w[3, 4] = 1e6
    with pytest.raises(ValueError, match="does not fit float16"):
        Nearest(outliers=RangeOutliers(0.01)).solve(w, Spec(Int(4), PerGroup(16), scale_dtype="float32"), STATS)


GRIDS = [
    (Spec(NF4, PerGroup(16)), MinMax()),
    (Spec(Float(2, 1), PerChannel()), ClipSearch(steps=20)),
    (Spec(Codebook(3), PerChannel()), KMeans()),
    (Spec(BinaryCoded(3), PerGroup(16)), Alternating()),
    (Spec(Int(3, zero="real"), PerTensor()), RmsRange(2.4)),
]


@pytest.mark.parametrize("rule", [*STATIC, LeaveOneOut(0.03), LeaveOneOut(0.03, simplified=True)], ids=str)
@pytest.mark.parametrize(("spec", "fit"), GRIDS, ids=lambda value: type(getattr(value, "grid", value)).__name__)
def test_outliers_go_with_every_grid(spec, fit, rule):
    w = W.clone()
    w[torch.arange(O), torch.arange(O) * 2] *= 8
    plain, kept = Gptq(fit).solve(w, spec, STATS), Gptq(fit, outliers=rule).solve(w, spec, STATS)
    assert kept.side and _loss(kept, w) < _loss(plain, w)
    if not rule.live:
        nearest = Nearest(fit, outliers=rule).solve(w, spec, STATS)
        assert nearest.side and (_values(nearest) - w).square().sum() < 2 * (_values(kept) - w).square().sum()


def test_a_fit_that_cannot_place_the_grid_is_refused_with_the_reason():
    for solver in (Nearest(MinMax()), Gptq(MinMax())):
        with pytest.raises(ValueError, match="MinMax finds a range"):
            solver.check(Spec(Codebook(3), PerChannel()), False)


# ------------------------------------------------------------------------------------------------------- hidden from fits


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_range_reaches_for_what_is_kept(spec):
    mask = torch.rand(O, I, generator=torch.Generator().manual_seed(3)) < 0.1
    hidden = W.masked_fill(mask, 1e4)
    lo, hi = torch.aminmax(spec.granularity.split(without(hidden, mask, spec.granularity)), dim=1)
    rest_lo, rest_hi = torch.aminmax(spec.granularity.split(without(W, mask, spec.granularity)), dim=1)
    assert torch.equal(lo, rest_lo) and torch.equal(hi, rest_hi)
    assert hi.max() < 10


@pytest.mark.parametrize("solver", [Nearest(outliers=RangeOutliers(0.01)), Gptq(outliers=RangeOutliers(0.01))], ids=str)
def test_a_huge_weight_that_is_kept_widens_no_grid(solver):
    w = W.clone()
    places = (torch.arange(9), torch.arange(9) * 5)  # 1 % of the weights, one in each row
    w[places] = 500.0
    solution = solver.solve(w, GROUPED, STATS)
    assert _mask(solution)[places].all()
    assert solution.q.params.scale.max() < 2


def test_a_kept_column_in_the_middle_of_a_group_moves_no_group():
    w, h = W.clone(), H.clone()
    w[:, 20] *= 1000
    h[20] *= 10
    h[:, 20] *= 10
    solution = Gptq(outliers=WeakColumns(1)).solve(w, GROUPED, {Gram(): h})
    columns = _kept(solution, KeptColumns)
    assert columns is not None and columns.index.tolist() == [20] and solution.pre == ()
    assert solution.q.params.scale.max() < 2  # 16 columns share each scale; the kept column does not affect its group's
    assert (_values(solution, side=False)[:, 20] == 0).all()


def test_a_band_of_kept_columns_alone_is_solved():
    h = H.clone()
    h[16:32] *= 100
    h[:, 16:32] *= 100
    solution = Gptq(outliers=WeakColumns(16)).solve(W, GROUPED, {Gram(): h})
    columns = _kept(solution, KeptColumns)
    assert columns is not None and columns.index.tolist() == list(range(16, 32))
    assert torch.isfinite(_values(solution)).all()


# ------------------------------------------------------------------------------------------------------------- the rules


def test_weak_columns_are_the_largest_products_of_diagonal_and_perturbation():
    found = _kept(Gptq(outliers=WeakColumns(5)).solve(W, CHANNEL, STATS), KeptColumns)
    score = H.diagonal() * perturbation(W, CHANNEL, Gptq().fit)
    assert found is not None and set(found.index.tolist()) == set(score.topk(5).indices.tolist())


def test_an_input_channel_a_hundred_times_the_others_is_kept():
    x = X.clone()
    x[:, 11] *= 100
    found = _kept(Gptq(outliers=WeakColumns(1)).solve(W, CHANNEL, {Gram(): x.T @ x}), KeptColumns)
    assert found is not None and found.index.tolist() == [11]


def test_kept_columns_absorb_the_errors_of_all_others():
    # The stored weight minus the original is -E U[normal, kept], with the scaled errors E of the rounded columns.
    solution = Gptq(outliers=WeakColumns(6)).solve(W, CHANNEL, STATS)
    columns = _kept(solution, KeptColumns)
    assert columns is not None
    kept = columns.index.long()
    normal = torch.tensor([j for j in range(I) if j not in kept.tolist()])
    take = torch.cat([normal, kept])
    U, _ = inverse_factor(H[take][:, take], 0.01)
    assert U is not None
    n = len(normal)
    E = (W - _values(solution))[:, normal] @ torch.linalg.inv(U[:n, :n])
    expected = W[:, kept] - E @ U[:n, n:]
    torch.testing.assert_close(_values(solution)[:, kept], expected, rtol=2.0**-10, atol=1e-6)
    assert (expected - W[:, kept]).abs().max() > 0.05


def test_the_loss_falls_with_each_kept_column():
    losses = [_loss(Gptq(outliers=WeakColumns(k)).solve(W, CHANNEL, STATS)) for k in (0, 2, 4, 8, 16)]
    assert all(b <= 1.02 * a for a, b in pairwise(losses)) and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (960, 576), (576, 1536), (4096, 11008), (8, 64)])
@pytest.mark.parametrize("spec", [CHANNEL, Spec(Int(3), PerGroup(64))], ids=str)
def test_a_target_is_met_by_each_matrix_with_its_own_true_bits(shape, spec):
    rows, columns = shape
    for target in (3.4, 3.7, 5.0):
        count, notes = WeakColumns(target_bits=target).budget(spec, shape)

        def bits(k: int) -> float:
            return (stored_bits(spec, shape) + 16 * k * rows + 32 * k) / (rows * columns)

        if count:
            assert bits(count) <= target < bits(count + 1) and notes == ()
        else:
            assert bits(1) > target and "no column kept" in notes[0]


def test_range_outliers_are_what_lies_beyond_the_authors_bound():
    w = _random(40, 50, seed=4) ** 3
    mask = RangeOutliers(0.02).elements(w, torch.zeros_like(w, dtype=torch.bool), {})
    q1, q3 = torch.quantile(w, 0.25), torch.quantile(w, 0.75)
    t = torch.linspace(0.1, 30, 3000, dtype=torch.float64)
    bounds = torch.maximum((q1 - t * (q3 - q1)).abs(), (q3 + t * (q3 - q1)).abs())
    shares = (w.abs()[None] >= bounds[:, None, None]).double().mean((1, 2))
    (bound,) = bounds[(shares - 0.02).abs().argmin()].reshape(1)
    assert int(mask.sum()) == 40 and torch.equal(mask, w.abs() >= bound)


def test_sensitive_weights_are_those_of_largest_fisher_information():
    mask = _mask(Nearest(outliers=Sensitive(0.03)).solve(W, GROUPED, STATS))
    assert int(mask.sum()) == int(0.03 * O * I)
    assert FISHER[mask].min() > FISHER[~mask].max()


def test_fisher_information_weighs_the_fit_of_rounding_to_nearest():
    weighed = Nearest(ClipSearch(), importance="fisher").solve(W, CHANNEL, STATS)
    plain = Nearest(ClipSearch()).solve(W, CHANNEL, STATS)
    assert (FISHER * (_values(weighed) - W).abs() ** 2.4).sum() < (FISHER * (_values(plain) - W).abs() ** 2.4).sum()
    assert Nearest(importance="fisher").needs == {Fisher()}


# --------------------------------------------------------------------------------------------------------- leave one out


def test_a_lower_threshold_keeps_more_and_loses_less():
    thresholds = (1.0, 0.3, 0.1, 0.03, 0.01)
    solutions = [Gptq(outliers=LeaveOneOut(t)).solve(W, REAL, STATS) for t in thresholds]
    counts, losses = [int(_mask(s).sum()) for s in solutions], [_loss(s) for s in solutions]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert all(b < a for a, b in pairwise(losses))


def test_at_threshold_zero_everything_that_rounding_would_change_is_kept():
    solution = Gptq(outliers=LeaveOneOut(0.0)).solve(W, REAL, STATS)
    assert (_values(solution) - W).abs().max() < 2.0**-11 * 2 * W.abs().max()


def test_no_weight_keeps_a_scaled_error_over_the_threshold():
    solution = Gptq(outliers=LeaveOneOut(0.2), damp=0.01).solve(W, GROUPED, STATS)
    U, _ = inverse_factor(H, 0.01)
    assert U is not None
    tau = 0.2 * (W.var(0) / U.diagonal() ** 2).mean()
    e = (W - _values(solution)) @ torch.linalg.inv(U)
    mask = _mask(solution)
    assert 0 < mask.double().mean() < 0.3
    assert (e[~mask] ** 2).max() <= tau * (1 + 1e-9)
    assert e[mask].abs().max() < 1e-2 * tau.sqrt()  # float16 alone


def test_leaving_out_the_worst_weight_of_a_group_does_not_raise_the_error_of_the_others():
    w = W[:, :16].clone()
    w[torch.arange(O), torch.arange(O) % 16] += 8 * W[:, 16].sign()
    u, grid = torch.ones(16, dtype=torch.float64), Int(4, zero="real")

    def place(some: Tensor) -> Iterator[tuple[Tensor, Affine]]:
        for columns in some:
            lo, hi = torch.aminmax(w[:, columns], dim=1, keepdim=True)
            yield w[:, columns], grid.from_range(lo, hi)

    watch = LeaveOneOut(0.0).watch(w, u)
    assert watch is not None
    found = watch.unfit(w, u, grid, place)
    assert found is not None and found[torch.arange(O), torch.arange(O) % 16].all()
    assert LeaveOneOut(0.0, simplified=True).watch(w, u).unfit(w, u, grid, place) is None


def test_the_fit_without_outliers_beats_the_simplified_one_at_the_same_count():
    w = W.clone()
    w[torch.arange(O), torch.arange(O) * 2] *= 6
    full = Gptq(outliers=LeaveOneOut(0.2)).solve(w, GROUPED, STATS)
    simple = Gptq(outliers=LeaveOneOut(0.2, simplified=True)).solve(w, GROUPED, STATS)
    assert _mask(full).sum() <= 1.1 * _mask(simple).sum()
    assert _loss(full, w) < _loss(simple, w)


def test_adding_and_replacing_decoders_agree():
    solution = Gptq(outliers=LeaveOneOut(0.2)).solve(W, REAL, STATS)
    dense, mask, sparse = _values(solution, side=False), _mask(solution), _kept(solution, Sparse)
    assert sparse is not None
    replaced = dense.clone()
    replaced[mask] = dense[mask] + sparse.dense((O, I)).double()[mask]
    assert torch.equal(replaced, _values(solution)) and not torch.equal(dense, replaced)
    assert (dense[mask].abs() > 0).any()  # a grid of real zero points does not hold zero: plain values would be wrong


def test_bits_of_the_statistics_matter_little_and_eight_not_at_all():
    free = Spec(Int(3, zero="real"), PerGroup(16), scale_dtype="float32")
    stats = {b: Spec(Int(3, zero="real"), PerGroup(16), Spec(Int(b, zero="real"), PerGroup(4))) for b in (3, 8)}
    losses = {b: _loss(Gptq().solve(W, spec, STATS)) for b, spec in stats.items()}
    single = _loss(Gptq().solve(W, free, STATS))
    assert losses[8] == pytest.approx(single, rel=0.05)
    assert losses[3] < 2 * single


def test_a_group_that_keeps_all_but_one_weight_has_parameters_that_can_be_stored():
    w = torch.full((O, I), 0.5, dtype=torch.float64)
    w[:, ::3] += 1e-9 * _random(O, 16)
    for solver in (Nearest(), Gptq()):
        solution = solver.solve(w, REAL, STATS)
        assert torch.isfinite(_values(solution)).all() and (_values(solution) - w).abs().max() < 1e-3
