"""The laws of quantized attention: with nothing quantized it is attention, and integers give what decoded operands give."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.modules import AttentionSpec, attend, fake_quantize_activation
from lowbit.modules.activation import ActSpec
from lowbit.numerics import from_dict, to_dict

from helpers import sqnr_db

SPECS = [
    AttentionSpec(8),
    AttentionSpec(8, probability_bits=8),
    AttentionSpec(4, probability_bits=8),
    AttentionSpec(6, symmetric=False),
]


def operands(batch=2, heads=6, groups=2, queries=5, keys=9, size=8, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, size), (batch, groups, keys, size), (batch, groups, keys, size)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v * torch.linspace(0.1, 3, keys)[:, None]


def by_definition(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, causal: bool) -> Tensor:
    """From decoded operands, a window and a head at a time."""
    act = ActSpec(spec.operand)
    out = torch.empty(*q.shape[:3], v.shape[-1])
    shared = q.shape[1] // k.shape[1]
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        key, value = (fake_quantize_activation(x[b, h // shared], act) for x in (k, v))
        score = fake_quantize_activation(q[b, h], act) @ key.T / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones(score.shape).triu(score.shape[1] - score.shape[0] + 1).bool()
            score = score.masked_fill(later, -torch.inf)
        p = score.softmax(-1)
        if spec.probability is not None:
            largest = 2 ** (spec.bits - 1) - 1
            scale = v[b, h // shared].abs().amax(-1) / largest
            p = fake_quantize_activation(p * scale, ActSpec(spec.probability)) / scale
        out[b, h] = p @ value
    return out.transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_nothing_quantized_is_torchs(causal):
    q, k, v = operands()
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4) if causal else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert sqnr_db(expected, attend(q, k, v, None, causal=causal)) > 100
    assert sqnr_db(expected, attend(q, k, v, None, mask=mask)) > 100
    if mask is not None:
        added = torch.zeros(5, 9).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        assert sqnr_db(expected, attend(q, k, v, None, mask=added)) > 100


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_integer_products_give_what_decoded_operands_give(spec, causal):
    q, k, v = operands()
    found = attend(q, k, v, spec, causal=causal)
    assert sqnr_db(by_definition(q, k, v, spec, causal), found) > 90
    exact = attend(q, k, v, None, causal=causal)
    assert 10 < sqnr_db(exact, found) < 60


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_learning_sees_the_same_numbers_and_gets_gradients(spec):
    q, k, v = (x.requires_grad_() for x in operands())
    learned = attend(q, k, v, spec, causal=True)
    with torch.no_grad():
        assert sqnr_db(attend(q, k, v, spec, causal=True), learned) > 90
    learned.square().sum().backward()
    exact = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    attend(*exact, None, causal=True).square().sum().backward()
    for x, y in zip((q, k, v), exact, strict=True):
        assert x.grad is not None and y.grad is not None and torch.isfinite(x.grad).all()
        assert F.cosine_similarity(x.grad.flatten(), y.grad.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("causal", [False, True])
def test_long_prompts_are_scored_in_parts_with_the_same_result(causal, monkeypatch):
    q, k, v = operands(queries=9)
    whole = attend(q, k, v, SPECS[1], causal=causal)
    monkeypatch.setattr("lowbit.modules.attention._QUERIES", 4)
    assert sqnr_db(whole, attend(q, k, v, SPECS[1], causal=causal)) > 100


def test_a_prompt_too_long_for_32_bit_sums_is_multiplied_in_floating_point(monkeypatch):
    q, k, v = operands()
    whole = attend(q, k, v, SPECS[1])
    monkeypatch.setattr("lowbit.modules.attention._MOST_TOKENS", 8)
    monkeypatch.setattr("lowbit.kernels.integer_product", None)  # would be called by mistake
    assert sqnr_db(whole, attend(q, k, v, SPECS[1])) > 90


def test_one_query_at_a_time_gives_what_all_at_once_give():
    q, k, v = operands(queries=9)
    whole = attend(q, k, v, SPECS[1], causal=True)
    for t in range(9):
        step = attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], SPECS[1], causal=True)
        assert sqnr_db(whole[:, t : t + 1], step) > 90


def test_a_cap_bounds_the_scores_before_the_mask_and_nan_spoils_only_its_own_window():
    q, k, v = operands()
    score = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(3, 1)) * 0.5
    p = (2 * torch.tanh(score / 2)).softmax(-1)
    expected = torch.einsum("bhts,bhsd->bthd", p, v.repeat_interleave(3, 1))
    assert sqnr_db(expected, attend(q, k, v, None, scaling=0.5, softcap=2.0)) > 100
    q[0, 0, 0, 0] = torch.nan
    out = attend(q, k, v, SPECS[0])
    assert out[0, 0, 0].isnan().all() and torch.isfinite(out[1]).all() and torch.isfinite(out[0, 1:]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bits": 1}, "bits of attention is 2 to 8, found 1"), ({"bits": 8, "probability_bits": 9}, "probability_bits")],
)
def test_formats_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**arguments)
    with pytest.raises(ValueError, match="quantized probabilities need symmetric values"):
        AttentionSpec(8, symmetric=False, probability_bits=8)
    assert from_dict(to_dict(SPECS[2])) == SPECS[2]
