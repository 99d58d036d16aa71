"""The two laws of a channel transform, in float64, for every transform with random parameters that are not the identity."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from lowbit.transforms import (
    ChannelTransform,
    Kronecker,
    Normalize,
    Permute,
    RandomHadamard,
    Reassembly,
    Rotate,
    Scale,
    Seeded,
    Shift,
    Split,
)

O, I, T = 7, 24, 11
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def _signed_scale(n: int) -> torch.Tensor:
    return (torch.rand(n, generator=_generator(1), dtype=torch.float64) * 2.7 + 0.3) * _normal(n, seed=2).sign()


EXACT: dict[str, ChannelTransform] = {
    "scale": Scale(_signed_scale(I)),
    "shift": Shift(_normal(I, seed=3)),
    "permute": Permute(torch.randperm(I, generator=_generator(4))),
    "rotate hadamard": Rotate.hadamard(I, seed=5),
    "rotate orthogonal": Rotate.random_orthogonal(I, seed=6),
    "rotate heads alike": Rotate.hadamard(I, seed=7, block=8),
    "rotate each head": Rotate(torch.stack([Rotate.random_orthogonal(6, seed=s).q for s in range(I // 6)])),
    "split": Split(torch.randint(1, 4, (I,), generator=_generator(8))),
    "kronecker": Kronecker(10, I),
    "kronecker inverse": Kronecker(10, I, inverted=True),
    "random hadamard": RandomHadamard(11, I),
    "random hadamard inverse in runs": RandomHadamard(11, 6, inverted=True),
}
REASSEMBLY = Reassembly(I, *(torch.tensor(each, dtype=torch.int16) for each in ([4, 9, 20], [6, 6, 20], [0, 0, 3])))
ALL = EXACT | {"reassembly": REASSEMBLY}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_fold_in_undoes_forward(name: str, bias: bool) -> None:
    t, x, w = EXACT[name], _normal(T, I), _normal(O, I, seed=1)
    b = _normal(O, seed=2) if bias else None
    torch.testing.assert_close(linear(t.forward(x), *t.fold_in(w, b)), linear(x, w, b), **TOLERANCE)
    assert t.exact


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_fold_out_applies_forward_to_the_output(name: str, bias: bool) -> None:
    t, x, w = ALL[name], _normal(T, O), _normal(I, O, seed=1)
    b = _normal(I, seed=2) if bias else None
    torch.testing.assert_close(linear(x, *t.fold_out(w, b)), t.forward(linear(x, w, b)), **TOLERANCE)


@pytest.mark.parametrize("name", ALL)
def test_transforms_are_not_the_identity_and_leave_their_arguments_alone(name: str) -> None:
    t, x, w, b = ALL[name], _normal(T, I), _normal(I, I, seed=1), _normal(I, seed=2)
    before = x.clone(), w.clone(), b.clone()
    moved = t.forward(x)
    t.fold_in(w, b), t.fold_out(w, b)
    assert moved.shape != x.shape or not torch.allclose(moved, x)
    assert all(torch.equal(now, then) for now, then in zip((x, w, b), before, strict=True))
    assert isinstance(t, ChannelTransform)


DUAL = [name for name in EXACT if name not in ("shift", "split")]


@pytest.mark.parametrize("name", DUAL)
def test_dual_keeps_inner_products(name: str) -> None:
    t, x, y = EXACT[name], _normal(T, I), _normal(T, I, seed=1)
    torch.testing.assert_close((t.forward(x) * t.dual().forward(y)).sum(-1), (x * y).sum(-1), **TOLERANCE)


@pytest.mark.parametrize("name", ["shift", "split", "reassembly"])
def test_transforms_without_a_dual_say_so(name: str) -> None:
    with pytest.raises(ValueError, match="no dual"):
        ALL[name].dual()


def test_a_normalization_leaves_mean_zero_and_variance_one_whatever_the_size_of_its_input() -> None:
    x = 3 * _normal(T, O) + 2
    y = Normalize(1e-12).forward(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(T, dtype=torch.float64), **TOLERANCE)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(T, dtype=torch.float64), rtol=1e-10, atol=0)
    torch.testing.assert_close(Normalize(1e-12).forward(17 * x + 4), y, rtol=1e-9, atol=1e-9)
    spread = x.var(-1, correction=0, keepdim=True)
    torch.testing.assert_close(Normalize(0.5).forward(x), y * (spread / (spread + 0.5)).sqrt(), rtol=1e-9, atol=1e-9)


def test_a_normalization_is_folded_nowhere() -> None:
    t, w, b = Normalize(), _normal(O, I), _normal(O)
    refused = [lambda: t.fold_in(w, b), lambda: t.fold_out(w, b), t.dual, lambda: t.tile(2)]
    for fold in refused:
        with pytest.raises(ValueError, match="normalization"):
            fold()
    assert not t.exact
    for eps in (0.0, -1.0, float("nan"), float("inf"), 1):
        with pytest.raises(ValueError, match="positive number"):
            Normalize(eps)


@pytest.mark.parametrize("name", ALL)
def test_tile_acts_alike_on_each_repetition(name: str) -> None:
    t, x = ALL[name], _normal(T, 3, I)
    torch.testing.assert_close(t.tile(3).forward(x.flatten(1)), t.forward(x).flatten(1), **TOLERANCE)


def test_a_fold_with_the_wrong_parameter_breaks_the_law() -> None:
    x, w = _normal(T, I), _normal(O, I, seed=1)
    for name, other in [("scale", Scale(_signed_scale(I).abs())), ("permute", Permute(torch.arange(I)))]:
        wrong = linear(EXACT[name].forward(x), *other.fold_in(w, None))
        assert (wrong - linear(x, w)).abs().max() > 0.1


@pytest.mark.parametrize("n", [1, 2, 8, 12, 24, 36, 48, 72, 576, 13, 26, 172])
def test_rotations_are_orthogonal(n: int) -> None:
    for t in (Rotate.hadamard(n, seed=0), Rotate.random_orthogonal(n, seed=0)):
        torch.testing.assert_close(t.q @ t.q.T, torch.eye(n, dtype=torch.float64), **TOLERANCE)


@pytest.mark.parametrize("n", [2, 8, 12, 20, 24, 72, 576, 1536])
def test_hadamard_entries_all_have_one_magnitude(n: int) -> None:
    q = Rotate.hadamard(n, seed=0).q
    torch.testing.assert_close(q.abs(), torch.full_like(q, n**-0.5), **TOLERANCE)


def test_hadamard_falls_back_to_a_random_odd_part() -> None:
    q = Rotate.hadamard(26, seed=0).q
    magnitudes = q.abs().reshape(13, 2, 13, 2).transpose(1, 2).flatten(2)
    torch.testing.assert_close(magnitudes, magnitudes[..., :1].expand_as(magnitudes), **TOLERANCE)
    assert magnitudes.min() < magnitudes.max() / 2


def test_rotations_follow_their_seed() -> None:
    for make in (Rotate.hadamard, Rotate.random_orthogonal):
        assert torch.equal(make(24, seed=1).q, make(24, seed=1).q)
        assert not torch.equal(make(24, seed=1).q, make(24, seed=2).q)


def test_a_rotation_in_runs_that_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="divisor of 24"):
        Rotate.hadamard(24, seed=0, block=7)


@pytest.mark.parametrize("make", [Scale, Shift, Rotate])
def test_gradients_reach_the_parameters_through_both_folds(make: type) -> None:
    parameter = EXACT["rotate hadamard"].q if make is Rotate else _signed_scale(I)
    parameter = parameter.clone().requires_grad_()
    t, x = make(parameter), _normal(T, I)
    inner = linear(x, *t.fold_out(_normal(I, I, seed=1), _normal(I, seed=2)))
    linear(inner, *t.fold_in(_normal(O, I, seed=3), None)).square().sum().backward()
    assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0


SEEDED = [Kronecker, RandomHadamard]
SIZES = [1, 2, 3, 12, 13, 24, 43, 64, 172, 521, 576, 1018, 1022]
"""Powers of two, products of small primes, primes, a prime over the largest factor, twice a prime."""


def _identity(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("kind", SEEDED)
@pytest.mark.parametrize("n", SIZES)
def test_seeded_rotations_are_orthogonal_at_every_width(kind: type[Seeded], n: int) -> None:
    q = kind(3, n).forward(_identity(n))
    torch.testing.assert_close(q @ q.T, _identity(n), **TOLERANCE)


@pytest.mark.parametrize("kind", SEEDED)
@pytest.mark.parametrize("n", [*SIZES, 11008])
def test_the_inverse_undoes_a_seeded_rotation_from_either_side(kind: type[Seeded], n: int) -> None:
    t, x = kind(4, n), _normal(2, n)
    torch.testing.assert_close(t.inverse().forward(t.forward(x)), x, **TOLERANCE)
    torch.testing.assert_close(t.forward(t.inverse().forward(x)), x, **TOLERANCE)
    assert t.inverse().inverse() == t


@pytest.mark.parametrize("kind", SEEDED)
@pytest.mark.parametrize("n", [521, 576, 1018, 11008])
def test_an_outlier_anywhere_spreads_thinly_over_all_that_is_mixed_at_once(kind: type[Seeded], n: int) -> None:
    places = torch.tensor([0, 1, n // 2, n - 2, n - 1])
    outliers = torch.zeros(5, n, dtype=torch.float64).scatter_(1, places[:, None], 1.0)
    spread = kind(5, n).forward(outliers).abs()
    assert spread.amax() < 9 / n**0.5
    assert ((spread > 1e-9).sum(1) >= 0.99 * kind.width(n)).all() and kind.width(n) > n / 2


@pytest.mark.parametrize("n", [64, 576, 1536])
def test_a_random_hadamard_is_as_flat_as_a_matrix_can_be_where_doubling_reaches_the_width(n: int) -> None:
    q = RandomHadamard(6, n).forward(_identity(n))
    torch.testing.assert_close(q.abs(), torch.full_like(q, n**-0.5), **TOLERANCE)


@pytest.mark.parametrize("kind", SEEDED)
def test_seeded_rotations_follow_their_seed_their_size_and_nothing_else(kind: type[Seeded]) -> None:
    x = _normal(3, 48)
    first = kind(1, 48).forward(x)
    torch.manual_seed(99)
    assert torch.equal(kind(1, 48).forward(x), first)
    assert (kind(2, 48).forward(x) - first).abs().max() > 0.1
    assert (kind(1, 24).forward(x) - first).abs().max() > 0.1
    assert kind(1, 48).forward(x.float()).dtype == torch.float32
    torch.testing.assert_close(kind(1, 48).forward(x.float()), first.float(), rtol=1e-5, atol=1e-5)


# Part of the storage format: checkpoints hold seeds, so what a seed generates may never change.
FROZEN = {
    ("Kronecker", 13): (-0.5650806483051143, 1.2345494464658604, 0.6313539733438363),
    ("Kronecker", 576): (0.7893683606593632, -0.9322919325094374, -0.866782541297185),
    ("Kronecker", 1018): (-0.1449098027728946, 0.698887590530999, 18.61091717847797),
    ("RandomHadamard", 13): (-1.294207408542888, 0.32956144321792213, -2.1208260063568103),
    ("RandomHadamard", 576): (0.3280451597577712, 0.4488542638549311, 18.82285603148867),
    ("RandomHadamard", 1018): (0.3707379806880531, 0.0002850916106285628, -7.844540713576497),
}


@pytest.mark.parametrize("key", FROZEN, ids=str)
def test_what_a_seed_generates_never_changes(key: tuple[str, int]) -> None:
    name, n = key
    kind = {"Kronecker": Kronecker, "RandomHadamard": RandomHadamard}[name]
    x = torch.arange(1, n + 1, dtype=torch.float64).sin()
    y = kind(20260101, n).forward(x)
    found = [y[0].item(), y[n // 2].item(), (y * x.cos()).sum().item()]
    assert found == pytest.approx(FROZEN[key], rel=1e-9, abs=1e-9)


def test_seeds_and_sizes_that_cannot_be_are_refused() -> None:
    for seed, size in [(-1, 8), (2**63, 8), (0, 0)]:
        with pytest.raises(ValueError, match="a seed is 0 to"):
            Kronecker(seed, size)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("kind", SEEDED)
def test_the_gradient_of_a_seeded_rotation_is_its_matrix_transposed(kind: type[Seeded], inverted: bool) -> None:
    rotation = kind(3, 44, inverted)  # in two overlapping parts, or in one
    x, g = (_normal(2, 5, 88, seed=s) for s in (0, 1))  # two runs of 44 channels
    x.requires_grad_()
    (found,) = torch.autograd.grad(rotation.forward(x), x, g)
    (wanted,) = torch.autograd.grad(rotation.made(x.dtype, x.device).forward(x), x, g)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert rotation.forward(x.detach()).grad_fn is None
    kept = x.detach().clone()
    changed = rotation.forward(x).add_(1)  # as models do that add in place
    assert torch.equal(torch.autograd.grad(changed, x, g)[0], found) and torch.equal(x.detach(), kept)


@pytest.mark.parametrize("kind", SEEDED)
def test_under_autocast_a_seeded_rotation_and_its_gradient_are_in_bfloat16_as_its_products_are(
    kind: type[Seeded],
) -> None:
    rotation, x = kind(3, 64), _normal(5, 64).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = rotation.forward(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), rotation.forward(x.detach()), rtol=0.02, atol=0.02)
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=0.03, atol=0.05)  # a rotation keeps lengths
