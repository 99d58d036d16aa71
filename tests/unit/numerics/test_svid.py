"""Signs times a rank-one matrix of magnitudes: what the factors are, and that no other rank-one form loses less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.layouts import pack_qtensor, unpack_qtensor
from lowbit.numerics import (
    ClipSearch,
    Int,
    KMeans,
    MinMax,
    PerTensor,
    Sign,
    Spec,
    Unfitted,
    fake_quantize,
    quantize,
    sign_value_factors,
)

SIGNS = Spec(Sign(), PerTensor())


def weight(rows: int = 64, columns: int = 96, seed: int = 0) -> Tensor:
    """Gaussian rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return w * torch.rand(rows, 1, generator=generator, dtype=torch.float64).exp()


def restored(w: Tensor) -> Tensor:
    h, g = sign_value_factors(w)
    return fake_quantize(w, SIGNS) * h[:, None] * g


def lost(w: Tensor, other: Tensor) -> float:
    return (w - other).square().sum().item()


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (1, 40), (40, 1), (200, 30)])
def test_the_error_is_the_tail_of_the_singular_values_of_the_magnitudes(shape):
    w = weight(*shape)
    tail = torch.linalg.svdvals(w.abs())[1:].square().sum().item()
    assert lost(w, restored(w)) == pytest.approx(tail, rel=1e-9, abs=1e-18)


def test_the_error_is_at_most_that_of_other_signs_with_magnitudes_of_rank_one():
    w = weight()
    found, signs = lost(w, restored(w)), fake_quantize(w, SIGNS)
    u, s, v = torch.linalg.svd(w)
    assert found < lost(w, s[0] * u[:, :1] * v[:1]), "than the best matrix of rank one"
    assert found < lost(w, w.abs().mean(1, keepdim=True) * signs), "than one scale a row"
    assert found < lost(w, w.abs().mean(0, keepdim=True) * signs), "than one scale a column"
    assert found < lost(w, w.abs().mean() * signs), "than one scale"


def test_factors_are_nowhere_negative_and_of_one_length():
    h, g = sign_value_factors(weight())
    assert (h >= 0).all() and (g >= 0).all()
    assert h.norm().item() == pytest.approx(g.norm().item(), rel=1e-12)


def test_scaling_after_the_signs_is_scaling_the_weight():
    w = weight()
    (h, g), signs = sign_value_factors(w), fake_quantize(w, SIGNS)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(((x * g) @ signs.T) * h, x @ (signs * h[:, None] * g).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_magnitudes_of_rank_one_are_restored(size):
    h, g = (torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 0.1 for n in (20, 30))
    h[3] = g[4] = 0
    w = weight(20, 30).sign() * h[:, None] * g * size
    torch.testing.assert_close(restored(w), w, rtol=1e-12, atol=0)
    narrow = restored((w / size).float())
    torch.testing.assert_close(narrow, (w / size).float(), rtol=1e-5, atol=1e-7)


def test_multiplicative_updates_from_a_random_start_find_the_same_factors():
    """Nonnegative factorization of rank one, as the authors' code asks for it."""
    w, generator = weight(), torch.Generator().manual_seed(0)
    h, g = (torch.rand(n, generator=generator, dtype=torch.float64) for n in w.shape)
    for _ in range(50):
        h = h * (w.abs() @ g) / (h * g.dot(g))
        g = g * (h @ w.abs()) / (g * h.dot(h))
    own_h, own_g = sign_value_factors(w)
    torch.testing.assert_close(h[:, None] * g, own_h[:, None] * own_g, rtol=1e-9, atol=0)


def test_a_matrix_of_zeros_has_factors_of_zeros():
    h, g = sign_value_factors(torch.zeros(3, 5))
    assert torch.equal(h, torch.zeros(3)) and torch.equal(g, torch.zeros(5))


def test_signs_are_one_bit_of_which_zero_is_plus_one():
    w = torch.tensor([[-2.0, -0.0, 0.0, 1e-40, -1e-40, 3.0, -1.0, 1.0, -1.0, 1.0]])
    q = quantize(w, SIGNS, Unfitted())
    wanted = torch.tensor([[-1.0, 1, 1, 1, -1, 1, -1, 1, -1, 1]])
    assert torch.equal(q.dequantize(), wanted) and torch.equal(fake_quantize(w, SIGNS), wanted)
    tensors = pack_qtensor(q)
    assert {name: t.tolist() for name, t in tensors.items()} == {"codes": [[0b10101110, 0b10]]}
    assert q.stored_bits == 16 and torch.equal(unpack_qtensor(tensors, SIGNS, (1, 10)).codes, q.codes)


def test_the_gradient_of_a_sign_fades_far_from_zero():
    x = torch.tensor([-3.0, -0.01, 0.0, 0.01, 0.5], dtype=torch.float64, requires_grad=True)
    outer = torch.arange(1.0, 6, dtype=torch.float64)
    (fake_quantize(x[None], SIGNS)[0] * outer).sum().backward()
    torch.testing.assert_close(x.grad, outer * (1.001 - x.detach().tanh().square()), rtol=1e-14, atol=0)
    assert x.grad[3] / 4 == pytest.approx(1.0009, abs=1e-6)


def test_numbers_that_are_not_finite_have_no_sign():
    assert torch.isnan(fake_quantize(torch.tensor([[torch.nan, torch.inf, 1.0]]), SIGNS)).tolist() == [
        [True, True, False]
    ]
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(torch.tensor([[torch.nan]]), SIGNS, Unfitted())


def test_what_places_a_grid_is_refused_for_signs_and_the_other_way_round():
    assert all(fit.why_not(Sign()) for fit in (MinMax(), ClipSearch(), KMeans()))
    assert Unfitted().why_not(Sign()) is None and "parameters" in (Unfitted().why_not(Int(1, symmetric=True)) or "")
