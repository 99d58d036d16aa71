"""Ranges that serve more than one token of one head: of all heads of a token, and static ones."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import lowbit
from lowbit.caches import Coordinates, Extremes, Operands, PackedLayer, attend_packed
from lowbit.caches.attention import compiled_reason
from lowbit.decoding import cache_argument
from lowbit.decoding.packed_cache import packed_cache
from lowbit.modules import KVSpec, calibrations, kv_formats
from lowbit.numerics import Float, Int, MinMax, PerTensor, PerToken, Spec

from helpers import random_ids, tiny_llama
from models import llama, qwen2_with_large_key_biases, tokens

GRIDS = [Int(8, symmetric=True), Int(4, zero="real"), Int(4), Float(4, 3, "fn")]


def states(count=70, seed=0, batch=2, heads=3, dim=64):
    made = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, heads, count, dim, generator=made) * (1 + torch.arange(heads)[:, None, None])
        for _ in range(2)
    )


def ranged(range_H2):
    return Coordinates(range=torch.as_tensor(range_H2, dtype=torch.float32))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_range_of_all_heads_is_that_of_the_whole_token(grid):
    """As LLM-QAT quantizes the output of a projection, before it is split into heads."""
    spec = Spec(grid, PerToken())
    layer, (key, value) = PackedLayer(KVSpec(spec, spec, shared_heads=True)), states()
    layer.update(key, value)
    for found, x in zip(layer.keys_values(), (key, value), strict=True):
        whole = x.transpose(1, 2).reshape(-1, 3 * 64)
        params = spec.as_stored(MinMax()(whole, grid))
        wanted = grid.decode(grid.encode(whole, params), params).view(2, 70, 3, 64).transpose(1, 2)
        assert torch.equal(found, wanted)


def test_heads_that_share_ranges_store_one_for_all():
    spec = Spec(Int(4, symmetric=True), PerToken())
    own, shared = KVSpec(spec, spec), KVSpec(spec, spec, shared_heads=True)
    sizes = []
    for form in (own, shared):
        layer = PackedLayer(form)
        layer.update(*states(512))
        sizes.append(sum(side.packed.scale.nbytes for side in layer.sides))
    assert sizes[0] == 3 * sizes[1]
    assert own.bits(64, 3) == 4 + 16 / 64 and shared.bits(64, 3) == pytest.approx(4 + 16 / 64 / 3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_static_range_is_the_same_for_every_token_and_clips_what_is_beyond(grid):
    spec = Spec(grid, PerTensor())
    range_H2 = torch.tensor([[-1.0, 1.5], [-4.0, 2.0], [-0.5, 9.0]])
    layer, (key, value) = PackedLayer(KVSpec(spec, None), ranged(range_H2)), states()
    layer.update(key, value)
    params = grid.from_range(*(end[:, None] for end in range_H2.unbind(1)))
    for h in range(3):
        one = type(params)(*(None if p is None else p[h : h + 1] for p in params))
        flat = key[:, h].reshape(1, -1)
        assert torch.equal(layer.keys[:, h], grid.decode(grid.encode(flat, one), one).view(2, 70, 64))
    assert layer.key_side.packed.scale.numel() == 0 and KVSpec(spec, spec).bits(64) == grid.bits


def test_pieces_of_a_static_cache_are_the_whole_and_crops_and_beams_keep_it():
    spec = Spec(Int(8, symmetric=True), PerTensor())
    form, (key, value) = KVSpec(spec, spec, recent=8, sink=2), states()
    place = ranged([[-4.0, 4.0]] * 3)
    whole, pieces = (PackedLayer(form, place, place) for _ in range(2))
    whole.update(key, value)
    for k, v in zip(key.split(10, 2), value.split(10, 2), strict=True):
        pieces.update(k, v)
    assert all(torch.equal(a, b) for a, b in zip(whole.keys_values(), pieces.keys_values(), strict=True))
    before = whole.keys_values()[0]
    whole.crop(-20)
    whole.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(whole.keys, before[:, :, :50][[1, 1]])
    whole.update(key[:, :, 50:], value[:, :, 50:])
    assert whole.get_seq_length() == 70


def test_a_static_cache_does_not_hide_nan():
    spec, place = Spec(Int(8, symmetric=True), PerTensor()), ranged([[-4.0, 4.0]] * 3)
    key, value = states(3)
    key[0, 0, 1, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf, for which the cache's range has no codes"):
        PackedLayer(KVSpec(spec, None), place).update(key, value)


@pytest.mark.parametrize("count", [1, 4, 30])
@pytest.mark.parametrize("static", [False, True])
def test_attention_reads_them_as_they_decode(static, count):
    spec = Spec(Int(4, zero="real"), PerTensor() if static else PerToken())
    place = ranged([[-9.0, 9.0]] * 3) if static else None
    layer = PackedLayer(KVSpec(spec, spec, recent=16, shared_heads=True), place, place)
    layer.update(*states(150))
    assert compiled_reason(layer) in ("one range serves all tokens", "heads share ranges", "there is no compiled code")
    query = torch.randn(2, 6, count, 64, generator=torch.Generator().manual_seed(5))
    keys, values = (t.repeat_interleave(2, 1) for t in layer.keys_values())
    mask = torch.ones(count, 150, dtype=torch.bool).tril(150 - count)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2)
    for compiled in (True, False):
        torch.testing.assert_close(attend_packed(query, layer, compiled=compiled), wanted, atol=3e-5, rtol=3e-5)


# ---- calibrated ------------------------------------------------------------------------------------------------------


def test_extremes_are_those_of_all_windows_without_sinks():
    made = torch.Generator().manual_seed(0)
    seen = [Operands(*torch.randn(3, 1, 2, 20, 8, generator=made).unbind(), sink=4) for _ in range(3)]
    seen[0].key[0, 0, 2] = 100.0
    sums, fit = {}, Extremes()
    for each in seen:
        fit.observe(sums, each)
    keys = torch.cat([each.key for each in seen])[:, :, 4:]
    wanted = torch.stack([keys.amin((0, 2, 3)), keys.amax((0, 2, 3))], 1)
    assert torch.equal(fit.found(sums)["key_range"], wanted)
    both = fit.found(sums, shared_heads=True)["key_range"]
    assert torch.equal(both, torch.stack([wanted[:, 0].min(), wanted[:, 1].max()]).expand(2, 2))


def test_windows_without_a_token_that_is_packed_are_refused_before_the_work(tmp_path):
    made = lowbit.recipe("kv-int", ranges="static", sink=16)
    with pytest.raises(ValueError, match="windows of 16 tokens have none behind the first 16"):
        lowbit.quantize(tiny_llama(tmp_path / "model"), made, random_ids(2, 16), out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("heads", ["own", "shared"])
@pytest.mark.parametrize("rope", ["after", "before"])
def test_a_static_cache_never_clips_its_calibration_text(tmp_path, heads, rope):
    """Read at once, as calibration did; later tokens would see packed ones."""
    model, ids = tiny_llama(tmp_path / "model"), random_ids(4, 48)
    made = lowbit.recipe("kv-int", ranges="static", heads=heads, rope=rope)
    report = lowbit.quantize(model, made, ids, out=tmp_path / "out", allow_broken=True)
    assert report.cache_bits == 8
    loaded = lowbit.load(tmp_path / "out")
    ranges = [found.key_range for *_, found in calibrations(loaded)]
    assert len(ranges) == 2 and all(torch.equal(*found) == (heads == "shared") for found in ranges)
    for window in ids:
        cache, full = lowbit.kv_cache(loaded, made.scheme.kv), DynamicCache(config=loaded.config)
        with torch.no_grad():
            for each in (cache, full):
                loaded(window[None], **{cache_argument(loaded): each})
        for layer, exact, place in zip(cache.layers, full.layers, ranges, strict=True):
            error = (layer.keys - exact.keys).abs().amax((0, 2, 3))
            step = place.abs().amax(1) / 127
            half = 0.5 if rope == "after" else 0.5 * 2**0.5  # an error of two channels turned into one
            assert (error <= half * step * 1.001 + 1e-5).all()


def test_a_static_cache_of_a_model_with_large_key_biases_takes_ranges_before_the_rotary_embedding(tmp_path):
    qwen2_with_large_key_biases().save_pretrained(tmp_path / "model")
    made = lowbit.recipe("kv-int", ranges="static", symmetric=False, sink=2)
    lowbit.quantize(tmp_path / "model", made, tokens(3, 64), out=tmp_path / "out", allow_broken=True)
    loaded = lowbit.load(tmp_path / "out")
    rules = kv_formats(loaded).overrides
    assert [rule.layers for rule in rules] == [(0,), (1,), (2,), (3,)]
    assert all(rule.kv.before_rope and not rule.kv.centred for rule in rules)
    packed_cache(loaded, kv_formats(loaded).kv, rules)


@pytest.mark.parametrize("options", [{"heads": "shared", "rope": "before", "bits": 4}, {"heads": "shared"}])
def test_a_cache_without_calibration_may_share_ranges_too(options):
    model, ids = llama(), tokens(1, 60)
    made = lowbit.recipe("kv-int", **options)
    assert not made.stages
    with torch.no_grad():
        wanted = model(ids).logits
        cache = lowbit.kv_cache(model, "kv-int", **options)
        model(ids, **{cache_argument(model): cache})
        found = model(ids[:, -1:], **{cache_argument(model): cache}).logits
    assert found.isfinite().all() and wanted.isfinite().all()
    assert cache.layers[0].key_side.packed.scale.shape[1] == 1


def test_groups_and_shared_ranges_are_refused_together():
    for options in ({"ranges": "static"}, {"heads": "shared"}):
        with pytest.raises(ValueError, match="leave it out with static ranges and with shared heads"):
            lowbit.recipe("kv-int", group_size=32, **options)
