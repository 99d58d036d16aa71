"""Laws of the weight solvers: what every solver keeps, and what the column solver gains and must not lose."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbit.numerics import (
    NF4,
    Affine,
    Block,
    Clipped,
    ClipSearch,
    CrossGram,
    Float,
    Gram,
    Int,
    MinMax,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    PerToken,
    QTensor,
    RowBands,
    Spec,
    Tokens,
    from_dict,
    to_dict,
)
from lowbit.solve import FEW_TOKENS, Gptq, Nearest, Solution, Solver
from lowbit.solve.columns import Tiling, by_band_and_score, lazy_blocks
from lowbit.solve.factor import asymmetric_target, inverse_factor
from lowbit.solve.recursion import descend

from pairwise import cases

O, I = 20, 40
GROUPED = Spec(Int(3), PerGroup(16), scale_dtype="float32")  # the last group is ragged: 40 = 16 + 16 + 8
CHANNEL = Spec(Int(3), PerChannel(), scale_dtype="float32")
SOLVERS = [
    Nearest(),
    Nearest(ClipSearch()),
    Gptq(),
    Gptq(ClipSearch(steps=20)),
    Gptq(order="act"),
    Gptq(order="act", static_groups=True),
    Gptq(order="group"),
    Gptq(order="group", static_groups=True),
    Gptq(static_groups=True),
    Gptq(stale_groups=True),
    Gptq(order="group", greedy_passes=2),
]
COLUMN_SOLVERS = [s for s in SOLVERS if isinstance(s, Gptq)]
SPECS = [
    GROUPED,
    CHANNEL,
    Spec(Int(3, symmetric=True), PerGroup(7)),
    Spec(Int(4, zero="real"), PerGroup(8), Spec(Int(8), PerGroup(4))),
    Spec(Int(4), PerTensor()),
    Spec(Int(4), Block(8, 16)),
    Spec(Int(4), Block(3, 9)),
    Spec(Int(4), PerCluster((3, 17, 20))),
    Spec(Int(4, symmetric=True, full=True), RowBands(6)),
    Spec(NF4, PerGroup(16)),
    Spec(Float(2, 1), PerGroup(16)),
]


def solved(solvers: list, specs: list[Spec]) -> list[tuple]:
    """Combinations of solvers and formats that hold every format with every value of each option."""
    options = ("fit", "order", "static_groups", "stale_groups", "greedy_passes")

    def traits(solver: Solver, spec: Spec) -> tuple:
        return type(solver), *(getattr(solver, option, None) for option in options), spec

    return cases(solvers, specs, traits=traits)


def _name(value) -> str:
    """A short test id: only what differs from the defaults."""
    return re.sub(r"\{|\}|\"|type: ?", "", json.dumps(to_dict(value)).replace(json.dumps(to_dict(NF4)), "NF4"))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weight(rows: int = O, columns: int = I, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=_generator(seed), dtype=torch.float64)


def _inputs(columns: int = I, tokens: int = 300, seed: int = 1) -> Tensor:
    """Correlated inputs whose channels differ in size."""
    g = _generator(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    size = torch.rand(columns, generator=g, dtype=torch.float64) * 2 + 0.2
    return torch.randn(tokens, columns, generator=g, dtype=torch.float64) @ mix * size


def _gram(**options) -> Tensor:
    x_TI = _inputs(**options)
    return x_TI.T @ x_TI


def _solve(solver: Solver, w_OI: Tensor, spec: Spec, h_II: Tensor, clip: Clipped | None = None) -> Solution:
    return solver.solve(w_OI, spec, {Gram(): h_II}, clip)


def _values(solution: Solution, dtype: torch.dtype = torch.float64) -> Tensor:
    """The solved weight in the original order of columns, decoded in the dtype of its parameters."""
    q = solution.q
    values = q.spec.granularity.join(q.spec.grid.decode(q.spec.granularity.split(q.codes), q.params), q.shape)
    for transform in reversed(solution.pre):
        values = values[:, transform.index.argsort()]
    return values.to(dtype)


def _loss(w_OI: Tensor, solution: Solution, h_II: Tensor) -> float:
    d_OI = w_OI.double() - _values(solution)
    return ((d_OI @ h_II.double()) * d_OI).sum().item()


def _damped(h_II: Tensor, damp: float = 0.01) -> Tensor:
    return h_II + damp * h_II.diagonal().mean() * torch.eye(len(h_II), dtype=h_II.dtype)


def _same(a: QTensor, b: QTensor) -> bool:
    params = all((p is None and q is None) or torch.equal(p, q) for p, q in zip(a.params, b.params))
    return torch.equal(a.codes, b.codes) and params


# ----------------------------------------------------------------------------------------------------- every solver


@pytest.mark.parametrize(("solver", "spec"), solved(SOLVERS, SPECS), ids=_name)
def test_a_solution_has_the_format_that_was_asked(solver, spec):
    w = _weight().float()
    solution = _solve(solver, w, spec, _gram().float())
    q = solution.q
    assert isinstance(solver, Solver)
    assert q.spec == spec and q.shape == (O, I)
    assert q.codes.dtype == torch.uint8 and q.codes.is_contiguous() and int(q.codes.max()) < 2**spec.grid.bits
    assert len(q.params.scale) == math.prod(spec.granularity.param_shape((O, I)))
    assert q.params.scale.dtype == torch.float32
    assert q.bits_per_weight == _solve(Nearest(), w, spec, _gram()).q.bits_per_weight
    error_db = 10 * math.log10((w**2).sum() / ((w - _values(solution, torch.float32)) ** 2).sum())
    assert error_db > 5


@pytest.mark.parametrize(("solver", "spec"), solved(SOLVERS, SPECS), ids=_name)
def test_parameters_are_as_stored(solver, spec):
    q = _solve(solver, _weight().float(), spec, _gram().float()).q
    stored = spec.as_stored(q.params, spec.granularity.param_shape((O, I))[1])
    assert all((p is None and s is None) or torch.equal(p, s) for p, s in zip(q.params, stored))


@pytest.mark.parametrize("solver", SOLVERS, ids=_name)
def test_solvers_change_nothing_that_they_were_given(solver):
    w, h = _weight().float(), _gram().float()
    h[3], h[:, 3] = 0, 0
    before = w.clone(), h.clone()
    _solve(solver, w, GROUPED, h)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


@pytest.mark.parametrize("solver", SOLVERS, ids=_name)
def test_two_runs_give_the_same_solution(solver):
    w, h = _weight().float(), _gram().float()
    assert _same(_solve(solver, w, GROUPED, h).q, _solve(solver, w, GROUPED, h).q)


@pytest.mark.parametrize("spec", [GROUPED, CHANNEL], ids=_name)
@pytest.mark.parametrize("solver", SOLVERS, ids=_name)
def test_rows_are_solved_independently(solver, spec):
    w, h = _weight(), _gram()
    some = torch.tensor([1, 4, 17])
    assert torch.equal(_solve(solver, w, spec, h).q.codes[some], _solve(solver, w[some], spec, h).q.codes)


@pytest.mark.parametrize("spec", [GROUPED, CHANNEL, Spec(NF4, PerGroup(16), scale_dtype="float32")], ids=_name)
@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.fit == MinMax()], ids=_name)
def test_weights_on_their_grid_are_a_fixed_point(solver, spec):
    h = _gram()
    if solver == Gptq(order="act") and spec != CHANNEL:
        h = h + torch.diag(torch.arange(I, 0, -1).double() * 10 * h.diagonal().max())  # the order is the present one
    w = _values(_solve(Nearest(), _weight(), spec, h))
    solution = _solve(solver, w, spec, h)
    torch.testing.assert_close(_values(solution), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=_name)
def test_solvers_are_plain_data_and_back(solver):
    assert from_dict(json.loads(json.dumps(to_dict(solver)))) == solver


@pytest.mark.parametrize("solver", [Nearest(), Gptq()], ids=_name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(solver, bad):
    w = _weight()
    w[2, 3] = bad
    with pytest.raises(ValueError, match="cannot quantize 1 "):
        _solve(solver, w, GROUPED, _gram())


def test_nearest_needs_nothing_and_the_column_solver_the_gram_matrix():
    assert Nearest().needs == frozenset()
    assert Gptq().needs == frozenset({Gram(), Tokens()})


def _of_few_directions(tokens: int, seed: int) -> Tensor:
    """Inputs that four directions explain, nearly."""
    g, mix = _generator(seed), torch.randn(4, I, generator=_generator(9), dtype=torch.float64)
    noise = torch.randn(tokens, I, generator=g, dtype=torch.float64)
    return torch.randn(tokens, 4, generator=g, dtype=torch.float64) @ mix + 0.3 * noise


def _independent(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, I, generator=_generator(seed), dtype=torch.float64)


def _seldom_active(tokens: int, seed: int) -> Tensor:
    return (_independent(tokens, seed) - 1).relu()


@pytest.mark.parametrize("inputs", [_independent, _of_few_directions, _seldom_active])
@pytest.mark.parametrize("share", [1 / 16, 1 / 4, 1 / 2, 15 / 16])
def test_few_tokens_make_no_solver_worse_than_rounding_to_nearest_on_others(inputs, share):
    unseen = inputs(2000, seed=99)
    h_unseen, lost, nearest, believing = unseen.T @ unseen, 0.0, 0.0, 0.0
    for seed in range(6):
        x_TI, w_OI = inputs(max(1, int(share * I)), seed), _weight(64, seed=seed)
        for solver in (Gptq(fit=ClipSearch(steps=20), order="group", greedy_passes=2), Gptq()):
            solution = solver.solve(w_OI, GROUPED, {Gram(): x_TI.T @ x_TI, Tokens(): torch.tensor([len(x_TI)])})
            assert solution.notes[0] == FEW_TOKENS
            lost += _loss(w_OI, solution, h_unseen)
            nearest += _loss(w_OI, _solve(Nearest(solver.fit), w_OI, GROUPED, h_unseen), h_unseen)
            believing += _loss(w_OI, _solve(solver, w_OI, GROUPED, x_TI.T @ x_TI), h_unseen)
    assert lost < 1.005 * nearest
    assert lost < believing if inputs is not _of_few_directions else lost < 0.98 * nearest


def test_as_many_tokens_as_channels_are_believed_to_the_bit():
    x_TI = _inputs(tokens=I)
    stats = {Gram(): x_TI.T @ x_TI}
    counted = Gptq().solve(_weight(), GROUPED, {**stats, Tokens(): torch.tensor([I])})
    assert torch.equal(counted.q.codes, Gptq().solve(_weight(), GROUPED, stats).q.codes) and not counted.notes


# ------------------------------------------------------------------------------------------- a range chosen earlier


@pytest.mark.parametrize("spec", [GROUPED, CHANNEL, Spec(Int(4), Block(8, 16), scale_dtype="float32")], ids=_name)
@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != Gptq(order="act")], ids=_name)
def test_the_shares_of_a_chosen_range_are_honoured(solver, spec):
    w, h = _weight(), torch.eye(I, dtype=torch.float64)
    granules = math.prod(spec.granularity.param_shape((O, I)))
    shares = torch.rand(2, granules, 1, generator=_generator(5), dtype=torch.float64) * 0.5 + 0.4
    clip = Clipped(shares[0], shares[1])
    solution = _solve(solver, w, spec, h, clip)
    # With uncorrelated inputs no weight moves before its range is asked, so the ranges are known.
    expected = spec.as_stored(clip(spec.granularity.split(w), spec.grid), spec.granularity.param_shape((O, I))[1])
    assert all(torch.equal(a, b) for a, b in zip(solution.q.params, expected))
    assert not torch.equal(solution.q.params.scale, _solve(solver, w, spec, h).q.params.scale)


def test_act_order_that_forms_new_groups_refuses_a_range_chosen_for_the_old_ones():
    granules = math.prod(GROUPED.granularity.param_shape((O, I)))
    clip = Clipped(torch.ones(granules, 1), torch.ones(granules, 1))
    with pytest.raises(ValueError, match="static_groups=true, order='group'"):
        _solve(Gptq(order="act"), _weight(), GROUPED, _gram(), clip)
    _solve(Gptq(order="act"), _weight(), CHANNEL, _gram(), Clipped(torch.ones(O, 1), torch.ones(O, 1)))


# ------------------------------------------------------------------------------------------------ the column solver


def test_the_two_bit_example_worked_by_hand():
    w = torch.tensor([[0.9, -0.4, 0.25, 0.1], [-0.7, 0.33, 0.05, 0.6]], dtype=torch.float64)
    rows = [[1, 2, 0, 1], [0, 1, 1, -1], [2, 1, 0, 0.5], [1, 0, -1, 1], [0.5, -1, 2, 0]]
    x = torch.tensor(rows, dtype=torch.float64)
    h = 2 / 5 * x.T @ x
    spec = Spec(Int(2), PerChannel(), scale_dtype="float32")
    U, notes = inverse_factor(h, 0.01)
    expected = torch.tensor([1.074994, -0.366591, -0.409538, -1.056838], dtype=torch.float64)
    torch.testing.assert_close(U[0], expected, rtol=0, atol=1e-6)
    assert notes == ()
    nearest, solved = _solve(Nearest(), w, spec, h), _solve(Gptq(), w, spec, h)
    assert solved.q.params.scale.flatten().tolist() == pytest.approx([0.433333, 0.433333], abs=1e-6)
    assert solved.q.params.zero.flatten().tolist() == [1, 2]
    assert nearest.q.codes.tolist() == [[3, 0, 2, 1], [0, 3, 2, 3]]
    assert solved.q.codes.tolist() == [[3, 0, 2, 2], [0, 3, 2, 3]]
    assert _loss(w, nearest, _damped(h)) == pytest.approx(0.281498, abs=1e-6)
    assert _loss(w, solved, _damped(h)) == pytest.approx(0.236106, abs=1e-6)


@pytest.mark.parametrize(("solver", "spec"), solved(COLUMN_SOLVERS, SPECS), ids=_name)
def test_uncorrelated_equal_inputs_give_exactly_round_to_nearest(solver, spec):
    w, h = _weight(), 4.0 * torch.eye(I, dtype=torch.float64)
    assert _same(_solve(solver, w, spec, h).q, _solve(Nearest(solver.fit), w, spec, h).q)


@pytest.mark.parametrize(("solver", "spec"), solved([s for s in COLUMN_SOLVERS if s.fit == MinMax()], SPECS), ids=_name)
def test_the_column_solver_beats_nearest_on_correlated_inputs(solver, spec):
    solved = nearest = 0.0
    for seed in range(3):
        w, h = _weight(seed=seed), _gram(seed=seed + 10)
        solved += _loss(w, _solve(solver, w, spec, h), h)
        nearest += _loss(w, _solve(Nearest(), w, spec, h), h)
    assert solved < 0.75 * nearest


def test_the_sum_of_squared_scaled_errors_is_the_loss():
    # tr((Q - W) H (Q - W)^T) = sum e^2, e = (w - q) / U_jj: checked through LDLQ's form of the same recursion.
    w, h = _weight(), _gram()
    solution = _solve(Gptq(damp=0.0), w, CHANNEL, h)
    U, _ = inverse_factor(h, 0.0)
    e_OI = (w - _values(solution)) @ torch.linalg.inv(U)
    assert (e_OI**2).sum().item() == pytest.approx(_loss(w, solution, h), rel=1e-9)


def test_the_recursion_is_ldlq_bit_for_bit():
    w, h = _weight(), _gram()
    solution = _solve(Gptq(), w, CHANNEL, h)
    R = torch.linalg.cholesky(_damped(h).flip(0, 1)).flip(0, 1)  # H = R R^T, R upper
    feedback = R / R.diagonal() - torch.eye(I, dtype=torch.float64)
    params, q = solution.q.params, torch.zeros_like(w)
    for j in range(I):
        target = w[:, j] + (w[:, :j] - q[:, :j]) @ feedback[:j, j]
        q[:, [j]] = Int(3).decode(Int(3).encode(target[:, None], params), params)
    assert torch.equal(q, _values(solution))


@pytest.mark.parametrize("solver", [s for s in COLUMN_SOLVERS if not s.stale_groups], ids=_name)
@pytest.mark.parametrize("spec", [GROUPED, CHANNEL, Spec(Int(4), Block(3, 9))], ids=_name)
def test_the_block_size_changes_no_code(solver, spec):
    w, h = _weight(), _gram()
    reference = _solve(solver, w, spec, h).q
    for block in (1, 5, 16, 23, 1000):
        other = _solve(replace(solver, block=block), w, spec, h).q
        assert torch.equal(reference.codes, other.codes)
        torch.testing.assert_close(reference.params.scale, other.params.scale, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", COLUMN_SOLVERS, ids=_name)
def test_the_scale_of_the_gram_matrix_changes_nothing(solver):
    w, h = _weight(), _gram()
    h[7], h[:, 7] = 0, 0  # a dead channel among them
    for scale in (2.0**-20, 2.0**20):
        assert _same(_solve(solver, w, GROUPED, h).q, _solve(solver, w, GROUPED, h * scale).q)


@pytest.mark.parametrize("solver", COLUMN_SOLVERS, ids=_name)
def test_a_channel_that_was_never_active_gets_zero_weights_and_is_told(solver):
    w, h = _weight(), _gram()
    dead = [2, 33]
    h[dead], h[:, dead] = 0, 0
    solution = _solve(solver, w, GROUPED, h)
    assert (_values(solution)[:, dead] == 0).all()
    assert solution.notes == ("2 of 40 input channels were never active: weights set to zero",)


@pytest.mark.parametrize("order", ["act", "group"])
def test_an_order_by_a_constant_diagonal_is_no_reorder(order):
    h = _gram()
    h = h / h.diagonal().sqrt() / h.diagonal().sqrt()[:, None]
    h.diagonal().fill_(1.0)
    plain, ordered = _solve(Gptq(), _weight(), GROUPED, h), _solve(Gptq(order=order), _weight(), GROUPED, h)
    assert _same(plain.q, ordered.q) and ordered.pre == ()


def test_act_order_that_forms_new_groups_is_undone_by_the_layers_permutation():
    w, x = _weight(), _inputs()
    solution = _solve(Gptq(order="act"), w, GROUPED, x.T @ x)
    (permute,) = solution.pre
    assert permute.index.tolist() == (x**2).sum(0).argsort(descending=True).tolist()
    stored = GROUPED.granularity.join(
        Int(3).decode(GROUPED.granularity.split(solution.q.codes), solution.q.params), (O, I)
    )
    run, meant = linear(permute.forward(x), stored), linear(x, _values(solution))
    torch.testing.assert_close(run, meant, rtol=1e-9, atol=1e-9)
    assert ((run - linear(x, w)) ** 2).sum() < 0.15 * (linear(x, w) ** 2).sum()


@pytest.mark.parametrize(
    "solver",
    [Gptq(order="act", static_groups=True), Gptq(order="group"), Gptq(order="group", static_groups=True)],
    ids=_name,
)
def test_orders_that_keep_the_groups_cost_nothing_at_run_time(solver):
    assert _solve(solver, _weight(), GROUPED, _gram()).pre == ()
    assert _solve(Gptq(order="act"), _weight(), CHANNEL, _gram()).pre == ()


@pytest.mark.parametrize("order", ["act", "group"])
def test_ordering_by_the_diagonal_helps_where_channels_differ(order):
    plain = ordered = 0.0
    for seed in range(6):
        w, h = _weight(64, 128, seed=seed), _gram(columns=128, tokens=400, seed=seed + 20)
        spec = Spec(Int(3), PerGroup(32))
        plain += _loss(w, _solve(Gptq(), w, spec, h), h)
        ordered += _loss(w, _solve(Gptq(order=order), w, spec, h), h)
    assert ordered < 0.95 * plain


def test_live_groups_beat_stale_ones_on_average():
    live = stale = 0.0
    for seed in range(5):
        w, h = _weight(64, 256, seed=seed), _gram(columns=256, tokens=600, seed=seed + 30)
        spec = Spec(Int(3), PerGroup(16))
        live += _loss(w, _solve(Gptq(), w, spec, h), h)
        stale += _loss(w, _solve(Gptq(stale_groups=True), w, spec, h), h)
    assert live < 0.99 * stale


def test_a_searched_range_respects_the_channel_that_matters():
    # One input channel is a hundred times the others, and its weights are the largest: clipping them is ruinous.
    x, w = _inputs(), _weight()
    x[:, 5] *= 100
    w[:, 5] *= 4
    h = x.T @ x
    searched, plain = Gptq(ClipSearch()), Gptq()
    assert _loss(w, _solve(searched, w, CHANNEL, h), h) < _loss(w, _solve(plain, w, CHANNEL, h), h)


def test_error_feedback_sees_the_scales_as_stored():
    coarse = Spec(Int(4, symmetric=True), PerGroup(8), Spec(Int(3), PerGroup(8)))
    told = untold = 0.0
    for seed in range(5):
        w, h = _weight(seed=seed), _gram(seed=seed + 40)
        told += _loss(w, _solve(Gptq(), w, coarse, h), h)
        free = _solve(Gptq(), w, Spec(Int(4, symmetric=True), PerGroup(8)), h).q
        late = QTensor(free.codes, coarse.as_stored(free.params, 5), coarse)
        untold += _loss(w, Solution(late), h)
    assert told < 0.7 * untold


def test_groups_whose_scales_are_quantized_together_are_placed_together():
    spec = Spec(Int(4), PerGroup(8), Spec(Int(8), PerTensor()))
    for order in ("none", "group"):
        found = _solve(Gptq(order=order), _weight(), spec, _gram()).q
        static = _solve(Gptq(order=order, static_groups=True), _weight(), spec, _gram()).q
        assert torch.equal(found.codes, static.codes) and torch.equal(found.params.scale, static.params.scale)
    with pytest.raises(ValueError, match="spans several groups"):
        _solve(Gptq(order="act"), _weight(), spec, _gram())


@pytest.mark.parametrize("solver", COLUMN_SOLVERS, ids=_name)
def test_float32_and_float64_agree_to_a_few_codes(solver):
    w, h = _weight(), _gram()
    single, double = _solve(solver, w.float(), GROUPED, h.float()), _solve(solver, w, GROUPED, h)
    assert (single.q.codes != double.q.codes).float().mean() < 0.01


def test_per_token_weights_and_wrong_gram_shapes_are_refused():
    with pytest.raises(ValueError, match=r"PerToken\(\) is for activations"):
        _solve(Gptq(), _weight(), Spec(Int(4), PerToken()), _gram())
    with pytest.raises(ValueError, match=r"40 input channels needs a square Gram matrix, found \[39, 39\]"):
        _solve(Gptq(), _weight(), CHANNEL, _gram(columns=39))


@pytest.mark.parametrize(
    "options", [{"order": "rows"}, {"damp": -1}, {"block": 0}, {"static_groups": True, "stale_groups": True}], ids=_name
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError):
        Gptq(**options)


def test_static_groups_store_scales_of_all_groups_together():
    spec = Spec(Int(4), PerGroup(8), Spec(Int(4), PerTensor()))
    solution = _solve(Gptq(static_groups=True), _weight(), spec, 4.0 * torch.eye(I, dtype=torch.float64))
    assert _same(solution.q, _solve(Nearest(), _weight(), spec, _gram()).q)
    centred = replace(spec, stats=Spec(Int(8), PerGroup(4)), stats_centred=True)
    with pytest.raises(ValueError, match="centred"):
        _solve(Gptq(order="act"), _weight(), centred, _gram())


def test_columns_can_be_ordered_by_what_rounding_them_loses():
    w = _weight()
    w[:, 9] = 0.001  # costs nothing, whatever its diagonal
    h = _gram() + 1e6 * torch.eye(I, dtype=torch.float64)[9].outer(torch.eye(I, dtype=torch.float64)[9])
    by_diagonal, by_loss = Gptq(order="act"), Gptq(order="act", rank="perturbation")
    assert _solve(by_diagonal, w, GROUPED, h).pre[0].index[0] == 9
    assert _solve(by_loss, w, GROUPED, h).pre[0].index[0] != 9
    assert _solve(by_loss, w, CHANNEL, h).pre == ()


# ------------------------------------------------------------------------------------------------------ greedy passes


@pytest.mark.parametrize("spec", SPECS, ids=_name)
@pytest.mark.parametrize("order", ["none", "act", "group"])
def test_no_greedy_pass_raises_the_loss(order, spec):
    w, h = _weight(), _gram()
    losses = []
    for passes in range(5):
        solution = _solve(Gptq(order=order, greedy_passes=passes), w, spec, h)
        losses.append(_loss(w, solution, _damped(h)))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(losses))
    assert losses[-1] < losses[0]


def test_greedy_passes_from_clipped_codes_fall_where_the_reference_form_rises():
    # 2 bits, a narrow common grid: many codes are clipped. The reference updates its state before it clips.
    h = _gram()
    solution = _solve(Gptq(damp=0.0), _weight(), Spec(Int(2), PerTensor(), scale_dtype="float32"), h)
    scale, zero = (p.item() for p in solution.q.params)
    w, scale = _weight(), scale / 2.5
    start = ((w / scale).round() + zero).clamp(0, 3)

    def loss(codes: Tensor) -> float:
        d = (codes - zero) * scale - w
        return ((d @ h) * d).sum().item()

    reference, ours = start.clone(), [loss(start)]
    losses = [loss(start)]
    for _ in range(3):
        S = (reference - zero) * scale - w
        for j in range(I):
            best = ((S[:, j] + w[:, j] - S @ h[:, j] / h[j, j]) / scale + zero).round()
            S[:, j] = (best - zero) * scale - w[:, j]
            reference[:, j] = best
        reference = reference.clamp(0, 3)
        losses.append(loss(reference))
    params = Affine(torch.full((O, 1), scale, dtype=torch.float64), torch.full((O, 1), zero, dtype=torch.float64))
    for passes in (1, 2, 3):
        codes = start.T.to(torch.uint8).contiguous()
        given = SimpleNamespace(spec=SimpleNamespace(grid=Int(2)), of_rows=lambda band: params)
        descend(codes, w.T.contiguous(), h, 0.0, [0] * len(h), given, None, passes)
        ours.append(loss(codes.T.double()))
    assert all(b <= a for a, b in pairwise(ours))
    assert ours[3] < min(losses)


def test_greedy_passes_stop_at_a_fixed_point():
    w, h = _weight(), _gram()
    many = _solve(Gptq(greedy_passes=50), w, CHANNEL, h)
    assert _same(many.q, _solve(Gptq(greedy_passes=1000), w, CHANNEL, h).q)
    assert _same(_solve(Gptq(greedy_passes=3), w, CHANNEL, torch.eye(I).double()).q, _solve(Nearest(), w, CHANNEL, h).q)


# ------------------------------------------------------------------------------------- inputs that earlier blocks moved


def _moved() -> tuple[Tensor, Tensor, dict]:
    """Original inputs, what the quantized blocks make of them, and the two statistics."""
    x = _inputs()
    g = _generator(8)
    seen = x + x @ (0.1 * torch.randn(I, I, generator=g, dtype=torch.float64))
    seen += 0.5 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return x, seen, {Gram(): seen.T @ seen, CrossGram(): CrossGram().merge(torch.stack([seen, x])).double()}


def _missed(x: Tensor, seen: Tensor, w: Tensor, q: Tensor) -> float:
    return (seen @ q.T - x @ w.T).square().sum().item()


def test_inputs_that_did_not_move_need_no_correction():
    w, h = _weight(), _gram()
    stats = {Gram(): h, CrossGram(): torch.zeros(I, I, dtype=torch.float64)}
    plain = _solve(Gptq(order="act"), w, GROUPED, h)
    assert _same(Gptq(order="act", asymmetric=1.0).solve(w, GROUPED, stats).q, plain.q)
    assert Gptq(asymmetric=0.5).needs == {Gram(), CrossGram(), Tokens()}


def test_the_target_for_moved_inputs_approaches_the_original_output_with_its_share():
    x, seen, stats = _moved()
    w = _weight()
    U, _ = inverse_factor(stats[Gram()], 0.0)
    missed = [
        _missed(x, seen, w, asymmetric_target(w.T, stats[CrossGram()], U, share).T) for share in (0, 0.25, 0.5, 1.0)
    ]
    assert all(b < a for a, b in pairwise(missed))
    best = torch.linalg.lstsq(seen, x @ w.T).solution.T
    assert missed[-1] == pytest.approx(_missed(x, seen, w, best), rel=1e-3)


def _gptaq(w: Tensor, h: Tensor, d: Tensor, alpha: float, params, grid: Int) -> Tensor:
    """GPTAQ's recursion (arXiv:2504.02692) with w P in and across blocks, column by column."""
    U, _ = inverse_factor(h, 0.01)
    P = alpha * torch.triu(d @ U.T, 1) @ U
    w, q = w.clone(), torch.zeros_like(w)
    for j in range(I):
        q[:, [j]] = grid.decode(grid.encode(w[:, [j]], params), params)
        e = (w[:, j] - q[:, j]) / U[j, j]
        w[:, j + 1 :] += -e[:, None] * U[j, j + 1 :] + w[:, j, None] * P[j, j + 1 :]
    return q


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_aiming_at_the_original_output_beats_gptaqs_recursion_and_both_beat_gptq(share):
    x, seen, stats = _moved()
    missed = {"gptq": 0.0, "gptaq": 0.0, "ours": 0.0}
    for seed in range(3):
        w = _weight(seed=seed)
        plain = Gptq(static_groups=True).solve(w, CHANNEL, stats)
        ours = Gptq(static_groups=True, asymmetric=share).solve(w, CHANNEL, stats)
        gptaq = _gptaq(w, stats[Gram()], stats[CrossGram()], share, plain.q.params, Int(3))
        for name, q in (("gptq", _values(plain)), ("gptaq", gptaq), ("ours", _values(ours))):
            missed[name] += _missed(x, seen, w, q)
    assert missed["ours"] < missed["gptaq"] < missed["gptq"]


# ------------------------------------------------------------------------------------ Gram matrices that do not behave


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    h = _gram()
    U, notes = inverse_factor(h, 0.01)
    expected = torch.linalg.cholesky(torch.linalg.inv(_damped(h)), upper=True)
    torch.testing.assert_close(U, expected, rtol=1e-9, atol=1e-12)
    assert notes == ()


def test_a_singular_gram_matrix_is_solved_with_the_damping_it_was_asked():
    x = _inputs(tokens=5)
    solution = _solve(Gptq(), _weight(), GROUPED, x.T @ x)
    assert solution.notes == ()
    assert _loss(_weight(), solution, x.T @ x) < 0.1 * _loss(
        _weight(), _solve(Nearest(), _weight(), GROUPED, x.T @ x), x.T @ x
    )


def _indefinite(by: float) -> Tensor:
    """Unit diagonal and one eigenvalue of ``-by``."""
    h = torch.eye(I, dtype=torch.float64)
    h[0, 1] = h[1, 0] = 1 + by
    return h


@pytest.mark.parametrize(
    ("by", "note"),
    [
        (0.005, None),
        (0.025, "damping raised to 0.03"),
        (0.045, "damping raised to 0.05"),
        (0.0505, "damping raised to 0.05 and 1e-03 of the largest diagonal added"),
        (0.14, "damping raised to 0.05 and 1e-01 of the largest diagonal added"),
    ],
)
def test_damping_is_raised_until_the_matrix_is_positive_definite(by, note):
    solution = _solve(Gptq(), _weight(), GROUPED, _indefinite(by))
    assert solution.notes == (() if note is None else (f"Gram matrix not positive definite: {note}",))
    if note:
        assert not _same(solution.q, _solve(Nearest(), _weight(), GROUPED, _indefinite(by)).q)


@pytest.mark.parametrize(
    ("h", "note"),
    [
        (_indefinite(0.5), "Gram matrix not positive definite at any damping"),
        (torch.full((I, I), float("nan")), "NaN or Inf in the Gram matrix"),
        (torch.full((I, I), float("inf")), "NaN or Inf in the Gram matrix"),
        (torch.zeros(I, I), "all inputs were always zero"),
    ],
    ids=["indefinite", "nan", "inf", "zero"],
)
@pytest.mark.parametrize("solver", COLUMN_SOLVERS, ids=_name)
def test_a_hopeless_gram_matrix_gives_round_to_nearest_and_says_so(solver, h, note):
    solution = _solve(solver, _weight(), GROUPED, h)
    assert solution.notes == (note, "rounded to nearest")
    assert solution.pre == ()
    assert _same(solution.q, _solve(Nearest(solver.fit), _weight(), GROUPED, h).q)


# ------------------------------------------------------------------------------------------- tilings, orders, blocks


@pytest.mark.parametrize(
    ("granularity", "height", "band"),
    [
        (PerTensor(), 4, [0, 0, 0, 0, 0, 0]),
        (PerChannel(), 1, [0, 0, 0, 0, 0, 0]),
        (PerGroup(4), 1, [0, 0, 0, 0, 1, 1]),
        (Block(3, 2), 3, [0, 0, 1, 1, 2, 2]),
        (Block(9, 9), 4, [0, 0, 0, 0, 0, 0]),
        (PerCluster((1, 3, 2)), 4, [0, 1, 1, 1, 2, 2]),
        (RowBands(3), 2, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_granularity_is_a_tiling_of_the_weight(granularity, height, band):
    tiling = Tiling.of(granularity, torch.zeros(4, 6))
    assert (tiling.height, tiling.band_I.tolist()) == (height, band)


def test_columns_are_ordered_inside_groups_and_groups_by_their_maximum():
    diag = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 3.0, 5.0])
    band = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert by_band_and_score(diag, band).tolist() == [3, 4, 1, 2, 0, 6, 5]


@pytest.mark.parametrize("widths", [[64] * 9, [40, 40, 40, 7], [300, 5, 128, 1], [1], [1000]], ids=_name)
def test_no_run_that_fits_is_cut_by_a_block(widths):
    blocks = lazy_blocks(widths, 128)
    assert [i for a, b in blocks for i in range(a, b)] == list(range(sum(widths)))
    assert all(0 < b - a <= 128 for a, b in blocks)
    start = 0
    for width in widths:
        (block,) = [(a, b) for a, b in blocks if a <= start < b]
        assert start + width <= block[1] or start == block[0]
        start += width
