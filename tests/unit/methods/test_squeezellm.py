"""SqueezeLLM: laws of its tables, its importance and its sparse rest."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.modules import QuantLinear
from lowbit.numerics import Lut, Sparse

from helpers import random_ids, sqnr_db, tiny_llama

ROWS, COLUMNS = 24, 160


@pytest.fixture(scope="module")
def linear() -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, ROWS)
    with torch.no_grad():
        linear.weight.copy_(torch.distributions.StudentT(4.0).sample((ROWS, COLUMNS)) / 50)
    return linear


@pytest.fixture(scope="module")
def fisher() -> Tensor:
    """Fisher information spread over four orders of magnitude, independent of the weights, like squared gradients."""
    return (3 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))).exp() * 1e-6


def quantized(linear: nn.Linear, fisher: Tensor, **options) -> QuantLinear:
    return lowbit.quantize_linear(linear, None, lowbit.recipe("squeezellm", **options), fisher=fisher)


def dense(linear: nn.Linear, fisher: Tensor, bits: int = 3, **options) -> Tensor:
    """The stored weight without a sparse rest."""
    return quantized(linear, fisher, bits=bits, sparsity=0.0, sensitive=0.0, **options).effective_weight()


def table(q: QuantLinear) -> Tensor:
    """The values of every row, ``[ROWS, 2**bits]``."""
    params = q.qtensor().params
    assert isinstance(params, Lut)
    return params.values


def weighted_error(w_OI: Tensor, q_OI: Tensor, f_OI: Tensor) -> Tensor:
    """``sum_i F (w - q)^2`` of each row, float64."""
    return (f_OI.double() * (w_OI.double() - q_OI.double()).square()).sum(1)


def kept(q: QuantLinear) -> Sparse:
    (side,) = q.side_terms
    assert isinstance(side, Sparse)
    return side


def test_its_error_by_importance_is_below_that_of_uniform_grids_in_every_row(linear, fisher):
    q = dense(linear, fisher)
    rtn = lowbit.quantize_linear(linear, None, lowbit.recipe("rtn", bits=3, group_size=None)).effective_weight()
    alike = dense(linear, torch.ones_like(fisher))
    ours, uniform, plain = (weighted_error(linear.weight.detach(), x, fisher) for x in (q, rtn, alike))
    assert (ours <= uniform).all() and (ours <= plain * (1 + 1e-3)).all()
    assert ours.sum() < 0.5 * uniform.sum()


def test_no_rounds_of_lloyd_from_any_start_end_below_it(linear, fisher):
    w, f, k = linear.weight.detach().double(), fisher.double(), 8
    ours = weighted_error(w, dense(linear, fisher), f)
    generator, best = torch.Generator().manual_seed(5), torch.full((ROWS,), torch.inf, dtype=torch.float64)
    for _ in range(20):
        centre = w[:, torch.randperm(COLUMNS, generator=generator)[:k]]
        for _ in range(50):
            member = nn.functional.one_hot((w[:, :, None] - centre[:, None]).abs().argmin(2), k) * f[:, :, None]
            mass = member.sum(1)
            centre = torch.where(mass > 0, (member * w[:, :, None]).sum(1) / mass.clamp(min=1e-300), centre)
        error = (f * (w[:, :, None] - centre[:, None]).square().amin(2)).sum(1)
        best = torch.minimum(best, error)
    assert (ours <= best * (1 + 1e-3)).all(), "a table in float16 may lose a thousandth, no more"
    assert ours.sum() > 0.5 * best.sum()


def test_every_weight_has_the_nearest_value_of_its_table(linear, fisher):
    q, w = quantized(linear, fisher, bits=3, sparsity=0.0, sensitive=0.0), linear.weight.detach()
    assert (table(q).diff(dim=1) >= 0).all(), "values do not rise"
    nearest = (w[:, :, None] - table(q)[:, None]).abs().amin(2)
    torch.testing.assert_close((w - q.dequantize()).abs(), nearest, rtol=0, atol=1e-7)


def test_only_ratios_of_the_importance_matter(linear, fisher):
    for c in (1e-12, 1e9):
        torch.testing.assert_close(dense(linear, fisher), dense(linear, c * fisher), rtol=0, atol=0)


def test_a_row_without_importance_is_fitted_as_if_all_its_weights_mattered_alike(linear, fisher):
    blind = fisher.clone()
    blind[5] = 0
    plain = dense(linear, torch.ones_like(fisher))
    assert torch.equal(dense(linear, blind)[5], plain[5])
    assert torch.equal(dense(linear, torch.zeros_like(fisher)), plain), "an expert without tokens"


def test_a_row_of_few_values_is_exact(fisher):
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    values = torch.tensor([-1.5, -0.25, 0.0, 0.125, 0.5, 3.0, 4.0])
    with torch.no_grad():
        linear.weight.copy_(values[torch.randint(7, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(2))])
        linear.weight[0] = 0.75
    assert torch.equal(dense(linear, fisher), linear.weight)


def test_kept_weights_come_back_and_are_the_largest_and_the_most_sensitive(linear, fisher):
    q = quantized(linear, fisher, bits=3, sparsity=0.02, sensitive=0.01)
    w, total = linear.weight.detach(), ROWS * COLUMNS
    side = kept(q)
    mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    mask[side.row, side.column.long()] = True
    assert mask.sum() == int(0.02 * total) + int(0.01 * total)
    sensitive = fisher >= fisher.flatten().topk(int(0.01 * total)).values[-1]
    assert mask[sensitive].all()
    assert w[mask & ~sensitive].abs().min() >= w[~mask].abs().max()
    torch.testing.assert_close(q.effective_weight()[mask], w[mask], rtol=2e-3, atol=1e-4)
    assert (q.effective_weight() - w)[~mask].abs().max() > 1e-3


def test_tables_do_not_see_what_is_kept(linear, fisher):
    louder = nn.Linear(COLUMNS, ROWS)
    louder.load_state_dict(linear.state_dict())
    side = kept(quantized(linear, fisher, bits=3, sparsity=0.02, sensitive=0.0))
    with torch.no_grad():
        louder.weight[side.row, side.column.long()] *= 10
    before, after = (quantized(x, fisher, bits=3, sparsity=0.02, sensitive=0.0) for x in (linear, louder))
    assert torch.equal(table(before), table(after))
    assert torch.equal(before.qtensor().codes, after.qtensor().codes)


def test_bits_count_tables_and_the_sparse_rest(linear, fisher):
    for bits in (2, 3, 4):
        plain = quantized(linear, fisher, bits=bits, sparsity=0.0, sensitive=0.0)
        assert plain.bits_per_weight == pytest.approx(bits + 16 * 2**bits / COLUMNS)
        mixed = quantized(linear, fisher, bits=bits, sparsity=0.02, sensitive=0.01)
        count = int(0.02 * ROWS * COLUMNS) + int(0.01 * ROWS * COLUMNS)
        rest = (count * (16 + 16) + 32 * (ROWS + 1)) / (ROWS * COLUMNS)
        assert mixed.bits_per_weight == pytest.approx(plain.bits_per_weight + rest)


def test_more_bits_more_kept_and_smaller_groups_lose_less(linear, fisher):
    errors = [weighted_error(linear.weight.detach(), dense(linear, fisher, bits), fisher).sum() for bits in range(1, 7)]
    assert all(b < 0.6 * a for a, b in pairwise(errors))
    grouped = weighted_error(linear.weight.detach(), dense(linear, fisher, group_size=32), fisher).sum()
    assert grouped < 0.6 * errors[2]
    apart = quantized(linear, fisher, bits=3, sparsity=0.02, sensitive=0.01).effective_weight()
    assert weighted_error(linear.weight.detach(), apart, fisher).sum() < 0.6 * errors[2]


@pytest.mark.parametrize("method", ["squeezellm", "awq+squeezellm"])
def test_a_model_is_quantized_saved_and_read_back(tmp_path, method):
    model, ids = tiny_llama(tmp_path / "model"), random_ids(4, 24)
    options = {"scale": True, "clip": False} if "awq" in method else {}
    report = lowbit.quantize(
        model, lowbit.recipe(method, bits=4, sparsity=0.01, **options), ids, out=tmp_path / "out", max_kl=5
    )
    assert all(layer.error is not None and layer.error < 0.05 for layer in report.layers)
    read, original = lowbit.load(tmp_path / "out"), lowbit.load(model)
    with torch.no_grad():
        assert sqnr_db(original(input_ids=ids).logits, read(input_ids=ids).logits) > 10


def test_what_cannot_be_is_refused(linear, fisher):
    with pytest.raises(ValueError, match="needs Fisher information"):
        lowbit.quantize_linear(linear, None, "squeezellm")
    for options in ({"bits": 0}, {"bits": 9}, {"sparsity": 1.0}, {"sensitive": -0.1}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            lowbit.recipe("squeezellm", **options)
