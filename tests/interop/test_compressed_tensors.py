"""transformers with the package compressed-tensors loads what is exported, with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import lowbit
from lowbit.checkpoints.formats.compressed_weights import FORMATS
from lowbit.modules import QuantLinear

from helpers import random_ids, tiny_llama

pytest.importorskip("compressed_tensors")
apply = pytest.importorskip("compressed_tensors.quantization.lifecycle.apply")
initialize = pytest.importorskip("compressed_tensors.quantization.lifecycle.initialize")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the package

WEIGHTS = {
    "2 bits": ("rtn", {"bits": 2, "group_size": 16, "symmetric": True}),
    "3 bits": ("rtn", {"bits": 3, "group_size": 16, "symmetric": True}),
    "4 bits": ("rtn", {"bits": 4, "group_size": 32, "symmetric": True}),
    "5 bits": ("rtn", {"bits": 5, "group_size": 32, "symmetric": True}),
    "6 bits": ("rtn", {"bits": 6, "group_size": None, "symmetric": True}),
    "7 bits": ("rtn", {"bits": 7, "group_size": None, "symmetric": True}),
    "8 bits": ("rtn", {"bits": 8, "group_size": None, "symmetric": True}),
    "fp8": ("fp8", {"activations": "none"}),
    "fp8 groups": ("fp8", {"activations": "none", "group_size": 32}),
}
FLOATS = {"mxfp4": ("mxfp4", 0.0), "nvfp4": ("nvfp4", 2**-7)}  # the package decodes them in bfloat16
ASYMMETRIC = [{"bits": 4, "group_size": 32}, {"bits": 3, "group_size": 16}, {"bits": 8, "group_size": None}]
# The package divides a token's largest magnitude by 127.5, this project by 127: each rounds in its own places.
INPUTS = {
    "integers, each token": ("rtn", {"bits": 8, "group_size": None, "symmetric": True, "activation_bits": 8}, 0.6),
    "integers, one range": ("smoothquant", {"level": "O3"}, 0.02),
    "fp8, each token": ("fp8", {}, 0.02),
    "fp8, one range": ("fp8", {"activations": "static"}, 0.02),
    "4-bit weights, integers": ("rtn", {"group_size": 32, "symmetric": True, "activation_bits": 8}, 0.1),
}


def exported(place: Path, method: str, options: dict, name: str = "compressed-tensors") -> None:
    """A tiny model that lies in ``place / "out"`` in the format ``name``."""
    tiny_llama(place / "model", dtype=torch.float16)
    recipe = lowbit.recipe(method, **options)
    recipe = recipe.with_overrides([{"match": "embedding", "bits": 16}])
    lowbit.quantize(place / "model", recipe, random_ids(8, 32), out=place / "q", max_kl=50)
    lowbit.export(place / "q", name, out=place / "out")


def assert_same_weights(place: Path, model, dtype: torch.dtype = torch.float32) -> None:
    for name, layer in lowbit.load(place / "q", dtype=torch.float32).named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(model.get_submodule(name).weight, layer.dequantize().to(dtype)), name


@torch.no_grad()
@pytest.mark.parametrize(("method", "options"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_decoded_to_the_same_bits(tmp_path, method, options):
    exported(tmp_path, method, options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = random_ids(2, 16)
    logits = model(ids).logits  # which decodes the weights
    assert_same_weights(tmp_path, model)
    torch.testing.assert_close(logits, lowbit.load(tmp_path / "q", dtype=torch.float32)(ids).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("method", "rounding"), FLOATS.values(), ids=FLOATS)
def test_floats_of_4_bits_are_decoded_to_the_same_numbers_in_bfloat16(tmp_path, method, rounding):
    exported(tmp_path, method, {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    model(random_ids(2, 16))
    for name, layer in lowbit.load(tmp_path / "q", dtype=torch.float32).named_modules():
        if isinstance(layer, QuantLinear):
            found = model.get_submodule(name).weight.float()
            torch.testing.assert_close(found, layer.dequantize(), rtol=rounding, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("options", ASYMMETRIC, ids=str)
def test_weights_with_zero_points_are_decoded_to_the_same_numbers_when_transformers_is_asked_to_decode(
    tmp_path, options
):
    # compressed-tensors 0.20 does not load packed zero points without this: its module expects them unpacked.
    exported(tmp_path, "rtn", options)
    decoded = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16, quantization_config=decoded)
    assert_same_weights(tmp_path, model, torch.float16)


@torch.no_grad()
@pytest.mark.parametrize("options", [each for each in ASYMMETRIC if each["group_size"]], ids=str)
def test_zero_points_in_bytes_are_loaded_by_default(tmp_path, options):
    exported(tmp_path, "rtn", options, "compressed-tensors:transformers")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model(random_ids(2, 16))
    assert_same_weights(tmp_path, model)


@torch.no_grad()
@pytest.mark.parametrize(("method", "options", "tolerance"), INPUTS.values(), ids=INPUTS)
def test_quantized_inputs_have_the_formats_that_they_have_here(tmp_path, method, options, tolerance):
    exported(tmp_path, method, options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = random_ids(4, 32)
    theirs = model(ids).logits.log_softmax(-1)
    assert_same_weights(tmp_path, model)
    ours = lowbit.load(tmp_path / "q", dtype=torch.float32)(ids).logits.log_softmax(-1)
    plain = lowbit.load(tmp_path / "model", dtype=torch.float32)(ids).logits.log_softmax(-1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1).mean().item()

    assert kl(ours, theirs) < tolerance * kl(plain, ours), (kl(ours, theirs), kl(plain, ours))


def test_its_converter_of_awq_files_makes_what_is_exported_as_compressed_tensors(tmp_path):
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    exported(tmp_path, "rtn", {"bits": 4, "group_size": 32}, "awq")
    lowbit.export(tmp_path / "q", "compressed-tensors", out=tmp_path / "ours")
    found = AutoAWQConverter(group_size=32).process(load_file(tmp_path / "out/model.safetensors"))
    expected = load_file(tmp_path / "ours/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


PRESETS = ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"]


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_that_the_package_compresses_are_read_as_it_decompresses_them(preset):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"])
    args, w = scheme.weights, torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    high, wide = args.block_structure or (256 if args.strategy == "tensor" else 1, args.group_size or 256)
    tiles = w.view(256 // high, high, 256 // wide, wide)
    lo, hi = tiles.amin((1, 3)), tiles.amax((1, 3))
    whole = generate_gparam(lo.min(), hi.max()).reshape(1) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(lo, hi, args, global_scale=whole)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": whole}
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    stored = compressor.compress({name: t for name, t in state.items() if t is not None}, scheme)
    name = infer_module_format(torch.nn.Linear, scheme).value
    description, buffers = FORMATS[name].read(scheme.model_dump()["weights"], stored)
    theirs = compressor.decompress(stored, scheme)["weight"]
    ours = QuantLinear(description, buffers).dequantize()
    torch.testing.assert_close(ours, theirs.float(), rtol=2**-7 if preset == "NVFP4A16" else 0, atol=0)
    assert (ours - w).square().mean() < 0.02


@torch.no_grad()
def test_the_scales_of_a_static_cache_are_those_that_the_package_gives_attention_modules(tmp_path, monkeypatch):
    """The package (0.20) knows an attention module by its argument ``past_key_values``, which transformers 5.24 calls
    ``cache``: there it leaves the cache as it is, and reports the scales as unexpected. Told which modules attend, it takes them all."""
    tiny_llama(tmp_path / "model", dtype=torch.float16)
    recipe = lowbit.recipe("rtn", bits=4, group_size=32, symmetric=True)
    recipe = recipe.with_cache(lowbit.recipe("kv-fp8", ranges="static", heads="shared"))
    recipe = recipe.with_overrides([{"match": "embedding", "bits": 16}])
    lowbit.quantize(tmp_path / "model", recipe, random_ids(8, 32), out=tmp_path / "q", max_kl=50)
    lowbit.export(tmp_path / "q", "compressed-tensors", out=tmp_path / "out")
    for module in (apply, initialize):
        monkeypatch.setattr(module, "is_cached_attention_module", lambda each: isinstance(each, LlamaAttention))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    files = (tmp_path / "out").glob("*.safetensors")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for i, layer in enumerate(model.model.layers):
        for name in ("k_scale", "v_scale"):
            assert getattr(layer.self_attn, name).item() == stored[f"model.layers.{i}.self_attn.{name}"].item()
