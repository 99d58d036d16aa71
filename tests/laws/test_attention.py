"""The laws of quantized attention: with nothing quantized it is attention, and integers give what decoded operands give."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.modules import AttentionSpec, OperandRanges, attend, fake_quantize_activation
from lowbit.modules.activation import ActSpec
from lowbit.numerics import Affine, from_dict, to_dict
from lowbit.steps.attention import operand_buffers

from helpers import sqnr_db

SPECS = [
    AttentionSpec(8),
    AttentionSpec(8, probability_bits=8),
    AttentionSpec(4, probability_bits=8),
    AttentionSpec(6, symmetric=False),
    AttentionSpec(6, format="E3M2"),
]
HEADS = (6, 2, 8, 8)
STATIC = [
    AttentionSpec(8, static=True, heads=HEADS),
    AttentionSpec(8, probability_bits=8, static=True, heads=HEADS),
    AttentionSpec(6, symmetric=False, probability_bits=8, static=True, clusters=1, heads=HEADS),
    AttentionSpec(6, symmetric=False, probability_bits=8, static=True, clusters=3, heads=HEADS),
    AttentionSpec(6, static=True, clusters=20, heads=HEADS),
]


def operands(batch=2, heads=6, groups=2, queries=5, keys=9, size=8, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, size), (batch, groups, keys, size), (batch, groups, keys, size)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v * torch.linspace(0.1, 3, keys)[:, None]


def ranges_of(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> OperandRanges:
    """Static ranges that reach the extremes of these operands."""
    flat = {
        name: x.detach().transpose(1, 2).flatten(2).flatten(0, 1)
        for name, x in (("query", q), ("key", k), ("value", v))
    }
    ranges = OperandRanges(spec)
    ranges.fill(dict(operand_buffers(spec, {n: torch.stack([x.amin(0), x.amax(0)]) for n, x in flat.items()}, 0)))
    return ranges


def restored(x_BHTD: Tensor, spec: AttentionSpec, ranges: OperandRanges, name: str) -> Tensor:
    """Operands after rounding, an element at a time from the buffers."""
    scale, zero = ranges.get_buffer(f"{name}_scale"), ranges._buffers.get(f"{name}_zero")
    labels = ranges._buffers.get("value_labels" if name == "value" else "labels")
    out = torch.empty_like(x_BHTD)
    for h, d in itertools.product(range(x_BHTD.shape[1]), range(x_BHTD.shape[3])):
        shared = x_BHTD.shape[1] // len(labels) if labels is not None else 1
        at = (min(h, len(scale) - 1), 0 if labels is None else int(labels[h // shared, d]))
        params = Affine(scale[at].view(1, 1), None if zero is None else zero[at].float().view(1, 1))
        grid = spec.operand.grid
        out[:, h, :, d] = grid.decode(grid.encode(x_BHTD[:, h, :, d], params), params)
    return out


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


@pytest.mark.parametrize("spec", STATIC, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_static_ranges_give_what_decoded_operands_give_whatever_shares_them(spec, causal):
    q, k, v = operands()
    ranges = ranges_of(spec, q, k, v)
    found = attend(q, k, v, spec, ranges=ranges, causal=causal)
    rounded = [restored(x, spec, ranges, name) for x, name in ((q, "query"), (k, "key"), (v, "value"))]
    score = torch.einsum("bhtd,bhsd->bhts", rounded[0], rounded[1].repeat_interleave(3, 1)) / 8**0.5
    if causal:
        score = score.masked_fill(torch.ones(5, 9).triu(5).bool(), -torch.inf)
    p = score.softmax(-1)
    p = (p * 255).round() / 255 if spec.probability_bits else p
    assert sqnr_db(torch.einsum("bhts,bhsd->bthd", p, rounded[2].repeat_interleave(3, 1)), found) > 90
    assert 10 < sqnr_db(attend(q, k, v, None, causal=causal), found) < 60
    learned = attend(q.requires_grad_(), k, v, spec, ranges=ranges, causal=causal)
    assert sqnr_db(found, learned.detach()) > 90
    learned.square().sum().backward()
    assert q.grad is not None and torch.isfinite(q.grad).all() and q.grad.abs().sum() > 0


def test_extremes_are_not_clipped_and_more_clusters_lose_less():
    q, k, v = operands()
    spread = torch.logspace(-2, 1, 8)  # channels of very different ranges
    q, k, v = q * spread, k * spread, v * spread
    lost = []
    for clusters in (None, 1, 2, 4, 8):
        spec = AttentionSpec(4, symmetric=False, static=True, clusters=clusters, heads=HEADS)
        ranges = ranges_of(spec, q, k, v)
        rounded = restored(k, spec, ranges, "key")
        assert ((rounded - k).abs() <= ranges.key_scale.amax() * 1.001).all()
        lost.append(float(((rounded - k) / spread).square().sum()))
    assert lost == sorted(lost, reverse=True) and lost[-1] < lost[0] / 20


def test_static_ranges_that_are_not_known_yet_quantize_nothing_and_nan_is_not_lost_in_codes():
    q, k, v = operands()
    spec = STATIC[3]
    assert torch.equal(attend(q, k, v, AttentionSpec(6, static=True)), attend(q, k, v, None))
    ranges = ranges_of(spec, q, k, v)
    for broken in (q, k, v):
        held, broken[0, 0, 0, 0] = broken[0, 0, 0, 0].clone(), torch.nan
        out = attend(q, k, v, spec, ranges=ranges)
        assert out[0, 0, 0].isnan().any() and torch.isfinite(out[1]).all() and torch.isfinite(out[0, :, 3:]).all()
        broken[0, 0, 0, 0] = held


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
    with pytest.raises(ValueError, match="set static"):
        AttentionSpec(8, clusters=4)
    with pytest.raises(ValueError, match="a head has 1 to 256 clusters, found clusters=257"):
        AttentionSpec(8, static=True, clusters=257)
    for heads in ((4, 3, 8, 8), (4, 2, 8), (4, 2, "8", 8), (0, 2, 8, 8)):
        with pytest.raises(ValueError, match="heads are numbers of query heads, of key-value heads that divide them"):
            AttentionSpec(8, static=True, heads=heads)
    with pytest.raises(ValueError, match="floating operands of attention have dynamic ranges"):
        AttentionSpec(4, format="E2M1", static=True)
    with pytest.raises(ValueError, match="4 bits is called such as E2M1, found 'E4M3'"):
        AttentionSpec(4, format="E4M3")
    for spec in (*SPECS, *STATIC):
        assert from_dict(to_dict(spec)) == spec
