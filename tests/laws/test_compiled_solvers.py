"""The law of the compiled fits and solvers: every instruction set of this CPU does what torch does.

Where arithmetic is exact, results are equal. Elsewhere the last bits of sums and powers differ: a chosen range then loses
at most 1e-5 more than torch's, 99.9 % of a solver's codes are torch's, and its loss differs by at most 1e-3.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowbit import compiled
from lowbit.numerics import (
    NF4,
    Alternating,
    BinaryCoded,
    ClipSearch,
    Codebook,
    Float,
    Gram,
    Int,
    KMeans,
    MinMax,
    Normal,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    RangeSearch,
    RmsRange,
    Spec,
    Table,
    Tokens,
    TruncationSearch,
    extremes,
)
from lowbit.solve import Gptq, LeaveOneOut, RangeOutliers, Solution, WeakColumns
from lowbit.solve.columns import lazy_blocks
from lowbit.solve.kept import Kept
from lowbit.solve.recursion import descend, recursion

SETS = compiled.instruction_sets()
INTS = [Int(b, symmetric=s, zero=z) for b in range(1, 9) for s, z in ((True, "int"), (False, "int"), (False, "real"))]
INTS += [Int(4, symmetric=True, full=True), Int(3, reach=0.9)]
LISTED = [
    NF4,
    Table((-3.0, 1.0, 0.0, 2.0, 2.0)),
    Table((-3.0, -1.0, 0.5, 2.0), signed=True),
    Float(2, 1),
    Float(3, 1),
    Float(2, 1, shared_exponent=True),
    Normal(1),
]
LISTED += [Normal(3), Normal(5)]
LONG = [Float(4, 3, "fn"), Float(5, 2, "ieee"), Normal(8)]  # more levels than a search compares
FITS = [
    ClipSearch(),
    ClipSearch(steps=20, norm=2.0),
    ClipSearch(steps=10, norm=0.7),
    TruncationSearch(steps=6),
    RangeSearch(),
]

pytestmark = pytest.mark.skipif(not SETS, reason="lowbit was installed without its compiled kernels")


@pytest.fixture(params=SETS)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("LOWBIT_KERNELS", request.param)
    return request.param


def by_torch(monkeypatch, call, *args, **options):
    """``call`` without compiled code."""
    with monkeypatch.context() as patch:
        patch.setenv("LOWBIT_KERNELS", "reference")
        return call(*args, **options)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lost(x_GK: Tensor, grid, params, norm: float, importance_GK: Tensor | None) -> Tensor:
    power = (grid.decode(grid.encode(x_GK, params), params) - x_GK).double().abs().pow(norm)
    return (power if importance_GK is None else power * importance_GK).sum(1)


# Searches


def importances(kind: str, x_GK: Tensor) -> Tensor | None:
    if kind == "none":
        return None
    every = torch.rand(x_GK.shape, generator=torch.Generator().manual_seed(5))
    every[:, -3:] = 0  # as the filling of a short granule
    return every if kind == "each" else every[:1].expand_as(x_GK)


@pytest.mark.parametrize("fit", FITS, ids=str)
@pytest.mark.parametrize("grid", INTS + LISTED, ids=str)
def test_a_search_loses_no_more_than_in_torch(isa, grid, fit, monkeypatch):
    if isinstance(fit, TruncationSearch) and grid.bits > 4:
        fit = TruncationSearch(steps=2)
    x = random(24, 37) * torch.logspace(-9, 3, 24)[:, None]
    for kind in ("none", "each", "shared"):
        importance = importances(kind, x)
        norm = getattr(fit, "norm", 2.0)
        ours = lost(x, grid, fit(x, grid, importance), norm, importance)
        theirs = lost(x, grid, by_torch(monkeypatch, fit, x, grid, importance), norm, importance)
        assert (ours <= theirs * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "grid", [Int(1), Int(4, True, full=True), Table((-2, -1, 0, 1, 2)), Table((-4, 1, 0))], ids=str
)
def test_of_exact_losses_the_first_least_is_chosen(isa, grid, monkeypatch):
    """Values are whole and steps are multiples of a power of two, so no loss rounds, and many candidates tie."""
    x = torch.randint(-8, 9, (64, 12), generator=torch.Generator().manual_seed(1)).float()
    x[0], x[1] = 0, 4
    for fit in (
        ClipSearch(steps=8, norm=2.0),
        TruncationSearch(steps=4, norm=2.0),
        RangeSearch("absmax", 0.25, 2.25, 0.25),
    ):
        for ours, theirs in zip(fit(x, grid), by_torch(monkeypatch, fit, x, grid), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_granule_with_a_value_that_is_not_finite_falls_back_as_in_torch(isa, bad, monkeypatch):
    x = random(4, 16)
    x[1, 3] = bad
    ours, theirs = ClipSearch()(x, Int(4)), by_torch(monkeypatch, ClipSearch(), x, Int(4))
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=0, atol=0, equal_nan=True)


def test_one_granule_of_a_whole_tensor_and_long_sums_stay_exact_enough(isa, monkeypatch):
    x = random(1, 200_000)
    fit = ClipSearch(steps=16)
    ours, theirs = fit(x, Int(3)), by_torch(monkeypatch, fit, x, Int(3))
    assert lost(x, Int(3), ours, 2.4, None) <= lost(x, Int(3), theirs, 2.4, None) * (1 + 1e-5)


# Solvers


def problem(rows: int = 150, columns: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    x_TI = random(3 * columns, columns, seed=1) @ random(columns, columns, seed=2)
    return random(rows, columns), x_TI.T @ x_TI / 1000


def values(solution: Solution) -> Tensor:
    w_OI = solution.q.dequantize()
    for term in solution.side:
        w_OI += term.dense(tuple(w_OI.shape))
    for transform in reversed(solution.pre):
        w_OI = w_OI[:, transform.index.argsort()]
    return w_OI


def loss(w_OI: Tensor, solution: Solution, h_II: Tensor) -> float:
    d_OI = (w_OI - values(solution)).double()
    return ((d_OI @ h_II.double()) * d_OI).sum().item()


def float32(grid, granularity) -> Spec:
    return Spec(grid, granularity, scale_dtype="float32")


SOLVES = [
    *((Gptq(), float32(grid, PerGroup(64))) for grid in INTS),
    *((Gptq(), Spec(grid, PerGroup(48))) for grid in (Int(4), Int(3, zero="real"), *LISTED, *LONG)),  # 200 = 4 x 48 + 8
    (Gptq(ClipSearch(steps=20)), Spec(Int(4), PerGroup(48))),
    (Gptq(TruncationSearch(steps=4)), Spec(Int(3), PerChannel())),
    (Gptq(KMeans()), Spec(Codebook(3), PerChannel())),
    (Gptq(KMeans()), Spec(Codebook(6), PerChannel())),
    (Gptq(Alternating(3)), Spec(BinaryCoded(3), PerGroup(64))),
    (Gptq(block=200), Spec(Int(4), PerChannel())),
    (Gptq(order="act"), Spec(Int(4), PerGroup(64))),
    (Gptq(order="act", static_groups=True), Spec(Int(4), PerGroup(64))),
    (Gptq(order="act", static_groups=True), Spec(NF4, PerGroup(64))),
    (Gptq(order="group"), Spec(Int(4, symmetric=True), PerGroup(64))),
    (Gptq(stale_groups=True), Spec(Int(4), PerGroup(48))),
    (Gptq(), Spec(Int(4), PerTensor())),
    (Gptq(), Spec(Int(4), PerCluster((60, 100, 40)))),
    (Gptq(RmsRange(), greedy_passes=3), Spec(Int(2, zero="real"), PerTensor())),
    (Gptq(greedy_passes=3), Spec(Float(2, 1), PerGroup(32))),
    (Gptq(outliers=WeakColumns(5), greedy_passes=2), Spec(Int(3), PerChannel())),
    (Gptq(outliers=RangeOutliers(0.01), greedy_passes=2), Spec(Int(3, zero="real"), PerGroup(64))),
    (Gptq(outliers=LeaveOneOut(0.5)), Spec(Int(3, zero="real"), PerGroup(16), Spec(Int(3, zero="real"), PerGroup(16)))),
    (Gptq(outliers=(WeakColumns(3), LeaveOneOut(0.5))), Spec(Int(3), PerGroup(50))),
    (Gptq(outliers=RangeOutliers(0.01)), Spec(NF4, PerGroup(64))),
    (Gptq(KMeans(), outliers=RangeOutliers(0.01)), Spec(Codebook(3), PerChannel())),
]


@pytest.mark.parametrize(("solver", "spec"), SOLVES, ids=str)
def test_a_solver_finds_the_codes_of_torch(isa, solver, spec, monkeypatch):
    w_OI, h_II = problem()
    stats = {Gram(): h_II}
    ours, theirs = solver.solve(w_OI, spec, stats), by_torch(monkeypatch, solver.solve, w_OI, spec, stats)
    assert loss(w_OI, ours, h_II) == pytest.approx(loss(w_OI, theirs, h_II), rel=1e-3)


@pytest.mark.parametrize("grid", [*INTS, *LISTED, *LONG], ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["all", "outliers"])
def test_a_recursion_on_given_grids_finds_the_codes_of_torch(isa, grid, kept, monkeypatch):
    """All rows are independent, so one tie that rounding moves changes its row only."""
    w_IO, u_II, params = _triangular(150, 200, grid)
    mask, first = random(200, 150, seed=6) > 2.3, w_IO[:48].T
    e_OK = (grid.decode(grid.encode(first, params[0]), params[0]) - first) / u_II.diagonal()[:48]
    watch = _Watch(e_OK.square().quantile(0.9).item())

    def solve() -> tuple[Tensor, Kept | None]:
        held = Kept(mask.clone(), torch.zeros_like(w_IO), 190, u_II.diagonal(), watch) if kept else None
        bands, blocks = _Given(grid, params), lazy_blocks([48, 48, 48, 46], 128)
        return recursion(
            w_IO.clone(), u_II, blocks, BAND, bands, lambda i, W: bands.placed.add(BAND[i]), False, held
        ), held

    (ours, our_kept), (theirs, their_kept) = solve(), by_torch(monkeypatch, solve)
    assert (ours[:190] == theirs[:190]).float().mean() > 0.999
    if our_kept is not None and their_kept is not None:
        assert (our_kept.mask == their_kept.mask).float().mean() > 0.999 and our_kept.mask.sum() > mask.sum()
        same = our_kept.mask & their_kept.mask
        torch.testing.assert_close(our_kept.value[same], their_kept.value[same], rtol=2e-3, atol=1e-4)
        assert torch.equal(our_kept.value.half().float(), our_kept.value)


class _Watch:
    def __init__(self, tau: float):
        self.tau = tau


BAND = [i // 48 for i in range(200)]


class _Given:
    """Bands with given parameters, which count as placed when the solver reaches them."""

    def __init__(self, grid, params: list):
        self.spec, self.params, self.placed = float32(grid, PerChannel()), params, set()

    def __contains__(self, band: int) -> bool:
        return band in self.placed

    def of_rows(self, band: int):
        return self.params[band]


def _triangular(rows: int, columns: int, grid) -> tuple[Tensor, Tensor, list]:
    """A weight ``[I, O]``, a factor, and grids for bands of 48 columns."""
    w_IO, u_II = random(columns, rows), random(columns, columns, seed=3).triu() * 0.03
    u_II.diagonal().copy_(torch.rand(columns, generator=torch.Generator().manual_seed(4)) + 0.5)
    return w_IO, u_II, [MinMax()(band.T.contiguous(), grid) for band in w_IO.split(48)]


@pytest.mark.parametrize("grid", [Int(3), Int(4, symmetric=True), Int(2, zero="real"), Float(2, 1), NF4], ids=str)
def test_exact_recursions_are_equal(isa, grid, monkeypatch):
    """Whole weights, a step of one, and factors of ones and halves: no sum rounds, so ties go the same way."""
    g = torch.Generator().manual_seed(7)
    w_IO = torch.randint(-6, 7, (70, 90), generator=g).float() / 2
    u_II = torch.randint(-1, 2, (70, 70), generator=g).float().triu(1) * (torch.rand(70, 70, generator=g) < 0.03) / 2
    u_II.diagonal().fill_(1)
    ends = torch.full((90, 1), 4.0)
    params = grid.from_range(-ends, ends)
    params = params._replace(scale=torch.ones_like(params.scale))

    def solve() -> Tensor:
        bands = _Given(grid, [params, params])
        bands.placed = {0, 1}
        every, band = [(0, 40), (40, 70)], [i % 3 % 2 for i in range(70)]  # as static groups in another order
        return recursion(w_IO.clone(), u_II, every, band, bands, lambda i, W: None, False, None)

    assert torch.equal(solve(), by_torch(monkeypatch, solve))


@pytest.mark.parametrize("grid", [Int(3), Int(2, zero="real"), Float(2, 1), Normal(2)], ids=str)
def test_compiled_descent_never_raises_the_loss_and_keeps_kept_weights(isa, grid):
    w_IO, _, params = _triangular(150, 200, grid)
    _, h_II = problem()
    mask = random(200, 150, seed=6) > 2.3
    kept = Kept(mask, torch.zeros_like(w_IO), 190, torch.ones(200), None)
    codes = torch.stack([grid.encode(w[:, None], params[i // 48])[:, 0] for i, w in enumerate(w_IO)])
    before, losses = codes.clone(), []
    damped = h_II.double() + 0.01 * h_II.double().diagonal().mean() * torch.eye(200)
    for _ in range(4):
        q = torch.stack([grid.decode(c[:, None], params[i // 48])[:, 0] for i, c in enumerate(codes)])
        s = (q - w_IO).double()
        losses.append((s * (damped @ s)).sum().item())
        descend(codes, w_IO, h_II, 0.01, BAND, _Given(grid, params), kept, 1)
    assert losses[0] > losses[1] and all(a >= b * (1 - 1e-6) for a, b in pairwise(losses))
    assert torch.equal(codes[mask], before[mask]) and torch.equal(codes[190:], before[190:])


@pytest.mark.parametrize(
    ("solver", "spec"),
    [
        (Gptq(ClipSearch(steps=20)), Spec(Int(4), PerGroup(64))),
        (Gptq(ClipSearch(steps=20)), Spec(Int(4), PerTensor())),
        (Gptq(RmsRange(), greedy_passes=2), Spec(Int(2, zero="real"), PerTensor())),
        (Gptq(outliers=LeaveOneOut(0.5)), Spec(Int(3), PerGroup(16))),
    ],
    ids=str,
)
def test_the_number_of_threads_does_not_change_a_result(isa, solver, spec):
    w_OI, h_II = problem(300, 260)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(solver.solve(w_OI, spec, {Gram(): h_II}))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.q.codes, found[0].q.codes) and torch.equal(values(other), values(found[0]))


# What compiled code leaves to torch


def test_float64_and_a_forced_reference_are_left_to_torch(monkeypatch):
    x = random(3, 4)
    monkeypatch.delenv("LOWBIT_KERNELS", raising=False)
    assert compiled.solver_set(x, None) == SETS[0] and compiled.solver_set(x, x.double()) is None
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    assert compiled.solver_set(x) is None
    monkeypatch.setenv("LOWBIT_KERNELS", "int8_torch")  # a kernel of products says nothing about solvers
    assert compiled.solver_set(x) == SETS[0]


def test_without_compiled_code_torch_solves(monkeypatch):
    w_OI, h_II = problem(20, 40)
    stats, solver, spec = {Gram(): h_II}, Gptq(ClipSearch(steps=20)), Spec(Int(4), PerGroup(16))
    wanted = by_torch(monkeypatch, solver.solve, w_OI, spec, stats)
    monkeypatch.setattr(compiled, "library", None)
    assert torch.equal(solver.solve(w_OI, spec, stats).q.codes, wanted.q.codes)


def test_few_tokens_and_a_dead_channel_change_nothing_of_this(isa, monkeypatch):
    w_OI, h_II = problem(30, 40)
    h_II[7], h_II[:, 7] = 0, 0
    for stats in ({Gram(): h_II}, {Gram(): h_II, Tokens(): torch.tensor(20)}):
        solver = replace(Gptq(ClipSearch(steps=20)), order="group")
        ours = solver.solve(w_OI, Spec(Int(4), PerGroup(16)), stats)
        theirs = by_torch(monkeypatch, solver.solve, w_OI, Spec(Int(4), PerGroup(16)), stats)
        assert ours.notes == theirs.notes and loss(w_OI, ours, h_II) == pytest.approx(
            loss(w_OI, theirs, h_II), rel=1e-3
        )


# Simulated quantization


def simulated(x_GK: Tensor, grid: Int, weight_GK: Tensor) -> tuple[Tensor, ...]:
    """Values on the grid of three quarters of each granule's range, and the gradients of ``x`` and of that share."""
    x, share = x_GK.clone().requires_grad_(), torch.full((len(x_GK), 1), 0.75, requires_grad=True)
    lo, hi = extremes(x)
    y = grid.fake(x, grid.from_range(lo * share, hi * share))
    of_x, of_share = torch.autograd.grad((y * weight_GK).sum(), (x, share))
    return lo.detach(), hi.detach(), y.detach(), of_x, of_share


@pytest.mark.parametrize("grid", INTS, ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (7, 15), (33, 64), (3, 1100)], ids=str)
def test_simulated_values_equal_those_of_torch_and_gradients_too_but_for_their_sums(isa, grid, shape, monkeypatch):
    x = random(*shape) * torch.logspace(-6, 3, shape[0])[:, None]
    x[0] = 0  # every value is extreme
    x[1, ::2] = x[1].amax()  # several are
    weight = random(*shape, seed=1)
    ours, theirs = simulated(x, grid, weight), by_torch(monkeypatch, simulated, x, grid, weight)
    for mine, right in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(mine, right)
    for mine, right in zip(ours[3:], theirs[3:], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5 * float(right.abs().amax()))


def test_simulated_quantization_keeps_nan_in_its_granule(isa):
    x = random(3, 20)
    x[1, 18] = torch.nan
    lo, hi = extremes(x)
    assert lo.isnan().flatten().tolist() == hi.isnan().flatten().tolist() == [False, True, False]
    y = Int(4).fake(x, Int(4).from_range(*extremes(x.nan_to_num())))
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 4000), (700, 130)], ids=str)
def test_the_number_of_threads_changes_no_simulated_value(isa, shape, threads, monkeypatch):
    x, weight = random(*shape), random(*shape, seed=1)
    alone = simulated(x, Int(4), weight)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        for mine, right in zip(simulated(x, Int(4), weight), alone, strict=True):
            assert torch.equal(mine, right)
