"""Scales fitted to codes: no row's loss rises, what is stored is what was measured, and known scales are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.layouts import pack_qtensor, unpack_qtensor
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.numerics import NF4, ClipSearch, Gram, Int, PerChannel, PerGroup, PerTensor, QTensor, Spec, usual_fit
from lowbit.solve import Gptq, WeakColumns
from lowbit.solve.columns import Placed
from lowbit.solve.refit import refit

TYPES = ("Q4_0", "Q4_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "TQ2_0")
SPECS = {
    **{name: BLOCK_TYPES[name].spec for name in TYPES},
    "4 bits": Spec(Int(4), PerGroup(32)),
    "3 bits symmetric per channel": Spec(Int(3, symmetric=True), PerChannel()),
    "nf4": Spec(NF4, PerGroup(64)),
}
I = 512


def weight(rows: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, I, generator=torch.Generator().manual_seed(seed))


def gram(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(900, I, generator=generator) @ (
        torch.eye(I) + 0.2 * torch.randn(I, I, generator=generator) / I**0.5
    )
    x *= torch.rand(I, generator=generator) * 3
    return x.T @ x


def losses(q: QTensor, w: Tensor, h: Tensor, damp: float) -> Tensor:
    """Of each row, with H damped as in the solver."""
    e, h = q.dequantize().double() - w.double(), h.double()
    h = h + damp * h.diagonal().mean() * torch.eye(I)
    return ((e @ h) * e).sum(1)


@pytest.mark.parametrize("name", SPECS)
def test_no_row_loses_and_the_whole_gains(name):
    spec, w, h = SPECS[name], weight(), gram()
    fit = ClipSearch()
    before, after = (
        losses(Gptq(fit, order="group", refits=n).solve(w, spec, {Gram(): h}).q, w, h, 0.01) for n in (0, 2)
    )
    assert (after <= before * (1 + 1e-5)).all(), (after / before).tolist()
    assert after.sum() < 0.99 * before.sum()


@pytest.mark.parametrize("name", SPECS)
def test_what_was_measured_is_what_is_stored(name):
    q = Gptq(ClipSearch(), refits=2).solve(weight(), SPECS[name], {Gram(): gram()}).q
    stored = unpack_qtensor(pack_qtensor(q), q.spec, (6, I))
    assert torch.equal(stored.dequantize(), q.dequantize()) and torch.equal(stored.codes, q.codes)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL", "4 bits", "nf4"])
def test_scales_that_restore_a_weight_exactly_are_found(name):
    spec = SPECS[name]
    q = Gptq(usual_fit(spec.grid)).solve(weight(), spec, {Gram(): gram()}).q
    w = q.dequantize().double()
    wrong = q.params._replace(scale=(1.05 * q.params.scale).half().double())
    band = torch.arange(I) // spec.granularity.size
    found = refit(q.codes.T.contiguous(), w.T.contiguous(), gram().double(), band, Placed(wrong, {}), spec)
    # What is left is the ridge, and neighbours in float16 of scales whose bands hardly matter.
    assert torch.allclose(found.params.scale, q.params.scale.double(), rtol=1e-3)


def test_integers_of_the_second_level_are_searched_beside_their_scale():
    spec, h = BLOCK_TYPES["Q4_K"].spec, gram().double()
    q = Gptq(ClipSearch(), refits=0).solve(weight().double(), spec, {Gram(): h}).q
    band, w = torch.arange(I) // 32, weight().double()
    found = refit(q.codes.T.contiguous(), w.T.contiguous(), h, band, Placed(q.params, q.second), spec)
    new = QTensor(q.codes, found.params, spec, found.second)
    moved = [not torch.equal(found.second[n].codes, q.second[n].codes) for n in ("scale", "minimum")]
    assert all(moved)
    before, after = losses(q, w, h, 0.0), losses(new, w, h, 0.0)
    assert (after <= before).all() and after.sum() < 0.97 * before.sum()


def test_kept_weights_and_grids_without_one_scale_are_refused():
    with pytest.raises(ValueError, match="outliers"):
        Gptq(refits=1, outliers=WeakColumns(4))
    with pytest.raises(ValueError, match="PerTensor"):
        Gptq(refits=1).check(Spec(Int(4), PerTensor()), False)
    with pytest.raises(ValueError, match="at least 0"):
        Gptq(refits=-1)


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0"])
def test_scales_of_two_levels_are_fitted_by_default_and_others_are_not(name):
    given = weight(), BLOCK_TYPES[name].spec, {Gram(): gram()}
    default, none = (Gptq(ClipSearch(), refits=refits).solve(*given).q for refits in (None, 0))
    assert torch.equal(default.codes, none.codes) == (name == "Q4_0")
