"""The compiled step with a packed cache is transformers' forward with the same cache."""

import copy

import pytest
import torch
from test_decoding import CONFIGS, packed
from transformers import DynamicCache

import lowbit
from lowbit import decoding
from lowbit.caches import PackedCache, calibrated_coordinates
from lowbit.compiled import ENVIRONMENT
from lowbit.decoding.model import cache_argument
from lowbit.kernels import native
from lowbit.modules import CacheCalibration, CalibrationSpec, KVRule, KVSpec
from lowbit.numerics import Block, Int, PerGroup, PerToken, Spec

LANES = [isa for isa in native.instruction_sets() if isa not in native.MATRIX_TILES]
PROMPT = torch.randint(0, 131, (1, 70), generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(0, 131, (1, 90), generator=torch.Generator().manual_seed(4))
KIVI = KVSpec(Spec(Int(2, zero="real"), Block(16, 1)), Spec(Int(2, zero="real"), PerGroup(8)), recent=32)
FORMATS = {
    "kivi": KIVI,
    "kivi, sinks": KVSpec(KIVI.key, KIVI.value, recent=16, sink=3),
    "tokens": KVSpec(Spec(Int(4), PerToken()), Spec(Int(8, symmetric=True), PerToken())),
    "rotated, centred": KVSpec(
        Spec(Int(4, zero="real"), PerToken()), Spec(Int(3, zero="real"), PerGroup(12)), recent=40,
        key_rotation="hadamard", value_rotation="hadamard", centred=True,
    ),
    "calibrated": KVSpec(
        Spec(Int(4, zero="real"), PerGroup(128)), Spec(Int(4, zero="real"), PerToken()), recent=40, sink=3,
        key_rotation="learned", value_rotation="learned", key_scaled=True, key_shifted=True, value_shifted=True,
    ),
    "keys alone": KVSpec(KIVI.key, None, recent=32),
    "floats": KVSpec(None, None),
}  # fmt: skip


def cache_of(model, spec, overrides=()):
    """A cache in ``spec``, in coordinates drawn for every layer where it has calibrated ones."""
    if not spec.calibrated:
        return PackedCache(model.config, spec, overrides)
    config, made = model.config, torch.Generator().manual_seed(7)
    heads, dim = config.num_key_value_heads, config.head_dim
    calibration = CalibrationSpec.of(spec.calibrated, (heads, dim, dim))
    places = {}
    for layer in range(config.num_hidden_layers):
        found = CacheCalibration(calibration)
        for name, buffer in found.named_buffers():
            drawn = torch.randn(buffer.shape, generator=made)
            turned = torch.linalg.qr(drawn)[0] if name.endswith("rotation") else drawn
            found.fill({name: drawn.mul(0.3).exp() if name.endswith("scale") else turned})
        places[layer] = calibrated_coordinates(spec, found)
    return PackedCache(config, spec, overrides, places)


def through(model, cache, text):
    """Logits of every token after the prompt, one at a time."""
    name = cache_argument(model)
    with torch.inference_mode():
        model(PROMPT, **{name: cache})
        return torch.cat([model(token, **{name: cache}).logits[:, -1] for token in text.split(1, 1)])


@pytest.fixture(params=LANES)
def isa(request, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, request.param)
    return request.param


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("config", ["llama", "qwen3, head norms"])
def test_the_step_computes_the_ordinary_forward(isa, config, name):
    model, spec = packed(CONFIGS[config]), FORMATS[name]
    stepped = cache_of(model, spec)
    found = through(model, stepped, TEXT)
    assert model._lowbit_step.steps >= TEXT.shape[1] - 1, model._lowbit_step.reason
    decoding.uninstall(model)
    plain = cache_of(model, spec)
    wanted = through(model, plain, TEXT)
    torch.testing.assert_close(found, wanted, atol=2e-2 if spec.key else 2e-3, rtol=0)  # a code may fall to either side
    assert (found - wanted).abs().mean() < 1e-3
    for ours, theirs in zip(stepped.layers, plain.layers, strict=True):
        assert [s.packed_length for s in ours.sides] == [s.packed_length for s in theirs.sides]
        for a, b in zip(ours.keys_values(), theirs.keys_values(), strict=True):
            assert (a - b).abs().mean() < 1e-2 * b.abs().mean()


@pytest.mark.parametrize("name", ["kivi", "kivi, sinks", "tokens", "rotated, centred", "calibrated", "keys alone"])
def test_long_texts_are_attended_to_in_parts(isa, name):
    model, spec, prompt = (
        packed(),
        FORMATS[name],
        torch.randint(0, 131, (1, 900), generator=torch.Generator().manual_seed(5)),
    )
    argument, found = cache_argument(model), []
    with torch.inference_mode():
        for step in (True, False):
            cache = cache_of(model, spec)
            model(prompt, **{argument: cache})
            if not step:
                decoding.uninstall(model)
            found.append(
                torch.cat([model(token, **{argument: cache}).logits[:, -1] for token in TEXT[:, :20].split(1, 1)])
            )
    assert (found[0] - found[1]).abs().mean() < 1e-3
    torch.testing.assert_close(found[0], found[1], atol=2e-2, rtol=0)


def test_layers_of_several_formats_step_together():
    model = packed()
    cache = PackedCache(model.config, KIVI, (KVRule((0,)),))
    found = through(model, cache, TEXT)
    assert model._lowbit_step.others == 0
    decoding.uninstall(model)
    torch.testing.assert_close(
        found, through(model, PackedCache(model.config, KIVI, (KVRule((0,)),)), TEXT), atol=2e-2, rtol=0
    )


def test_forward_and_step_alternate_on_one_cache():
    """Pieces, crops and copies between steps are seen by the next step."""
    model, name = packed(), cache_argument(packed())
    with torch.inference_mode():
        cache = PackedCache(model.config, KIVI)
        model(PROMPT, **{name: cache})
        model(TEXT[:, :1], **{name: cache})
        model(TEXT[:, 1:30], **{name: cache})
        cache.crop(-5)
        other = copy.deepcopy(cache)
        for token in TEXT[:, 30:70].split(1, 1):
            found = model(token, **{name: cache}).logits
        decoding.uninstall(model)
        for token in TEXT[:, 30:70].split(1, 1):
            wanted = model(token, **{name: other}).logits
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)
    assert cache.get_seq_length() == other.get_seq_length() == 70 + 30 - 5 + 40


def test_sixteen_bits_step_as_a_full_cache_does():
    model = packed()
    found = through(model, lowbit.kv_cache(model, "kivi", bits=16), TEXT)
    torch.testing.assert_close(found, through(model, DynamicCache(config=model.config), TEXT), atol=1e-5, rtol=1e-5)


def test_formats_that_torch_packs_run_by_the_ordinary_forward():
    model = packed()
    through(model, lowbit.kv_cache(model, "kv-turbo", bits=4, exempt=0), TEXT[:, :5])
    assert model._lowbit_step.steps == 0
    assert "packed to Normal(bits=4), which runs in torch" in decoding.explain(model)


def test_a_batch_runs_by_the_ordinary_forward():
    model, name = packed(), cache_argument(packed())
    cache = PackedCache(model.config, KIVI)
    with torch.inference_mode():
        model(PROMPT.repeat(2, 1), **{name: cache})
        cache.batch_select_indices(torch.tensor([1]))
        model(TEXT[:, :1], **{name: cache})
    assert cache.get_seq_length() == 71
    assert model._lowbit_step.steps == 1
