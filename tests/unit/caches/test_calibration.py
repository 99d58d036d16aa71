"""Coordinates of a cache that calibration found: carried by attention modules, saved, loaded, and used wherever a cache is made."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.architectures import attention_modules
from lowbit.caches import Coordinates, PackedCache, PackedLayer, calibrated_coordinates
from lowbit.caches.coordinates import hadamard
from lowbit.checkpoints import native
from lowbit.checkpoints.description import ModelDescription
from lowbit.decoding import cache_argument, use_cache
from lowbit.decoding.packed_cache import packed_cache
from lowbit.modules import (
    CacheCalibration,
    CalibrationSpec,
    KVFormats,
    KVRule,
    KVSpec,
    cache_calibration,
    calibrate_cache,
    calibrations,
    set_kv_formats,
)
from lowbit.numerics import Int, PerGroup, PerToken, Spec, serializable
from lowbit.plan import plan
from lowbit.recipes import Recipe
from lowbit.scheme import Scheme, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import Solve, Step

from helpers import random_ids, tiny_llama
from models import calibrated, llama, tokens

BUFFERS = tuple(f"{side}_{part}" for side in ("key", "value") for part in ("rotation", "scale", "shift"))
FOUR = Spec(Int(4, zero="real"), PerToken())
ALL = KVSpec(
    FOUR, Spec(Int(4, zero="real"), PerGroup(32)), recent=32, key_rotation="learned", value_rotation="learned",
    key_scaled=True, key_shifted=True, value_scaled=True, value_shifted=True,
)  # fmt: skip
ROTATED = KVSpec(FOUR, FOUR, recent=32, key_rotation="learned")


def read(model, cache, ids, pieces=None):
    """Logits of every token, read in pieces through ``cache``."""
    pieces = pieces or (40, 1, 1, ids.shape[1] - 42)
    with torch.no_grad():
        return torch.cat([model(piece, **{cache_argument(model): cache}).logits for piece in ids.split(pieces, 1)], 1)


def test_a_format_says_what_it_needs_of_calibration():
    assert ALL.calibrated == set(BUFFERS)
    assert ROTATED.calibrated == {"key_rotation"}
    assert not KVSpec(FOUR, FOUR, key_rotation="hadamard").calibrated
    assert not replace(ALL, key=None, value=None).calibrated  # what is not packed needs no coordinates
    assert KVFormats(None, (KVRule((0,), ROTATED),)).calibrated == {"key_rotation"}


@pytest.mark.parametrize("grain", [PerToken(), PerGroup(32)], ids=str)
def test_coordinates_that_change_nothing_change_nothing(grain):
    """Bit for bit: a calibration starts so, and so does a shift of zero, a scale of one."""
    spec = KVSpec(Spec(Int(3, zero="real"), grain), Spec(Int(3, zero="real"), grain), recent=8)
    asked = replace(spec, key_scaled=True, key_shifted=True, value_scaled=True, value_shifted=True)
    start = CacheCalibration(CalibrationSpec.of(asked.calibrated, (2, 64, 64)))
    states = torch.randn(2, 2, 2, 100, 64, generator=torch.Generator().manual_seed(0)).unbind()
    plain, placed = PackedLayer(spec), PackedLayer(asked, *calibrated_coordinates(asked, start))
    for a, b in zip(plain.update(*states), placed.update(*states), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain.keys_values(), placed.keys_values(), strict=True):
        assert torch.equal(a, b)


def test_the_same_rotation_for_every_head_is_the_one_for_all():
    spec = replace(ROTATED, recent=8)
    found = CacheCalibration(CalibrationSpec(heads=(2, 64, 64), buffers=("key_rotation",)))
    found.fill({"key_rotation": hadamard(64).expand(2, 64, 64)})
    states = torch.randn(2, 2, 2, 100, 64, generator=torch.Generator().manual_seed(0)).unbind()
    learned, fixed = (
        PackedLayer(spec, *calibrated_coordinates(spec, found)),
        PackedLayer(replace(spec, key_rotation="hadamard")),
    )
    learned.update(*states), fixed.update(*states)
    for a, b in zip(learned.keys_values(), fixed.keys_values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_tokens_come_back_from_any_coordinates_to_float_error():
    for _, _, found in calibrations(calibrated(llama(), BUFFERS)):
        for place in calibrated_coordinates(ALL, found):
            x = torch.randn(1, 2, 9, 64)
            limit = (
                64 * torch.finfo(torch.float32).eps * place.scale.max().item()
            )  # an error of a large channel is spread
            torch.testing.assert_close(place.inverse(place.forward(x)), x, atol=limit, rtol=0)


def test_the_finest_codes_in_rotated_coordinates_are_as_near_as_in_the_plain_ones():
    model, ids = calibrated(llama(), BUFFERS), tokens(1, 62)
    fine = Spec(Int(8, zero="real"), PerToken(), scale_dtype="float32")
    exact = read(model, packed_cache(model, KVSpec(None, None)), ids)
    plain = (read(model, packed_cache(model, KVSpec(fine, fine)), ids) - exact).abs().mean()
    rotated = KVSpec(fine, fine, key_rotation="learned", value_rotation="learned")
    assert 0 < (read(model, packed_cache(model, rotated), ids) - exact).abs().mean() < 2 * plain


def test_a_layer_of_floats_in_any_coordinates_is_the_full_cache():
    model, ids = calibrated(llama(), BUFFERS), tokens(1, 62)
    name = cache_argument(model)
    with torch.no_grad():
        wanted = model(ids).logits
    found = read(model, packed_cache(model, replace(ALL, key=None, value=None)), ids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert name in ("cache", "past_key_values")


# ---- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A model in memory with coordinates, and its checkpoint."""
    model = calibrated(llama(), BUFFERS, seed=3)
    set_kv_formats(model, KVFormats(ALL))
    native.save(model, tmp_path / "saved")
    return model, tmp_path / "saved"


def test_a_checkpoint_brings_coordinates_back_bit_for_bit_in_any_dtype(saved):
    model, directory = saved
    before = {path: found for path, _, found in calibrations(model)}
    assert len(before) == 4
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["version"] == 7 and ModelDescription.from_json(config) == ModelDescription.of(model)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = lowbit.load(directory, dtype=dtype)
        assert ModelDescription.of(loaded) == ModelDescription.of(model)
        for path, _, found in calibrations(loaded):
            for name, buffer in found.named_buffers():
                assert buffer.dtype == torch.float32 and torch.equal(buffer, before[path].get_buffer(name))


def test_coordinates_keep_their_dtype_when_the_model_is_cast():
    model = calibrated(llama(), ["key_rotation"]).to(torch.bfloat16)
    assert {buffer.dtype for _, _, found in calibrations(model) for buffer in found.buffers()} == {torch.float32}


def test_every_way_to_a_cache_uses_the_coordinates(saved):
    """kv_cache, generate and evaluation make the cache that has them; another one would give other numbers."""
    directory = saved[1]
    loaded, ids = lowbit.load(directory), tokens(1, 80)
    places = [calibrated_coordinates(ALL, found) for _, _, found in calibrations(loaded)]
    by_hand = PackedCache(loaded.config, ALL, (), dict(enumerate(places)))
    other = PackedCache(loaded.config, replace(ALL, key_rotation="hadamard", value_rotation="hadamard", key_scaled=False, key_shifted=False, value_scaled=False, value_shifted=False))  # fmt: skip
    wanted = read(loaded, by_hand, ids, (60, 20))
    assert not torch.equal(read(loaded, other, ids, (60, 20)), wanted)
    torch.testing.assert_close(read(loaded, lowbit.kv_cache(loaded, ALL), ids, (60, 20)), wanted, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    by_hand = PackedCache(loaded.config, ALL, (), dict(enumerate(places)))
    by_hand.stay_packed(True)
    generated = loaded.generate(ids, **options)
    assert torch.equal(generated, loaded.generate(ids, **options, **{cache_argument(loaded): by_hand}))
    by_hand = PackedCache(loaded.config, ALL, (), dict(enumerate(places)))
    by_hand.stay_packed(True)
    found = lowbit.evaluation.forward.logits_of(loaded, ids[0], chunk=16)
    torch.testing.assert_close(found, read(loaded, by_hand, ids, (16,) * 5)[0], atol=1e-4, rtol=1e-4)


def test_a_format_takes_of_the_coordinates_only_what_it_asks_for(saved):
    loaded, ids = lowbit.load(saved[1]), tokens(1, 80)
    for spec in (KVSpec(FOUR, FOUR, recent=32), ROTATED):
        found = read(loaded, lowbit.kv_cache(loaded, spec), ids)
        for _, _, calibration in calibrations(loaded):
            calibration.fill(
                {name: torch.randn_like(calibration.get_buffer(name)) for name in ("key_shift", "value_scale")}
            )
        assert torch.equal(read(loaded, lowbit.kv_cache(loaded, spec), ids), found)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("key_rotation", lambda t: t * 1.01, "key_rotation is no rotation"),
        ("key_scale", lambda t: t * -1, r"key_scale holds -.*, expected scales above zero"),
        ("value_shift", lambda t: t * torch.nan, "value_shift holds NaN or Inf"),
        ("value_rotation", lambda t: t[:, :32], r"value_rotation is torch.float32 \[2, 32, 64\]"),
        ("value_scale", None, "value_scale of the model that config.json describes is not in the checkpoint"),
    ],
)
def test_damaged_coordinates_are_refused(saved, name, damage, message):
    _, directory = saved
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    key = f"model.layers.2.self_attn.lowbit_cache.{name}"
    if damage is None:
        del tensors[key]
    else:
        tensors[key] = damage(tensors[key]).contiguous()
    save_file(tensors, file)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = dict.fromkeys(tensors, file.name)
        index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        lowbit.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("kv_calibration"), "needs what only calibration finds"),
        (lambda c: c["kv_calibration"][0][1].pop(), r"layers \[3\]"),
        (
            lambda c: c["kv_calibration"][0][0].update(heads=[4, 32, 32]),
            "4 key-value heads of 32 channels in the checkpoint",
        ),
        (
            lambda c: c["kv_calibration"][0][0].update(buffers=["key_rotations"]),
            "the calibration of a cache has some of",
        ),
        (lambda c: c["kv_calibration"][0][0].update(buffers=["value_scale"]), "needs what only calibration finds"),
        (lambda c: c["kv_calibration"][0].__setitem__(1, ["model.norm"]), "model.norm, which is a LlamaRMSNorm"),
        (lambda c: c.update(kv_calibration=4), "kv_calibration is a list"),
        (lambda c: c.update(kv_calibration=[[{"type": "Int", "bits": 4}, []]]), "is no CalibrationSpec"),
    ],
)
def test_a_damaged_description_of_coordinates_is_refused(saved, change, message):
    _, directory = saved
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        lowbit.load(directory)


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_without_calibration_cannot_have_a_cache_that_needs_it(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    for make in (
        lambda: lowbit.kv_cache(model, ROTATED),
        lambda: lowbit.kv_cache(model.config, ROTATED),
        lambda: use_cache(model, KVFormats(ROTATED)),
        lambda: lowbit.load(tmp_path / "plain", kv=ROTATED),
        lambda: packed_cache(calibrated(llama(), ["value_scale"]), ROTATED),
    ):
        with pytest.raises(ValueError, match=r"only calibration finds \(key rotation\).*--calibration TEXT"):
            make()
    with pytest.raises(ValueError, match="there is none: make the cache from a model"):
        read(model, PackedCache(model.config, ROTATED), tokens(1, 62))


def test_coordinates_of_another_model_are_refused():
    wrong = Coordinates(torch.eye(32).expand(2, 32, 32))
    with pytest.raises(ValueError, match=r"the rotation of keys is \[2, 32, 32\].* 2 heads of 64 channels"):
        PackedLayer(ROTATED, wrong).update(*torch.randn(2, 1, 2, 5, 64).unbind())


def test_a_recipe_whose_cache_nothing_calibrates_is_refused():
    with pytest.raises(
        ValueError, match=r"only calibration finds \(key_rotation\), and no stage of the recipe finds it"
    ):
        Recipe("alone", Scheme(kv=ROTATED))


# ---- a step of the walk may find them --------------------------------------------------------------------------------


@serializable
@dataclass(frozen=True)
class TurnKeys(Step):
    """Gives every layer's keys a rotation, drawn from the block's seed."""

    @property
    def cache_parts(self) -> frozenset[str]:
        return frozenset({"key_rotation"})

    def run(self, state) -> None:
        for path in attention_modules(state.resolved):
            made = calibrate_cache(state.block.get_submodule(path), CalibrationSpec((2, 16, 16), ("key_rotation",)))
            drawn = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(state.seed))
            made.fill({"key_rotation": torch.linalg.qr(drawn)[0]})


class Stopped(Exception):
    """A run that was killed."""


def test_what_a_step_of_the_walk_finds_is_stored_and_survives_a_kill(tmp_path):
    source, ids = tiny_llama(tmp_path / "model"), random_ids(2, 48)
    scheme = replace(linears(weight(4, 32)), kv=replace(ROTATED, recent=16))
    recipe = Recipe.blockwise("turned", scheme, (TurnKeys(), Solve(Nearest())))

    def stop(done, total, text):
        if done >= 1:
            raise Stopped

    lowbit.quantize(source, recipe, ids, out=tmp_path / "whole", allow_broken=True)
    with pytest.raises(Stopped):
        lowbit.quantize(source, recipe, ids, out=tmp_path / "killed", allow_broken=True, progress=stop)
    lowbit.quantize(source, recipe, ids, out=tmp_path / "killed", allow_broken=True)
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("whole", "killed")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    loaded = lowbit.load(tmp_path / "whole")
    rotations = [found.key_rotation for _, _, found in calibrations(loaded)]
    assert len(rotations) == 2 and not torch.equal(*rotations)
    assert cache_calibration(loaded.model.layers[0].self_attn) is not None
    weights = sum(file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors"))
    foreseen = plan(source, recipe, samples=2, seq_len=48).bytes_out
    assert 0 <= weights - foreseen < 8000  # headers
