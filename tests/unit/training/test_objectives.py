"""Objectives: their values where these are known, and that each is least where the model is the original."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.numerics import from_dict, to_dict
from lowbit.training import (
    Answer,
    Batch,
    ConfidenceKL,
    HiddenStates,
    NextToken,
    OriginalKL,
    ReverseKL,
    Text,
    objectives,
)

TEACHER, STUDENT = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.5, 0.0, -0.5]])


def batch(student, teacher, ids=None, hidden=(), wanted=()) -> Batch:
    ids = torch.zeros(1, len(student), dtype=torch.int64) if ids is None else ids
    return Batch([0], ids, student[None], lambda i: Answer(teacher, wanted), hidden)


def random_logits(tokens: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 11, generator=torch.Generator().manual_seed(seed))


def test_divergences_have_the_values_that_double_precision_gives():
    """The values of the specification's appendix."""
    for objective, value in (
        (OriginalKL(), 0.244744), (ReverseKL(), 0.244922), (ConfidenceKL(0.7), 0.244868),
    ):  # fmt: skip
        assert objective.loss(batch(STUDENT, TEACHER)).item() == pytest.approx(value, abs=2e-6)


def test_the_coefficient_mixes_forward_and_reverse_divergence():
    made = batch(random_logits(), random_logits(seed=1))
    forward, reverse = OriginalKL().loss(made), ReverseKL().loss(made)
    assert ConfidenceKL(0.0).loss(made) == forward and ConfidenceKL(1.0).loss(made) == reverse
    assert forward > 0 and reverse > 0
    torch.testing.assert_close(ConfidenceKL(0.25).loss(made), 0.75 * forward + 0.25 * reverse)


@pytest.mark.parametrize("reverse", [0.0, 0.4, 1.0])
def test_value_and_gradient_are_those_that_autograd_finds_for_all_tokens_at_once(reverse, monkeypatch):
    monkeypatch.setattr(objectives, "_PIECE", 4 * 11)  # pieces of 4, 4 and 2 tokens
    student, teacher = (3 * random_logits(10, seed=s) for s in (0, 1))
    wanted = student.double().requires_grad_()
    logq, logp = wanted.log_softmax(-1), teacher.double().log_softmax(-1)
    kl = [(a.exp() * (a - b)).sum(-1).mean() for a, b in ((logp, logq), (logq, logp))]
    value = (1 - reverse) * kl[0] + reverse * kl[1]
    (2 * value).backward()
    found = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # it computes in float32 there too
        loss = ConfidenceKL(reverse).loss(batch(found, teacher))
    (2 * loss).backward()
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-7)
    assert not ConfidenceKL(reverse).loss(batch(student, teacher)).requires_grad


@pytest.mark.parametrize("objective", [OriginalKL(), ReverseKL(), ConfidenceKL(0.4)])
def test_loss_and_gradient_vanish_at_the_original(objective):
    student = random_logits().requires_grad_()
    loss = objective.loss(batch(student, student.detach().clone()))
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad is not None and student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("objective", [OriginalKL(), ReverseKL(), ConfidenceKL(0.4), NextToken()])
def test_losses_are_means_over_tokens_and_windows(objective):
    """The authors' codes sum over the tokens of a window, so theirs doubles with the text."""
    student, teacher, ids = random_logits(), random_logits(seed=1), torch.arange(6)[None]
    once = objective.of_window(batch(student, teacher, ids), 0)
    twice = objective.loss(Batch([0, 1], ids.expand(2, -1), student.expand(2, -1, -1), lambda i: Answer(teacher)))
    torch.testing.assert_close(once, twice)
    if not isinstance(objective, NextToken):  # whose pairs of tokens would not be the same
        longer = objective.loss(batch(student.repeat(2, 1), teacher.repeat(2, 1)))
        torch.testing.assert_close(once, longer)


def test_the_coefficient_is_the_originals_mean_probability_of_the_texts_tokens():
    ids, teacher = torch.tensor([[3, 1, 4, 1, 5, 9]]), random_logits()
    text = Text(ids, lambda i: Answer(teacher))
    settled, note = ConfidenceKL().settled(text)
    p = teacher.double().softmax(-1)
    wanted = p[torch.arange(5), ids[0, 1:]].mean().item()
    assert isinstance(settled, ConfidenceKL) and settled.coefficient == pytest.approx(wanted, rel=1e-6)
    assert f"{wanted:.3f}" in note
    largest, _ = ConfidenceKL(estimate="largest").settled(text)
    assert isinstance(largest, ConfidenceKL) and largest.coefficient == pytest.approx(
        p.amax(-1).mean().item(), rel=1e-6
    )
    assert ConfidenceKL(0.3).settled(text) == (ConfidenceKL(0.3), "")


@pytest.mark.parametrize("estimate", ["target", "largest"])
def test_an_original_that_knows_nothing_or_everything_has_the_coefficients_of_these(estimate):
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    uniform = Text(ids, lambda i: Answer(torch.zeros(5, 8)))
    sure = Text(ids, lambda i: Answer(1e4 * F.one_hot(torch.tensor([1, 2, 3, 4, 0]), 8).float()))
    for text, wanted in ((uniform, 1 / 8), (sure, 1.0)):
        settled, _ = ConfidenceKL(estimate=estimate).settled(text)
        assert isinstance(settled, ConfidenceKL) and settled.coefficient == pytest.approx(wanted)


def test_the_next_token_is_the_one_that_follows():
    logits, ids = random_logits(), torch.tensor([[3, 1, 4, 1, 5, 9]])
    wanted = -logits.log_softmax(-1)[torch.arange(5), ids[0, 1:]].mean()
    torch.testing.assert_close(NextToken().loss(batch(logits, torch.zeros(0), ids)), wanted)
    assert not NextToken().reads_original


def test_hidden_states_are_compared_in_direction_and_the_last_is_left_out():
    mine = tuple(torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(i)) for i in range(4))
    other = tuple(h[0].clone() for h in mine)
    other = (*other[:3], other[3] + 7.0)
    logits = random_logits()
    assert HiddenStates().loss(batch(logits, logits, hidden=mine, wanted=other)).item() < 1e-6
    scaled = tuple(3 * h for h in mine)
    assert HiddenStates().loss(batch(logits, logits, hidden=scaled, wanted=other)).item() < 1e-6
    turned = (mine[0], -mine[1], *mine[2:])
    found = HiddenStates(hidden=0.5).loss(batch(logits, logits, hidden=turned, wanted=other))
    assert found.item() == pytest.approx(0.5 * 4.0, rel=1e-5)  # opposite unit vectors


@pytest.mark.parametrize(
    "objective", [OriginalKL(), ReverseKL(), ConfidenceKL(0.2, "largest", 3), NextToken(), HiddenStates(2.0, 0.5)]
)
def test_objectives_survive_their_plain_form(objective):
    assert from_dict(to_dict(objective), type(objective)) == objective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConfidenceKL(1.5), "share from 0 to 1"),
        (lambda: ConfidenceKL(windows=0), "over 1 window"),
        (lambda: HiddenStates(hidden=0.0), "hidden positive"),
    ],
)
def test_objectives_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
