"""The two laws of a channel transform, in float64, for every transform with random parameters that are not the identity."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from lowbit.transforms import ChannelTransform, Merge, Permute, Rotate, Scale, Shift, Split

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
}
MERGE = Merge(torch.randperm(I, generator=_generator(9)) % 9)
ALL = EXACT | {"merge": MERGE}


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


@pytest.mark.parametrize("name", ["scale", "permute", "rotate hadamard", "rotate heads alike", "rotate each head"])
def test_dual_keeps_inner_products(name: str) -> None:
    t, x, y = EXACT[name], _normal(T, I), _normal(T, I, seed=1)
    torch.testing.assert_close((t.forward(x) * t.dual().forward(y)).sum(-1), (x * y).sum(-1), **TOLERANCE)


@pytest.mark.parametrize("name", ["shift", "split", "merge"])
def test_transforms_without_a_dual_say_so(name: str) -> None:
    with pytest.raises(ValueError, match="no dual"):
        ALL[name].dual()


@pytest.mark.parametrize("name", ALL)
def test_tile_acts_alike_on_each_repetition(name: str) -> None:
    t, x = ALL[name], _normal(T, 3, I)
    torch.testing.assert_close(t.tile(3).forward(x.flatten(1)), t.forward(x).flatten(1), **TOLERANCE)


def test_merge_is_exact_only_where_the_merged_channels_are_equal() -> None:
    x, w = _normal(T, I), _normal(O, I, seed=1)
    alike = _normal(T, 9, seed=2)[:, MERGE.groups]
    folded = MERGE.fold_in(w, None)
    assert not MERGE.exact
    torch.testing.assert_close(linear(MERGE.forward(alike), *folded), linear(alike, w), **TOLERANCE)
    assert (linear(MERGE.forward(x), *folded) - linear(x, w)).abs().max() > 0.1


def test_merge_puts_split_channels_together_again() -> None:
    split = Split(torch.tensor([1, 3, 2]))
    merge = Merge(torch.arange(3).repeat_interleave(split.counts))
    x = _normal(T, 3)
    torch.testing.assert_close(merge.forward(split.forward(x)) * split.counts, x, **TOLERANCE)


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
