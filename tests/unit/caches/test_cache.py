"""Packed caches inside transformers' models: what they hold, and what models compute with them."""

import copy

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig

import lowbit
from lowbit.caches import PackedCache, PackedLayer
from lowbit.decoding.model import cache_argument
from lowbit.modules import KVRule, KVSpec
from lowbit.numerics import Block, Int, PerGroup, PerToken, Spec

from models import SIZES, llama, qwen2_with_large_key_biases, tokens

METHODS = ["kivi:4", "kivi:2", "kivi:3", "kv-rotated:4", "kv-turbo:4", "kv-int:8", "kv-int:5", "kv-fp8"]


@pytest.fixture(scope="module")
def model():
    return llama()


def cached(model, cache, *pieces):
    """Logits of the last piece after the others went through the cache."""
    name = cache_argument(model)
    with torch.no_grad():
        for piece in pieces:
            logits = model(piece, **{name: cache}).logits
    return logits


def generated(model, ids, cache, **options):
    name = cache_argument(model)
    return model.generate(ids, pad_token_id=0, **{name: cache}, **options)


def states(seed=0, batch=2, heads=3, count=150, dim=64):
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, count, dim, generator=made) for _ in range(2))


def filled(spec, *counts, seed=0, **shape):
    """A layer after updates with so many tokens each, and all keys and values."""
    key, value = states(seed, count=sum(counts), **shape)
    layer = PackedLayer(spec)
    for k, v in zip(key.split(counts, 2), value.split(counts, 2), strict=True):
        layer.update(k, v)
    return layer, key, value


def kivi(bits=2, group=32, recent=64, **changes):
    return lowbit.recipe("kivi", bits=bits, group_size=group, recent=recent, **changes).scheme.kv


# ---- with 16 bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}])
def test_sixteen_bits_give_the_full_caches_500_tokens(model, options):
    ids = tokens(1, 40)
    torch.manual_seed(1)
    wanted = generated(model, ids, DynamicCache(config=model.config), max_new_tokens=500, **options)
    torch.manual_seed(1)
    found = generated(model, ids, lowbit.kv_cache(model, "kivi", bits=16), max_new_tokens=500, **options)
    assert wanted.shape[1] == 540
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("beams", [1, 3])
def test_sixteen_bits_give_the_full_caches_tokens_for_a_left_padded_batch(model, beams):
    ids, mask = tokens(4, 40), torch.ones(4, 40, dtype=torch.long)
    for row, padded in enumerate((0, 3, 17, 39)):
        ids[row, :padded], mask[row, :padded] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "num_beams": beams}
    wanted = generated(model, ids, DynamicCache(config=model.config), **options)
    assert torch.equal(generated(model, ids, lowbit.kv_cache(model, "kivi", bits=16), **options), wanted)


def test_sixteen_bits_give_the_full_caches_tokens_with_an_assistant(model):
    ids, assistant = tokens(1, 40), llama(num_hidden_layers=1)
    options = {"max_new_tokens": 60, "do_sample": False, "assistant_model": assistant}
    wanted = generated(model, ids, DynamicCache(config=model.config), **options)
    assert torch.equal(generated(model, ids, lowbit.kv_cache(model, "kivi", bits=16), **options), wanted)


# ---- what is packed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 31, 63, 64, 65, 127, 128, 192])
def test_kivis_window_is_that_of_the_authors_code(prompt):
    """Keys leave it together when it is full, a prompt of whole windows entirely; values one by one."""
    layer, *_ = filled(kivi(), prompt)
    for step in range(70):
        count = prompt + step
        assert layer.key_side.waiting_length == count % 64
        assert layer.value_side.waiting_length == min(count, 64)
        assert all(side.packed_length + side.waiting_length == count for side in layer.sides)
        layer.update(*states(step, count=1))


@pytest.mark.parametrize("name", METHODS)
def test_pieces_of_a_prompt_give_what_the_whole_gives(name):
    spec = lowbit.recipe(name.split(":")[0], **({"bits": int(name[-1])} if ":" in name else {})).scheme.kv
    whole, *_ = filled(spec, 300)
    pieces, *_ = filled(spec, 200, 1, 1, 50, 48)
    for a, b in zip(whole.keys_values(), pieces.keys_values(), strict=True):
        if spec.centred:  # means are over the tokens of the first call
            torch.testing.assert_close(a, b, atol=0.5, rtol=0)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_packed_never_changes(name):
    spec = lowbit.recipe(name.split(":")[0], **({"bits": int(name[-1])} if ":" in name else {})).scheme.kv
    layer, *_ = filled(spec, 200)
    before = [side.decoded().clone() for side in layer.sides]
    for step in range(150):
        layer.update(*states(step + 1, count=1))
    after = [side.decoded()[:, :, : part.shape[2]] for side, part in zip(layer.sides, before, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_errors_are_at_most_half_a_step_and_extremes_are_exact(bits):
    layer, key, value = filled(kivi(bits, 32, 32), 128)
    k, v = layer.keys_values()
    blocks, near = key.unfold(2, 32, 32), k.unfold(2, 32, 32)  # [B, H, M, D, 32]
    step = (blocks.amax(-1) - blocks.amin(-1)) / (2**bits - 1)
    assert ((blocks - near).abs().amax(-1) <= step * 0.502 + 2e-3).all()
    torch.testing.assert_close(near.amax(-1), blocks.amax(-1), atol=5e-3, rtol=2e-3)
    torch.testing.assert_close(near.amin(-1), blocks.amin(-1), atol=5e-3, rtol=2e-3)
    groups, near = value[:, :, :96].unflatten(-1, (2, 32)), v[:, :, :96].unflatten(-1, (2, 32))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**bits - 1)
    assert ((groups - near).abs() <= step * 0.502 + 2e-3).all()
    assert torch.equal(v[:, :, 96:], value[:, :, 96:])


def test_the_error_falls_with_the_bits():
    for make in (lambda bits: kivi(bits, 32, 32), lambda bits: lowbit.recipe("kv-rotated", bits=bits).scheme.kv):
        errors = []
        for bits in range(1, 9):
            layer, key, _ = filled(make(bits), 256)
            errors.append((layer.keys_values()[0] - key).norm().item())
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", METHODS)
def test_constant_keys_and_values_come_back(name):
    spec = lowbit.recipe(name.split(":")[0], **({"bits": int(name[-1])} if ":" in name else {})).scheme.kv
    layer = PackedLayer(spec)
    layer.update(torch.full((1, 2, 200, 64), 3.0), torch.zeros(1, 2, 200, 64))
    k, v = layer.keys_values()
    assert torch.isfinite(k).all()
    assert (k - 3).abs().max() < 3.2  # a rotated constant is an outlier
    assert not v.any()


def test_first_tokens_and_the_newest_stay_as_they_came():
    layer, key, value = filled(kivi(recent=64, sink=4), 150)
    k, v = layer.keys_values()
    assert torch.equal(k[:, :, :4], key[:, :, :4])
    assert torch.equal(v[:, :, :4], value[:, :, :4])
    assert torch.equal(k[:, :, 132:], key[:, :, 132:])
    assert torch.equal(v[:, :, 86:], value[:, :, 86:])
    assert not torch.equal(k[:, :, 4:68], key[:, :, 4:68])


def test_padding_is_never_packed():
    layer = PackedLayer(kivi(recent=32))
    layer.padding = 10
    key, value = states(count=100)
    layer.update(key, value)
    assert torch.equal(layer.keys_values()[0][:, :, :10], key[:, :, :10])
    assert layer.key_side.kept_length == 10


# ---- changes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 20, 40, 90, 149])
@pytest.mark.parametrize("name", METHODS)
def test_cropping_keeps_what_is_before_and_the_cache_goes_on(name, removed):
    spec = lowbit.recipe(name.split(":")[0], **({"bits": int(name[-1])} if ":" in name else {})).scheme.kv
    layer, *_ = filled(spec, 150)
    before = layer.keys_values()
    layer.crop(-removed)
    assert layer.get_seq_length() == 150 - removed
    for a, b in zip(layer.keys_values(), before, strict=True):
        torch.testing.assert_close(a, b[:, :, : 150 - removed])
    kept, key, value = layer.keys_values(), *states(9, count=300)
    layer.update(key, value)
    after = layer.keys_values()
    assert after[0].shape[2] == 450 - removed
    for a, b in zip(after, kept, strict=True):
        torch.testing.assert_close(a[:, :, 0], b[:, :, 0])
    error = (after[0][:, :, 150 - removed :] - key).norm() / key.norm()
    assert error < {"kivi:2": 0.5, "kivi:3": 0.25}.get(name, 0.15)


@pytest.mark.parametrize("name", METHODS)
def test_sequences_are_selected_repeated_and_reordered(name):
    spec = lowbit.recipe(name.split(":")[0], **({"bits": int(name[-1])} if ":" in name else {})).scheme.kv
    for change, index in (
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    ):
        layer, *_ = filled(spec, 150)
        before = layer.keys_values()
        change(layer)
        assert all(torch.equal(a, b[index]) for a, b in zip(layer.keys_values(), before, strict=True))
        layer.update(*states(5, batch=len(index), count=40))
        assert layer.get_seq_length() == 190


def test_a_copy_goes_its_own_way():
    layer, *_ = filled(kivi(), 150)
    other = copy.deepcopy(layer)
    other.update(*states(3, count=100))
    assert layer.get_seq_length() == 150
    assert torch.equal(other.keys_values()[0][:, :, :128], layer.keys_values()[0][:, :, :128])


@pytest.mark.parametrize("name", METHODS)
def test_a_cache_is_saved_and_loaded(name, model, tmp_path):
    ids, cache = tokens(1, 200), lowbit.kv_cache(model, name)
    cached(model, cache, ids[:, :150])
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(cached(model, loaded, ids[:, 150:]), cached(model, cache, ids[:, 150:]))


def test_gradients_reach_the_tokens_of_a_call_and_no_earlier_ones():
    key, value = (states.requires_grad_() for states in states(count=100))
    layer = PackedLayer(kivi(recent=32))
    layer.update(key[:, :, :80].detach(), value[:, :, :80].detach())
    k, v = layer.update(key[:, :, 80:], value[:, :, 80:])
    assert torch.equal(k[:, :, 80:], key[:, :, 80:])
    (k.sum() + 2 * v.sum()).backward()
    assert torch.equal(key.grad[:, :, 80:], torch.ones_like(key[:, :, 80:]))
    assert torch.equal(value.grad[:, :, 80:], 2 * torch.ones_like(value[:, :, 80:]))
    assert not key.grad[:, :, :80].any()


def test_a_reset_cache_is_empty(model):
    cache = lowbit.kv_cache(model, "kivi")
    cached(model, cache, tokens(1, 100))
    cache.reset()
    assert cache.get_seq_length() == 0
    first = cached(model, cache, tokens(1, 20))
    torch.testing.assert_close(first, cached(model, lowbit.kv_cache(model, "kivi"), tokens(1, 20)))


# ---- what models compute ----------------------------------------------------------------------------------------------


def test_a_prompt_alone_is_computed_in_full_precision(model):
    """Past only: a call reads its own tokens as they are."""
    ids = tokens(2, 300)
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(cached(model, lowbit.kv_cache(model, "kivi:2"), ids), wanted, atol=1e-4, rtol=1e-4)


def test_without_past_only_a_call_reads_its_own_tokens_packed(model):
    spec = KVSpec(Spec(Int(2), PerToken()), Spec(Int(2), PerToken()), past_only=False)
    ids = tokens(1, 100)
    logits = cached(model, lowbit.kv_cache(model, spec), ids)
    with torch.no_grad():
        assert (logits - model(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_logits_through_the_cache_are_near_full_precision(model, name):
    ids = tokens(1, 300)
    with torch.no_grad():
        wanted = model(ids).logits[:, -100:].log_softmax(-1)
    found = cached(model, lowbit.kv_cache(model, name), ids[:, :200], *ids[:, 200:].split(100, 1)).log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    assert kl < {"kivi:2": 0.6, "kivi:3": 0.1, "kv-turbo:4": 0.02, "kv-int:5": 0.02}.get(name, 0.02)


@pytest.mark.parametrize("name", ["kivi", "kv-rotated", "kv-int"])
def test_large_key_biases_do_not_ruin_four_bits(name):
    model, ids = qwen2_with_large_key_biases(), tokens(1, 300)
    with torch.no_grad():
        wanted = model(ids).logits[:, 200:].log_softmax(-1)
    options = {"symmetric": False} if name == "kv-int" else {}
    found = cached(model, lowbit.kv_cache(model, name, bits=4, **options), ids[:, :200], ids[:, 200:]).log_softmax(-1)
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.05


def test_layers_of_another_kind_stay_as_transformers_holds_them():
    config = Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6}, head_dim=32, sliding_window=32, initializer_range=0.1
    )
    torch.manual_seed(0)
    model, ids = Gemma3ForCausalLM(config).eval(), tokens(1, 120)
    cache = lowbit.kv_cache(model, "kivi:8", recent=32)
    assert [isinstance(layer, PackedLayer) for layer in cache.layers] == [False] * 5 + [True]
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
    found = cached(model, cache, ids[:, :100], *ids[:, 100:].split(1, 1))[:, -1]
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0)


def test_layers_by_rule_are_exempt_or_have_other_bits(model):
    cache = PackedCache(model.config, kivi(2), (KVRule((0, -1), kivi(8)), KVRule((1,))))
    formats = [layer.spec.key and layer.spec.key.grid.bits for layer in cache.layers]
    assert formats == [8, None, 2, 8]
    with pytest.raises(ValueError, match="name layers 7, and the model has 4"):
        PackedCache(model.config, kivi(2), (KVRule((7,)),))


def test_what_it_says_it_holds_is_what_it_holds(model):
    cache, full = lowbit.kv_cache(model, "kivi", recent=32), DynamicCache(config=model.config)
    cached(model, cache, tokens(1, 2048))
    cached(model, full, tokens(1, 2048))
    held = 0
    for layer in cache.layers:
        for side in layer.sides:
            held += sum(t.nbytes for t in (side.packed.codes, side.packed.scale, side.packed.zero, side.waiting.buffer))
    assert cache.nbytes == held
    of_sixteen_bits = sum(layer.keys.nbytes for layer in full.layers)  # keys alone in float32
    assert cache.nbytes < of_sixteen_bits / 4.4


@pytest.mark.parametrize(
    "spec", [KVSpec(Spec(Int(2), Block(32, 1)), Spec(Int(3), PerGroup(16)), recent=32), kivi(3, 64, 64)]
)
def test_bits_of_a_format_are_those_of_its_buffers(spec):
    layer, *_ = filled(spec, 64 * 64 + spec.recent, batch=1, heads=1)
    stored = 0
    for side in layer.sides:
        packed = side.packed
        tiles = -(-packed.slots // 16)
        stored += sum(8 * t[:, :, : (len(packed.counts) if t is not packed.codes and packed.in_blocks else tiles)].nbytes for t in (packed.codes, packed.scale, packed.zero)) / packed.length / 64  # fmt: skip
    assert stored / 2 == pytest.approx(spec.bits(64), rel=1e-2)


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_models_without_full_attention_and_places_of_models_are_refused():
    with pytest.raises(ValueError, match="expected a transformers model or its configuration, found 'place'"):
        lowbit.kv_cache("place", "kivi")
    with pytest.raises(ValueError, match="no layers of full attention"):
        lowbit.kv_cache(MistralConfig(num_hidden_layers=2, sliding_window=8), "kivi")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kiwi", {}, r"no method 'kiwi' \(did you mean 'kivi'"),
        ("gptq", {}, "'gptq' is no method for caches; known: kivi"),
        ("kivi:99", {}, "an integer grid has 1 to 8 bits, found 99"),
        ("kv-turbo", {"value_bits": 12}, "an integer grid has 1 to 8 bits, found 12"),
        ("kivi:x", {}, "a method and its bits once, such as kivi:2"),
        ("kivi:2", {"bits": 4}, "a method and its bits once"),
        ("kivi", {"recent": 40}, "a multiple of 32, found 40"),
        (KVSpec(None, None), {"bits": 2}, "a KVSpec says everything"),
    ],
)
def test_what_is_no_format_is_refused(model, method, options, message):
    with pytest.raises(ValueError, match=message):
        lowbit.kv_cache(model, method, **options)


def test_numbers_that_no_scale_holds_are_refused():
    layer = PackedLayer(kivi(recent=32))
    key, value = states(count=64)
    key[0, 0, 3, 3] = float("inf")
    with pytest.raises(ValueError, match="does not fit float16"):
        layer.update(key, value)
