"""What solvers allocate, counted by torch's profiler: a process's size is too noisy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lowbit.numerics import CrossGram, Gram, Int, PerGroup, Spec, Tokens
from lowbit.solve import Gptq, LeaveOneOut, Nearest, WeakColumns, factor
from lowbit.solve.columns import Tiling
from lowbit.solve.factor import factor_bytes, inverse_factor

I, O = 1024, 768
MATRIX, WEIGHT = 4 * I * I, 4 * O * I
SPEC = Spec(Int(4), PerGroup(128))


def peak(work: Callable[[], Any]) -> int:
    """The most bytes that ``work`` has allocated at once on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        largest = max(largest, now)
    del result
    return largest


@pytest.fixture(scope="module")
def stats():
    torch.manual_seed(0)
    x = torch.randn(1200, I)
    both = torch.stack([x, x + 0.1 * torch.randn_like(x)])
    return {Gram(): Gram().merge(x), Tokens(): Tokens().merge(x), CrossGram(): CrossGram().merge(both)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_factorization_allocates_one_matrix_and_strips(stats, dtype, monkeypatch):
    if dtype == torch.float32:
        monkeypatch.setattr(factor, "_FLOAT64_UP_TO", I - 1)
    order = torch.randperm(I)
    used = peak(lambda: inverse_factor(stats[Gram()], 0.01, order_I=order, dtype=torch.float32))
    assert used <= factor_bytes(I) * 1.05
    assert factor_bytes(I) < 1.6 * dtype.itemsize * I * I


def test_a_tiling_keeps_nothing_of_the_size_of_a_weight():
    w = torch.zeros(O, I)
    assert peak(lambda: Tiling.of(PerGroup(128), w)) < 1.5 * WEIGHT
    tiling = Tiling.of(PerGroup(128), w)
    assert tiling.band_I.untyped_storage().nbytes() == 8 * I


@pytest.mark.parametrize(
    "solver",
    [
        Nearest(),
        Gptq(),
        Gptq(order="act"),
        Gptq(static_groups=True),
        Gptq(greedy_passes=1),
        Gptq(asymmetric=0.5),
        Gptq(outliers=WeakColumns(count=4), rank="perturbation", order="group"),
        Gptq(outliers=LeaveOneOut(simplified=True)),
    ],
    ids=str,
)
def test_a_solver_allocates_about_what_it_says(stats, solver):
    w = torch.randn(O, I)
    used = peak(lambda: solver.solve(w, SPEC, stats))
    assert 0.75 < used / solver.memory(O, I) < 1.05
