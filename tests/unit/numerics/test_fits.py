"""Fits of tables, bases, zero points and ranges, each against its definition, by brute force where that is small."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from lowbit.numerics import (
    Affine,
    Alternating,
    BinaryCoded,
    ClipSearch,
    Codebook,
    Fixed,
    HalfQuadratic,
    Int,
    KMeans,
    MinMax,
    Percentile,
    PerChannel,
    PerGroup,
    RangeSearch,
    RmsRange,
    Spec,
    TruncationSearch,
    quantize,
)
from lowbit.numerics.fit_search import absolute_power
from lowbit.numerics.kmeans import kmeans_rows


def _values(rows: int = 24, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _weights(x: Tensor, seed: int = 1) -> Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) ** 3


def _table_loss(x: Tensor, w: Tensor, centroids: Tensor) -> Tensor:
    return (w * (x[..., None] - centroids[:, None]).square().amin(-1)).sum(1)


def _loss(x: Tensor, grid, params) -> Tensor:
    return (grid.decode(grid.encode(x, params), params) - x).square().sum(1)


def test_k_means_finds_the_optimum_that_trying_every_cut_finds():
    x, w = _values(16, 9), _weights(_values(16, 9))
    ordered, order = x.sort(1)
    by_value = w.gather(1, order)
    best = torch.full((16,), float("inf"), dtype=torch.float64)
    for cuts in combinations(range(1, 9), 2):
        total = torch.zeros(16, dtype=torch.float64)
        for i, j in pairwise((0, *cuts, 9)):
            v, u = ordered[:, i:j], by_value[:, i:j]
            mean = (v * u).sum(1, keepdim=True) / u.sum(1, keepdim=True)
            total += (u * (v - mean).square()).sum(1)
        best = torch.minimum(best, total)
    assert (_table_loss(x, w, kmeans_rows(x, w, 3)) - best).abs().max() < 1e-12


def test_k_means_never_loses_to_lloyds_rounds_from_any_start():
    x, w = _values(12, 200), _weights(_values(12, 200))
    optimum = _table_loss(x, w, kmeans_rows(x, w, 8))
    for seed in range(3):
        picked = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:8]
        centroids = x[:, picked].sort(1).values
        for _ in range(40):
            member = (x[..., None] - centroids[:, None]).abs().argmin(-1, keepdim=True) == torch.arange(8)
            share = (member * w[..., None]).sum(1)
            centroids = torch.where(
                share > 0, (member * (w * x)[..., None]).sum(1) / share.clamp(min=1e-300), centroids
            )
        assert (optimum <= _table_loss(x, w, centroids) + 1e-9).all()


def test_k_means_ignores_values_of_no_weight_and_the_scale_of_weights():
    x, w = _values(6, 40), _weights(_values(6, 40))
    w[:, ::3] = 0
    spoiled = torch.where(w == 0, torch.full_like(x, 1e3), x)
    assert torch.equal(kmeans_rows(x, w, 4), kmeans_rows(spoiled, w, 4))
    assert (kmeans_rows(x, w, 4) - kmeans_rows(x, 1e6 * w, 4)).abs().max() < 1e-9
    assert torch.equal(kmeans_rows(x, torch.zeros_like(w), 4), kmeans_rows(x, None, 4))


def test_a_row_of_few_distinct_values_is_exact_in_a_codebook():
    x = torch.tensor([0.5, -1.0, 2.0, 0.25]).repeat(3, 5)
    q = quantize(x, Spec(Codebook(2), PerChannel()), KMeans())
    assert torch.equal(q.dequantize(), x)
    assert q.stored_bits == 3 * (8 * 5 + 4 * 16)


def test_a_codebook_in_ragged_groups_survives_float16_tables():
    x = _values(10, 50).float()
    spec = Spec(Codebook(3), PerGroup(32))
    even = quantize(x, Spec(Int(3), PerGroup(32)), ClipSearch(norm=2.0)).dequantize()
    assert (quantize(x, spec, KMeans()).dequantize() - x).square().sum() < (even - x).square().sum()


def test_one_base_is_the_mean_magnitude_with_the_sign():
    x = _values()
    q = quantize(x, Spec(BinaryCoded(1), PerChannel(), scale_dtype="float32"), Alternating())
    expected = x.abs().mean(1, keepdim=True) * torch.where(x >= 0, 1.0, -1.0)
    assert (q.dequantize(torch.float64) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("offset", [False, True])
def test_binary_coding_never_loses_by_rounds_by_bases_or_to_greedy(offset):
    x, before = _values(40, 64), None
    for bits in (1, 2, 3, 4):
        grid = BinaryCoded(bits, offset)
        losses = [_loss(x, grid, Alternating(rounds)(x, grid)) for rounds in (0, 1, 5, 15)]
        for fewer, more in pairwise(losses):
            assert (more <= fewer + 1e-9).all()
        assert before is None or (losses[-1] <= before + 1e-9).all()
        before = losses[-1]


def test_searching_where_zero_lies_gains_on_lopsided_values_and_loses_little_to_the_extremes():
    x, grid = _values(30, 64).exp() - 0.5, Int(3)

    def lost(fit) -> Tensor:
        params = fit(x, grid)
        return (grid.decode(grid.encode(x, params), params) - x).abs().pow(2.4).sum(1)

    searched = lost(TruncationSearch(steps=100))
    assert (searched <= lost(MinMax()) * 1.05).all()  # extremes need not lie on the searched positions of zero
    assert searched.sum() < lost(ClipSearch()).sum()


def test_a_range_by_the_root_mean_square_is_symmetric_and_ignores_what_has_no_weight():
    x, grid = _values(5, 32), Int(2, zero="real")
    params = RmsRange(2.4)(x, grid)
    levels = grid.decode(torch.arange(4).expand(5, 4), params)
    assert (levels + levels.flip(1)).abs().max() < 1e-12
    assert (levels[:, -1] - 2.4 * x.square().mean(1).sqrt()).abs().max() < 1e-12
    weight = torch.ones_like(x)
    weight[:, 0] = 0
    spoiled = x.clone()
    spoiled[:, 0] = 1e3
    assert torch.equal(RmsRange()(x, grid, weight).scale, RmsRange()(spoiled, grid, weight).scale)


def test_half_quadratic_zero_points_lower_the_mean_error_and_keep_the_step():
    x, grid = _values(200, 64) ** 3, Int(3, zero="real")  # heavy tails
    plain, moved = grid.from_range(x.amin(1, keepdim=True), x.amax(1, keepdim=True)), HalfQuadratic()(x, grid)
    assert torch.equal(plain.scale, moved.scale)
    errors = [(grid.decode(grid.encode(x, p), p) - x).abs().mean(1) for p in (moved, plain)]
    assert (errors[0] <= errors[1] + 1e-12).all() and errors[0].mean() < 0.999 * errors[1].mean()


def test_fixed_parameters_are_given_back_whole_and_by_rows():
    x, grid = _values(6, 16), Int(4)
    params = MinMax()(x, grid)
    fixed = Fixed(params)
    assert torch.equal(fixed(2 * x, grid).scale, params.scale)
    assert torch.equal(fixed.rows(slice(1, None, 2))(x[1::2], grid).scale, params.scale[1::2])
    assert fixed.why_not(Codebook(2)) is not None and fixed.why_not(grid) is None


@pytest.mark.parametrize(
    ("fit", "grid"),
    [
        (MinMax(), Codebook(3)),
        (ClipSearch(), BinaryCoded(3)),
        (KMeans(), Int(3)),
        (Alternating(), Int(3)),
        (RmsRange(), Int(3)),
        (HalfQuadratic(), Int(3, symmetric=True)),
    ],
    ids=str,
)
def test_a_fit_says_which_grids_it_cannot_place(fit, grid):
    assert fit.why_not(grid)


def test_percentiles_do_not_count_what_fills_a_short_granule():
    x = _values(4, 40).float()
    ragged = quantize(x, Spec(Int(8), PerGroup(32)), Percentile(0.9))
    short = quantize(x[:, 32:].contiguous(), Spec(Int(8), PerChannel()), Percentile(0.9))
    assert isinstance(ragged.params, Affine) and isinstance(short.params, Affine)
    assert torch.equal(ragged.params.scale.view(4, 2)[:, 1], short.params.scale[:, 0])


@pytest.mark.parametrize("span", [8, 16, 30])
def test_k_means_bears_weights_of_very_different_size(span):
    x, w = _values(6, 40, seed=span), 10.0 ** (span * _weights(_values(6, 40), seed=span))
    centroids = kmeans_rows(x, w, 4)
    assert torch.isfinite(centroids).all()
    assert (centroids.diff(dim=1) >= 0).all()
    again = kmeans_rows(x, w / 1e6, 4)  # only ratios of weights count
    torch.testing.assert_close(_table_loss(x, w, again), _table_loss(x, w, centroids), rtol=1e-9, atol=0)


@pytest.mark.parametrize("zero", ["int", "real"])
@pytest.mark.parametrize("fit", [HalfQuadratic(), TruncationSearch()])
def test_one_sided_groups_do_not_collapse_under(fit, zero):
    x = 5 + _weights(_values(8, 32))  # values from 5 to 6
    grid = Int(4, zero=zero)
    lost, least = _loss(x, grid, fit(x, grid)), _loss(x, grid, MinMax()(x, grid))
    assert (lost <= 1.2 * least).all()


@pytest.mark.parametrize(
    "fit", [ClipSearch(10, 0.5), TruncationSearch(4), RangeSearch()], ids=lambda fit: type(fit).__name__
)
@pytest.mark.parametrize("grid", [Int(3), Int(3, symmetric=True)], ids=["zero point", "symmetric"])
def test_a_search_by_runs_of_granules_finds_what_a_search_of_all_at_once_finds(fit, grid, monkeypatch):
    x, w = _values(37, 48), _weights(_values(37, 48))
    for weight in (None, w):
        whole = fit(x, grid, weight)
        monkeypatch.setattr("lowbit.numerics.fit_search._RUN", 5 * 48)
        runs = fit(x, grid, weight)
        monkeypatch.undo()
        assert torch.equal(runs.scale, whole.scale) and runs.scale.shape == (37, 1)
        assert (runs.zero is None) == (whole.zero is None) and (runs.zero is None or torch.equal(runs.zero, whole.zero))


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
def test_the_power_of_an_error_is_that_power_and_of_none_is_none(norm):
    error = torch.tensor([0.0, -0.0, 1e-8, -0.3, 2.0, -50.0])
    torch.testing.assert_close(
        absolute_power(error.clone(), norm), error.abs().double().pow(norm).float(), rtol=1e-5, atol=0
    )
    assert absolute_power(torch.tensor([float("nan")]), norm).isnan().all()
