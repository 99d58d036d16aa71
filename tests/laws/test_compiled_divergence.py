"""The law of compiled comparisons of logits: every instruction set of this CPU gives what double precision gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit import compiled
from lowbit.numerics.compiled_divergence import Compared, compare
from lowbit.numerics.divergence import kl_and_agreement, score_tokens
from lowbit.training.objectives import divergence

SETS = compiled.instruction_sets()

pytestmark = pytest.mark.skipif(not SETS, reason="lowbit was installed without its compiled kernels")


@pytest.fixture(params=SETS)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("LOWBIT_KERNELS", request.param)
    return request.param


def logits(tokens: int, vocabulary: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    p = spread * torch.randn(tokens, vocabulary, generator=generator)
    return p, p + 0.1 * spread * torch.randn(tokens, vocabulary, generator=generator)


def compared(p_NV: Tensor, q_NV: Tensor, *more) -> Compared:
    found = compare(p_NV, q_NV, *more)
    assert found is not None
    return found


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("shape", [(3, 1), (4, 15), (5, 16), (2, 515), (7, 5000)], ids=str)
def test_comparisons_are_those_of_double_precision(isa, shape, spread):
    p, q = logits(*shape, spread)
    found, logp, logq = compared(p, q), p.double().log_softmax(-1), q.double().log_softmax(-1)
    near = {"rtol": 2e-6, "atol": 2e-6 * spread}
    torch.testing.assert_close(found.kl, (logp.exp() * (logp - logq)).sum(-1), **near)
    torch.testing.assert_close(found.reverse_kl, (logq.exp() * (logq - logp)).sum(-1), **near)
    torch.testing.assert_close(found.log_p, p.double().logsumexp(-1), **near)
    torch.testing.assert_close(found.log_q, q.double().logsumexp(-1), **near)
    assert torch.equal(found.agree, p.argmax(-1) == q.argmax(-1))


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_divergence_is_that_of_double_precision(isa, reverse, dtype):
    p, q = (x.to(dtype) for x in logits(6, 1001))
    ours, exact = q.clone().requires_grad_(), q.double().requires_grad_()
    value = divergence(ours, p, reverse)
    logp, logq = p.double().log_softmax(-1), exact.log_softmax(-1)
    forward, back = ((a.exp() * (a - b)).sum(-1) for a, b in ((logp, logq), (logq, logp)))
    right = ((1 - reverse) * forward + reverse * back).mean()
    value.backward(), right.backward()
    assert value.item() == pytest.approx(right.item(), rel=2e-6) and ours.grad is not None and exact.grad is not None
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=rounding, atol=1e-9)


def test_a_model_is_at_no_distance_from_itself(isa):
    p, _ = logits(9, 777, 20.0)
    kl, agree = kl_and_agreement(p, p.clone())
    assert kl.tolist() == [0.0] * 9 and agree.all()


def test_values_that_are_no_numbers_and_tokens_that_are_excluded_count_as_in_torch(isa, monkeypatch):
    p, q = (x.repeat(6, 1) for x in logits(1, 300))
    p[0, 7] = torch.nan
    q[1, 299] = torch.nan
    p[2, 5] = torch.inf
    p[3, :100] = -torch.inf  # excluded by the original alone
    p[4, :100] = q[4, :100] = -torch.inf
    q[5, p[5].argmax()] = -torch.inf  # and by the model alone
    targets = torch.full((6,), 200)
    ours = score_tokens(q, targets, p)
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    theirs = score_tokens(q, targets, p)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ours.kl is not None and ours.kl[:3].isnan().all() and ours.kl[5] == math.inf


def test_of_several_largest_logits_the_first_counts(isa):
    p, q = torch.zeros(2, 1, 700)
    assert compared(p, q).agree.item()
    p[0, 600] = q[0, 600] = p[0, 650] = 1.0
    assert compared(p, q).agree.item()
    q[0, 40] = 1.0
    assert not compared(p, q).agree.item()


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_comparison(isa, threads, monkeypatch):
    p, q = logits(37, 4000)
    alone, others = torch.empty_like(q), torch.empty_like(q)
    right = compared(p, q, 0.3, alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for a, b in zip(compared(p, q, 0.3, others), right, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(alone, others)


def test_other_numbers_than_float32_are_left_to_torch():
    p, q = logits(2, 30)
    assert compare(p.double(), q.double()) is None
    assert compare(p[:0], q[:0]) is None
