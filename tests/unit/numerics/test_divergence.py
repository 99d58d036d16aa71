"""Divergence of two models' logits, against torch's own and in chunks of any size."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.numerics.divergence import kl_and_agreement, score_tokens


def test_kl_of_each_token_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(1)
    p, q = 3 * torch.randn(2, 50, 77, generator=generator, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    kl, agree = kl_and_agreement(p, q)
    assert kl.dtype == torch.float64 and agree.dtype == torch.bool
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)
    assert torch.equal(agree, p.argmax(-1) == q.argmax(-1))
    low, _ = kl_and_agreement(p.bfloat16(), q.bfloat16())
    exact, _ = kl_and_agreement(p.bfloat16().double(), q.bfloat16().double())
    torch.testing.assert_close(low, exact, rtol=2e-5, atol=1e-6)  # float32 arithmetic on the same bfloat16 logits


def test_kl_is_in_the_direction_from_the_original_to_the_quantized():
    p, q = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    assert kl_and_agreement(p, q)[0].item() == pytest.approx(math.log(2), rel=1e-6)  # 0 log 0 = 0
    assert kl_and_agreement(q, p)[0].item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_nothing(dtype):
    generator = torch.Generator().manual_seed(2)
    p, q = torch.randn(2, 70, 1000, generator=generator, dtype=dtype)
    targets = torch.randint(1000, (70,), generator=generator)
    whole = score_tokens(q, targets, p, chunk=70)
    for chunk in (1, 32, 64, 1000):
        for found, expected in zip(score_tokens(q, targets, p, chunk=chunk), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        kl, agree = kl_and_agreement(p, q, chunk=chunk)
        torch.testing.assert_close(kl, whole.kl, rtol=1e-12, atol=1e-12)
        assert torch.equal(agree, whole.agree)


def test_logits_of_different_vocabularies_are_not_compared():
    with pytest.raises(ValueError, match="share a vocabulary"):
        kl_and_agreement(torch.zeros(2, 3), torch.zeros(2, 4))
