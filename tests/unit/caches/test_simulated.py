"""A window at once, as training sees a packed cache, is the window decoded token by token."""

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

import lowbit
from lowbit.architectures import quantize_attention, simulated_layers
from lowbit.caches import CacheGradients, Coordinates, PackedCache, PackedLayer, attend_simulated
from lowbit.caches.simulated import as_packed
from lowbit.decoding import cache_argument
from lowbit.decoding.packed_cache import packed_cache, simulated_cache
from lowbit.modules import AttentionSpec, KVFormats, KVRule, KVSpec
from lowbit.numerics import Block, Float, Int, PerGroup, PerTensor, PerToken, Spec

from models import llama, qwen2_with_large_key_biases, tokens

TOKEN = Spec(Int(4, zero="real"), PerToken())
GROUPS = Spec(Int(3), PerGroup(24))
BLOCKS = Spec(Int(2, zero="real"), Block(8, 1))
FORMATS = {
    "kivi": KVSpec(BLOCKS, Spec(Int(2, zero="real"), PerGroup(32)), recent=16),
    "kivi with sinks, before the rotary embedding": KVSpec(BLOCKS, GROUPS, recent=8, sink=5, before_rope=True),
    "a range for each token": KVSpec(TOKEN, TOKEN),
    "a range for each token, read at once": KVSpec(TOKEN, TOKEN, past_only=False),
    "blocks, read at once": KVSpec(BLOCKS, BLOCKS, recent=8, sink=3, past_only=False),
    "a window and sinks": KVSpec(GROUPS, TOKEN, recent=7, sink=4),
    "keys alone, rotated and centred": KVSpec(TOKEN, None, recent=32, key_rotation="hadamard", centred=True),
    "values alone, rotated": KVSpec(None, TOKEN, value_rotation="hadamard"),
    "ranges of all heads together": KVSpec(TOKEN, Spec(Int(4, symmetric=True), PerToken()), sink=2, shared_heads=True),
    "before the rotary embedding": KVSpec(TOKEN, TOKEN, before_rope=True, past_only=False),
}
METHODS = {name: lowbit.recipe(name).scheme.kv for name in ("kv-fp8", "kv-int", "kv-rotated")}
TURBO = lowbit.recipe("kv-turbo").scheme
LENGTH = 90


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    """Windows of tests are short; as in long ones, queries behind a window attend in several parts."""
    monkeypatch.setattr("lowbit.caches.simulated._QUERIES", 16)


@pytest.fixture(scope="module")
def model():
    """In float64: products in another order then change no code."""
    return llama(num_hidden_layers=2).double()


def token_by_token(model, ids, cache):
    name = cache_argument(model)
    with torch.no_grad():
        return torch.cat([model(ids[:, t : t + 1], **{name: cache}).logits for t in range(ids.shape[1])], 1)


def assert_near(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def assert_changed(model, ids, logits):
    """The cache that gave ``logits`` changes them: a simulation that did nothing would not agree with it."""
    assert not torch.allclose(model(ids).logits, logits, atol=1e-4), "the format changes too little to tell"


@pytest.mark.parametrize("name", [*FORMATS, *METHODS])
def test_a_window_at_once_is_the_window_token_by_token(model, name):
    spec, ids = {**FORMATS, **METHODS}[name], tokens(2, LENGTH)
    wanted = token_by_token(model, ids, PackedCache(model.config, spec))
    with torch.no_grad(), simulated_cache(model, KVFormats(spec)):
        found = model(ids).logits
    # Angles and rotated channels of one token and of a window are not always the same float32 numbers.
    assert_near(found, wanted, 1e-5 if spec.before_rope or spec.key_rotation or spec.value_rotation else 1e-9)
    assert_changed(model, ids, wanted)


def test_layers_may_differ_and_be_left_as_they_are():
    four, ids = llama().double(), tokens(1, LENGTH)
    formats = KVFormats(FORMATS["kivi"], (KVRule((0, -1), None), KVRule((1,), FORMATS["a window and sinks"])))
    wanted = token_by_token(four, ids, PackedCache(four.config, formats.kv, formats.overrides))
    with torch.no_grad(), simulated_cache(four, formats):
        assert_near(four(ids).logits, wanted)
    assert_changed(four, ids, wanted)


def test_levels_of_a_normal_distribution_and_exempt_layers(model):
    six, ids = llama(num_hidden_layers=6).double(), tokens(1, LENGTH)
    wanted = token_by_token(six, ids, PackedCache(six.config, TURBO.kv, TURBO.kv_overrides))
    with torch.no_grad(), simulated_cache(six, TURBO.cache):
        assert_near(six(ids).logits, wanted, 1e-5)
    assert_changed(six, ids, wanted)


def test_keys_with_large_biases_are_simulated_as_their_cache_holds_them():
    biased, ids = qwen2_with_large_key_biases().double(), tokens(1, LENGTH)
    spec = KVSpec(TOKEN, TOKEN)
    wanted = token_by_token(biased, ids, packed_cache(biased, spec))
    with torch.no_grad(), simulated_cache(biased, KVFormats(spec)):
        assert_near(biased(ids).logits, wanted, 1e-4)
    assert_changed(biased, ids, wanted)


def test_positions_that_are_learned_and_heads_that_are_fused():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)
    gpt2, ids = GPT2LMHeadModel(config).eval().double(), tokens(2, LENGTH)
    spec = FORMATS["kivi"]
    wanted = token_by_token(gpt2, ids, PackedCache(gpt2.config, spec))
    with torch.no_grad(), simulated_cache(gpt2, KVFormats(spec)):
        assert_near(gpt2(ids).logits, wanted)
    assert_changed(gpt2, ids, wanted)


def test_models_that_attend_eagerly_give_the_same(model):
    eager, ids = llama(num_hidden_layers=2, attn_implementation="eager").double(), tokens(2, LENGTH)
    spec = FORMATS["kivi"]
    wanted = token_by_token(model, ids, PackedCache(model.config, spec))  # eager attention rounds to float32
    with torch.no_grad(), simulated_cache(eager, KVFormats(spec)):
        assert_near(eager(ids, attention_mask=torch.ones_like(ids)).logits, wanted)
    assert eager.config._attn_implementation == "eager"
    assert_changed(model, ids, wanted)


@pytest.mark.parametrize("recent", [0, 4])
def test_masks_that_are_added_hide_what_those_that_choose_hide(recent):
    query, key, value = states(length=30)
    layer = PackedLayer(KVSpec(TOKEN, TOKEN, recent=recent))
    chosen = torch.ones(2, 1, 30, 30, dtype=torch.bool).tril()
    chosen[1, :, :, :7] = False
    added = torch.where(chosen, 0.0, torch.finfo(torch.float32).min)
    found, wanted = (attend_simulated(query, key, value, layer, mask) for mask in (added, chosen))
    assert_near(found[:1], attend_simulated(query, key, value, layer)[:1])
    assert_near(found[1, 7:], wanted[1, 7:])
    assert found.isfinite().all() and wanted.isfinite().all()
    by_head = chosen.expand(2, 4, 30, 30)
    assert_near(attend_simulated(query, key, value, layer, by_head), wanted)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("formats", [(TOKEN, TOKEN), (TOKEN, None), (None, TOKEN)], ids=["both", "keys", "values"])
def test_without_a_window_all_tokens_but_a_querys_own_are_read_as_packed(formats, masked, softcap):
    """The sums are those of two products each, one of tokens as they are and one of packed ones; gradients too."""
    leaves, own = states(length=20), torch.eye(20, dtype=torch.bool)
    layer = PackedLayer(KVSpec(*formats, sink=3))
    mask = torch.ones(20, 20, dtype=torch.bool).tril() & ~torch.ones(20, 20, dtype=torch.bool).tril(-8)
    found = attend_simulated(*leaves, layer, mask[None, None] if masked else None, softcap=softcap)
    query, *sides = leaves
    packed = [
        x if side.spec is None else as_packed(side, x, 17, CacheGradients())
        for side, x in zip(layer.sides, sides, strict=True)
    ]
    (key, value), (packed_key, packed_value) = ([x.repeat_interleave(2, 1) for x in both] for both in (sides, packed))
    score = torch.where(own, query @ key.mT, query @ packed_key.mT) * 8**-0.5
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    hidden = ~mask if masked else ~torch.ones_like(mask).tril()
    weights = score.masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = ((weights * own) @ value + (weights * ~own) @ packed_value).transpose(1, 2)
    assert_near(found, wanted)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (found, wanted)), strict=True):
        assert_near(a, b)


WINDOWS = {
    "keys in blocks, values one by one": KVSpec(BLOCKS, TOKEN, recent=8),
    "sinks, and blocks longer than a part": KVSpec(Spec(Int(2, zero="real"), Block(24, 1)), TOKEN, recent=24, sink=3),
    "keys alone": KVSpec(TOKEN, None, recent=5),
    "values alone, read at once": KVSpec(None, BLOCKS, recent=8, sink=2, past_only=False),
    "a window longer than a part": KVSpec(TOKEN, TOKEN, recent=20, past_only=False),
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", ["not", "by choice", "by addition"])
@pytest.mark.parametrize("spec", WINDOWS.values(), ids=WINDOWS)
def test_behind_a_window_a_query_reads_as_packed_what_has_left_it(spec, masked, softcap):
    """The sums are those of two products each, one of tokens as they are and one of packed ones; gradients too."""
    length, dim = 60, 8
    leaves = states(length=length)
    layer = PackedLayer(spec)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    chosen = causal & ~torch.ones_like(causal).tril(-30)
    mask = {
        "not": None,
        "by choice": chosen,
        "by addition": torch.zeros(length, length).double().masked_fill(~chosen, torch.finfo(torch.float64).min),
    }[masked]
    found = attend_simulated(*leaves, layer, mask, softcap=softcap)
    query, *both = leaves
    begun = torch.arange(length) + (not spec.past_only)
    reads = []
    for side, x in zip(layer.sides, both, strict=True):
        ends = torch.tensor([side.sink + side.leaving(max(0, int(count) - side.sink)) for count in begun])
        packed = x if side.spec is None else as_packed(side, x, int(ends[-1]) - side.sink, CacheGradients())
        seen = torch.arange(length) < ends[:, None]
        reads.append((x.repeat_interleave(2, 1), packed.repeat_interleave(2, 1), seen))
    (key, packed_key, by_key), (value, packed_value, by_value) = reads
    score = torch.where(by_key, query @ packed_key.mT, query @ key.mT) * dim**-0.5
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    weights = score.masked_fill(~(causal if mask is None else chosen), -torch.inf).softmax(-1)
    wanted = ((weights * ~by_value) @ value + (weights * by_value) @ packed_value).transpose(1, 2)
    assert_near(found, wanted)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (found, wanted)), strict=True):
        assert_near(a, b)


class Largest(TorchDispatchMode):
    """The most elements that a result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_behind_a_window_no_table_of_all_scores_is_made(softcap):
    """As a table it was made twice: half of the scores are of tokens to come, and most tokens are read in one way."""
    leaves = states(length=320)
    with Largest() as largest:
        found = attend_simulated(*leaves, PackedLayer(WINDOWS["keys in blocks, values one by one"]), softcap=softcap)
        torch.autograd.grad(found.sin().sum(), leaves)
    assert largest.elements < 2 * 4 * 320 * 320 / 4


def random_coordinates(heads, dim, seed=0):
    made = torch.Generator().manual_seed(seed)
    scale = torch.rand(heads, 1, dim, generator=made) + 0.5
    shift = torch.randn(heads, 1, dim, generator=made)
    rotation = torch.linalg.qr(torch.randn(heads, dim, dim, generator=made)).Q
    return Coordinates(rotation, scale, shift)


@pytest.mark.parametrize("spec", [FORMATS["kivi"], FORMATS["before the rotary embedding"]])
def test_calibrated_coordinates_are_those_of_the_cache(model, spec):
    ids = tokens(1, LENGTH)
    coordinates = {i: (random_coordinates(2, 64, i), random_coordinates(2, 64, i + 9)) for i in range(2)}
    wanted = token_by_token(model, ids, PackedCache(model.config, spec, coordinates=coordinates))
    layers = PackedCache(model.config, spec, coordinates=coordinates).packed_layers
    with torch.no_grad(), simulated_layers(model, layers):
        # Coordinates are applied in float32, whose sums differ between one token and many.
        assert_near(model(ids).logits, wanted, 1e-4)
    assert_changed(model, ids, wanted)


@pytest.mark.parametrize("grid", [Int(4), Int(4, symmetric=True), Float(2, 1)])
def test_a_range_of_all_tokens_is_that_of_the_cache(model, grid):
    ids, form = tokens(1, LENGTH), Spec(grid, PerTensor())
    ranges = torch.tensor([[-1.5, 2.0], [-1.0, 0.7]])
    coordinates = {i: (Coordinates(range=ranges), Coordinates(range=ranges.flip(0) / 2)) for i in range(2)}
    cache = PackedCache(model.config, KVSpec(form, form), coordinates=coordinates)
    wanted = token_by_token(model, ids, cache)
    layers = PackedCache(model.config, KVSpec(form, form), coordinates=coordinates).packed_layers
    with torch.no_grad(), simulated_layers(model, layers):
        assert_near(model(ids).logits, wanted)
    assert_changed(model, ids, wanted)


# ---- blocks, weights from elsewhere, half precision, passes that run twice ------------------------------------------------


def test_a_single_block_with_weights_from_elsewhere_computes_as_in_its_model(model):
    ids, spec = tokens(1, LENGTH), FORMATS["a window and sinks"]
    calls = []
    block = model.model.layers[1]
    hook = block.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True)
    with torch.no_grad(), simulated_cache(model, KVFormats(spec)):
        model(ids, use_cache=False)
    hook.remove()
    (args, kwargs, wanted), weights = calls[0], {name: 1.0 * p for name, p in block.named_parameters()}
    empty = llama(num_hidden_layers=2).double().model.layers[1]
    for parameter in empty.parameters():
        parameter.data.zero_()
    with torch.no_grad(), simulated_layers(empty, {1: PackedLayer(spec)}):
        found = functional_call(empty, weights, args, kwargs)
    assert_near(found, wanted)
    with torch.no_grad():
        assert not torch.allclose(functional_call(empty, weights, args, kwargs), wanted, atol=1e-4)


def gradients(model, ids, formats, checkpointing=False):
    model.zero_grad()
    with simulated_cache(model, formats):
        model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def checkpointed(model, reentrant):
    before = "gradient_checkpointing"  # its name until transformers 5.24
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else before
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    trained, ids = llama(num_hidden_layers=2).double().train(), tokens(2, 40)
    formats = KVFormats(FORMATS["kivi"])
    wanted = gradients(trained, ids, formats)
    checkpointed(trained, reentrant)
    found = gradients(trained, ids, formats)
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in wanted.values())
    for name, grad in wanted.items():
        assert_near(found[name], grad)


def test_a_second_pass_after_the_simulation_is_over_is_noticed():
    trained, ids = llama(num_hidden_layers=2).double().train(), tokens(2, 40)
    checkpointed(trained, False)
    with simulated_cache(trained, KVFormats(FORMATS["kivi"])):
        loss = trained(ids, labels=ids, use_cache=False).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_products_in_half_precision_stay_near():
    trained, ids = llama(num_hidden_layers=2), tokens(1, LENGTH)
    formats = KVFormats(FORMATS["a window and sinks"])
    with torch.no_grad(), simulated_cache(trained, formats):
        wanted = trained(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = trained(ids).logits.float()
    with torch.no_grad():
        lost = (trained(ids).logits - wanted).norm()
    assert (found - wanted).norm() < lost / 2


def test_models_are_left_as_they_were(model):
    before, ids = model.config._attn_implementation, tokens(1, 20)
    exact = model(ids).logits
    with pytest.raises(ZeroDivisionError), simulated_cache(model, KVFormats(FORMATS["kivi"])):
        _ = 1 / 0
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, exact)


# ---- gradients --------------------------------------------------------------------------------------------------------


def states(heads=4, groups=2, length=12, dim=8, dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    shapes = (heads, groups, groups)
    return [torch.randn(2, n, length, dim, generator=made, dtype=dtype).requires_grad_() for n in shapes]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_without_a_quantizer_are_finite_differences(softcap, masked):
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril() if masked else None
    layer = PackedLayer(KVSpec(None, None))
    assert torch.autograd.gradcheck(lambda q, k, v: attend_simulated(q, k, v, layer, mask, softcap=softcap), states())


@pytest.mark.parametrize("before_rope", [False, True], ids=["behind the rotary embedding", "before it"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_limit_takes_the_gradients_of_large_keys_and_values_that_symmetric_integers_pack(symmetric, before_rope):
    """LLM-QAT's code: values of 2 and over have none, as they are packed, and the result is the same."""
    spec = Spec(Int(4, symmetric=symmetric, zero="int" if symmetric else "real"), PerToken())
    form = KVSpec(spec, spec, past_only=False, before_rope=before_rope, shared_heads=True)
    layer = PackedLayer(form, frequencies=torch.linspace(1, 0.01, 12) if before_rope else None)
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(1, 2, 12, 24, generator=generator, dtype=torch.float64) * 1.5 for _ in range(3))

    def gradients(rule: CacheGradients) -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (key, value)]
        found = attend_simulated(query, *leaves, layer, gradients=rule)
        return found.detach(), *torch.autograd.grad(found.sin().sum(), leaves)

    plain, limited = (gradients(CacheGradients(limit, through_ranges=False)) for limit in (None, 2.0))
    assert torch.equal(plain[0], limited[0])
    if not symmetric:
        assert all(torch.equal(a, b) for a, b in zip(plain, limited, strict=True))
        return
    for x, free, kept, turns in zip((key, value), plain[1:], limited[1:], (before_rope, False), strict=True):
        large = (layer.sides[0].turned(x, 0, -1) if turns else x).abs() >= 2.0
        as_packed = [layer.sides[0].turned(g, 0, -1) if turns else g for g in (free, kept)]
        assert_near(as_packed[1], torch.where(large, 0.0, as_packed[0]), 1e-6)  # tokens are rounded in float32
        assert 0 < int(large.sum()) < large.numel() and as_packed[0][large].abs().max() > 0


def test_ranges_that_are_constant_pass_no_gradient_to_the_values_that_set_them():
    spec = Spec(Int(4, zero="real"), PerToken())
    layer = PackedLayer(KVSpec(None, spec, past_only=False))
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 1, 6, 8, generator=generator, dtype=torch.float64) for _ in range(3))

    def of_values(through_ranges: bool) -> torch.Tensor:
        leaf = value.clone().requires_grad_()
        found = attend_simulated(query, key, leaf, layer, gradients=CacheGradients(through_ranges=through_ranges))
        return torch.autograd.grad(found.square().sum(), leaf)[0]

    weights = (query @ key.mT * 8**-0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    found = attend_simulated(query, key, value, layer).transpose(1, 2)
    assert_near(of_values(False), weights.mT @ (2 * found), 1e-6)  # straight through; tokens are rounded in float32
    assert not torch.allclose(of_values(True), of_values(False))


def test_a_quantizer_that_is_off_leaves_torchs_attention():
    query, key, value = states(length=30)
    for spec in (KVSpec(None, None), KVSpec(TOKEN, TOKEN, recent=40), KVSpec(TOKEN, TOKEN, sink=40)):
        found = attend_simulated(query, key, value, PackedLayer(spec)).transpose(1, 2)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert_near(found, wanted)
        for a, b in zip(
            *(torch.autograd.grad(y.square().sum(), (query, key, value)) for y in (found, wanted)), strict=True
        ):
            assert_near(a, b)


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_gradients_at_eight_bits_are_nearly_those_of_the_full_cache(spec):
    query, key, value = states(length=60, dim=64)
    eight = {
        name: None if form is None else Spec(Int(8, zero="real"), form.granularity)
        for name, form in (("key", spec.key), ("value", spec.value))
    }
    kept = ("recent", "sink", "past_only", "before_rope", "shared_heads")
    fine = KVSpec(**eight, **{name: getattr(spec, name) for name in kept})
    layer = PackedLayer(fine, frequencies=10000.0 ** -(torch.arange(32) / 32))
    grads = [
        torch.autograd.grad(attend_simulated(query, key, value, each).sin().sum(), (query, key, value))
        for each in (layer, PackedLayer(KVSpec(None, None)))
    ]
    for found, wanted in zip(*grads, strict=True):
        assert found.isfinite().all()
        assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_scales_and_shifts_of_coordinates_get_gradients():
    """A scale that widens the range of every token raises the error; its gradient says so."""
    query, key, value = (x.detach() for x in states(length=60, dim=16))
    wanted = attend_simulated(query, key, value, PackedLayer(KVSpec(None, None)))
    scale, shift = torch.ones(2, 1, 16), torch.zeros(2, 1, 16)
    scale[:, :, 3] = 0.1
    shift[:, :, 5] = 40
    leaves = [scale.requires_grad_(), shift.requires_grad_()]
    layer = PackedLayer(KVSpec(TOKEN, TOKEN), Coordinates(None, scale, shift), Coordinates(None, scale, shift))
    loss = (attend_simulated(query, key, value, layer) - wanted).square().sum()
    of_scale, of_shift = torch.autograd.grad(loss, leaves)
    assert of_scale.isfinite().all() and of_shift.isfinite().all()
    assert (of_shift[:, :, 5] > 0).all() and of_shift[:, :, 5].abs().min() > 5 * of_shift[:, :, 6:].abs().max()
    steps = torch.optim.Adam(leaves, 0.02)
    first = loss.item()
    for _ in range(60):
        steps.zero_grad()
        loss = (attend_simulated(query, key, value, layer) - wanted).square().sum()
        loss.backward()
        steps.step()
    assert loss.item() < 0.7 * first


# ---- what cannot be simulated -------------------------------------------------------------------------------------------


def test_keys_of_an_earlier_call_are_refused(model):
    ids, name = tokens(1, 20), cache_argument(model)
    cache = model(ids[:, :10]).get(name)
    with simulated_cache(model, KVFormats(FORMATS["kivi"])), pytest.raises(ValueError, match="10 queries and 20 keys"):
        model(ids[:, 10:], **{name: cache})


def test_attention_of_a_models_own_is_refused():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)).eval()
    layers = PackedCache(llama().config, FORMATS["kivi"]).packed_layers
    with pytest.raises(ValueError, match="cannot be simulated"), simulated_layers(bloom, layers):
        bloom(tokens(1, 20))


def test_quantized_operands_of_attention_are_refused():
    quantized = llama(num_hidden_layers=2)
    quantize_attention(quantized.model.layers[0].self_attn, AttentionSpec(8))
    with (
        pytest.raises(ValueError, match="cannot be simulated together"),
        simulated_cache(quantized, KVFormats(FORMATS["kivi"])),
    ):
        quantized(tokens(1, 20))


def test_layers_that_no_attention_module_has_are_refused(model):
    layers = PackedCache(llama().config, FORMATS["kivi"]).packed_layers
    with pytest.raises(ValueError, match=r"\[2, 3\]"), simulated_layers(model, layers):
        pass
