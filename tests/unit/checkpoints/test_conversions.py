"""From format to format: where the grids agree, codes, scales and zero points are the same bits at every station."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.formats.integers import codes_of
from lowbit.cli import app
from lowbit.modules import QuantLinear
from lowbit.plan import plan
from lowbit.recipes import Blockwise, Recipe, Train
from lowbit.scheme import linears, weight
from lowbit.solve import Nearest
from lowbit.steps import RotateResidual, Solve
from lowbit.training import CayleySGD, Cosine, NextToken, Rotations

from helpers import random_ids, tiny_llama


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


def quantized(place: Path, method: str = "rtn", ids=None, **options) -> Path:
    tiny_llama(place / "model", blocks=1, dtype=torch.float16, intermediate_size=128)
    lowbit.quantize(place / "model", lowbit.recipe(method, **options), ids, out=place / "q", max_kl=50)
    return place / "q"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(a: Path, b: Path) -> None:
    """The tensors of two directories, bit for bit; norms in any dtype that holds them, as GGUF has them in float32."""
    before, after = tensors_of(a), tensors_of(b)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.float(), after[name].float()), name
        assert tensor.dtype == after[name].dtype or "norm" in name, name


CHAINS = [
    ({"bits": 4, "group_size": 32}, ["gptq", "compressed-tensors", "awq", "gptq:v2"]),
    ({"bits": 4, "group_size": 32, "symmetric": True}, ["gguf", "gptq:v1", "awq", "gguf", "compressed-tensors"]),
    ({"bits": 3, "group_size": 16}, ["compressed-tensors:transformers", "gptq", "compressed-tensors"]),
]


@pytest.mark.parametrize(("options", "chain"), CHAINS, ids=str)
def test_a_way_through_formats_ends_in_the_same_bits(tmp_path, options, chain):
    source = place = quantized(tmp_path, **options)
    for i, name in enumerate(chain):
        lowbit.export(place, name, out=tmp_path / str(i))
        place = tmp_path / str(i)
    lowbit.export(place, "native", out=tmp_path / "end")
    assert_same(source, tmp_path / "end")
    ids = random_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(lowbit.load(source)(ids).logits, lowbit.load(tmp_path / "end")(ids).logits)


KEPT = {
    "nf4, scales in 8 bits": ("nf4", {"double_quant": True}, "bitsandbytes"),
    "fp4": ("nf4", {"levels": "fp4", "block": 128}, "bitsandbytes"),
    "int8": ("llm-int8", {}, "bitsandbytes"),
    "fp8 static": ("fp8", {"activations": "static"}, "compressed-tensors"),
    "nvfp4": ("nvfp4", {}, "compressed-tensors"),
    "mxfp4": ("mxfp4", {}, "compressed-tensors"),
    "8 bits, tokens": ("rtn", {"bits": 8, "group_size": None, "activation_bits": 8}, "compressed-tensors"),
    "8 bits static": ("smoothquant", {"level": "O3"}, "compressed-tensors"),
    "7 bits": ("rtn", {"bits": 7, "group_size": None, "symmetric": True}, "compressed-tensors"),
}


@pytest.mark.parametrize(("method", "options", "name"), KEPT.values(), ids=KEPT)
def test_a_format_gives_back_what_it_was_given(tmp_path, method, options, name):
    source = quantized(tmp_path, method, random_ids(4, 32), **options)
    lowbit.export(source, name, out=tmp_path / "out")
    lowbit.export(tmp_path / "out", "native", out=tmp_path / "back")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if method == "nvfp4" and key.endswith("scale_scale"):  # kept as its reciprocal
            torch.testing.assert_close(after[key], tensor, rtol=2**-22, atol=0)
        else:
            assert torch.equal(after[key].float(), tensor.float()), key
    ids, tolerance = random_ids(2, 16), 1e-5 if method == "nvfp4" else 0
    with torch.no_grad():
        given, back = (lowbit.load(where)(ids).logits for where in (source, tmp_path / "back"))
    kept = ((given - back).abs() <= tolerance).all(-1)
    # An input on the edge between two codes takes the other one where a scale differs in its last bit: of one token of 32 at most.
    assert (~kept).sum() <= (method == "nvfp4")


def test_layers_of_several_formats_have_groups_of_their_own(tmp_path):
    tiny_llama(tmp_path / "model", blocks=1, dtype=torch.float16)
    rules = [{"match": "down", "bits": 8}, {"match": "v", "skip": True}]
    recipe = {"method": "rtn", "options": {"bits": 3, "group_size": 32}, "overrides": rules}
    lowbit.quantize(tmp_path / "model", recipe, None, out=tmp_path / "q", format="compressed-tensors", max_kl=50)
    config = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    groups = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert groups[8] == ["model.layers.0.mlp.down_proj"] and len(groups[3]) == 5
    layers = {n: m for n, m in lowbit.load(tmp_path / "q").named_modules() if isinstance(m, QuantLinear)}
    assert {layer.spec.grid.bits for layer in layers.values()} == {3, 8} and len(layers) == 6
    with pytest.raises(ValueError, match="it has one format for all layers"):
        lowbit.export(tmp_path / "q", "gptq", out=tmp_path / "gptq")


# Caches


def test_a_quantized_cache_of_integers_in_compressed_tensors_is_left_out_with_a_warning(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32, symmetric=True)
    lowbit.export(source, "compressed-tensors", out=tmp_path / "out")
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
    scale = {f"model.layers.0.self_attn.{name}_scale": torch.ones(1) for name in ("k", "v")}
    changed(tmp_path / "out", lambda tensors: tensors | scale, lambda c: c | {"kv_cache_scheme": scheme})
    index = tmp_path / "out/model.safetensors.index.json"
    index.unlink()
    with pytest.warns(UserWarning, match="the cache is quantized in this model"):
        lowbit.export(tmp_path / "out", "native", out=tmp_path / "back")
    assert_same(source, tmp_path / "back")


# Rotations


def rotated(solver, learned: bool = False) -> Recipe:
    scheme = linears(weight(8, 32), None)
    blockwise = Blockwise((RotateResidual(learned), Solve(solver)))
    train = Train(Rotations(), NextToken(), epochs=1, lr=1.5, optimizer=CayleySGD(), schedule=Cosine())
    return Recipe("rotated", scheme, (train, blockwise) if learned else (blockwise,))


@pytest.mark.parametrize("learned", [False, True], ids=["drawn", "learned"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_rotated_residual_stream_is_folded_into_embedding_and_head(tmp_path, tied, learned):
    tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    recipe = rotated(Nearest(), learned).with_overrides([{"match": "embedding", "bits": 16}])
    answers = plan(tmp_path / "model", recipe).compatibility
    lowbit.quantize(tmp_path / "model", recipe, random_ids(2, 16) if learned else None, out=tmp_path / "q", max_kl=50)
    ids = random_ids(2, 16)
    with torch.no_grad():
        wanted = lowbit.load(tmp_path / "q")(ids).logits
    for name in ("compressed-tensors", "gptq"):
        assert answers[find_format(name).title].startswith("yes")
        lowbit.export(tmp_path / "q", name, out=tmp_path / name)
        assert not any("lowbit" in tensor for tensor in tensors_of(tmp_path / name))
        model = lowbit.load(tmp_path / name)
        assert not model.config.tie_word_embeddings
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=2e-4)


def test_a_rotation_that_cannot_be_folded_is_refused_with_the_way_around_it(tmp_path):
    tiny_llama(tmp_path / "model", blocks=1)
    answers = plan(tmp_path / "model", "quarot").compatibility
    assert "a recipe with RotateResidual and no other rotation folds all of them" in answers["GPTQ format"]
    packed = rotated(Nearest()).with_overrides([{"match": "embedding", "bits": 8}])
    assert "--embedding-bits 16 --head-bits 16" in plan(tmp_path / "model", packed).compatibility["GPTQ format"]


# Files as other tools write them


def changed(directory: Path, change, config=None) -> None:
    """Rewrites the tensors of a directory, and its quantization_config."""
    for file in directory.glob("*.safetensors"):
        save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file, {"format": "pt"})
    if config is not None:
        path = directory / "config.json"
        content = json.loads(path.read_text())
        content["quantization_config"] = config(content["quantization_config"])
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def weights_of(place: Path) -> dict[str, torch.Tensor]:
    model = lowbit.load(place)
    return {name: m.effective_weight() for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def assert_same_weights(a: Path, b: Path) -> None:
    before, after = weights_of(a), weights_of(b)
    assert before.keys() == after.keys() and len(before) == 7
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def in_words(delta: int, bits: int):
    """Adds to every field of words of zero points at once, with carries, as GPTQModel does."""
    ones = sum(1 << at for at in range(0, 32, bits))

    def change(tensors):
        return {n: (t.long() + delta * ones).to(torch.int32) if n.endswith("qzeros") else t for n, t in tensors.items()}

    return change


def test_version_1_of_gptqmodel_has_zero_points_with_carries(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32)
    lowbit.export(source, "gptq:v2", out=tmp_path / "v1")

    def with_zeros(tensors):
        return {n: t & ~15 if n.endswith("qzeros") else t for n, t in tensors.items()}

    changed(tmp_path / "v1", with_zeros)
    lowbit.export(tmp_path / "v1", "native", out=tmp_path / "v2")
    changed(
        tmp_path / "v1",
        in_words(-1, 4),
        lambda c: c | {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
    )
    assert_same_weights(tmp_path / "v2", tmp_path / "v1")
    changed(tmp_path / "v1", lambda tensors: tensors, lambda c: c | {"meta": {"quantizer": ["autogptq:0.7"]}})
    with pytest.raises(ValueError, match="a zero point of zero, which tools of version 1 store in different ways"):
        find_format("gptq").read(tmp_path / "v1")


def test_what_auto_gptq_says_in_a_file_of_its_own_is_read(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32, symmetric=True)
    lowbit.export(source, "gptq", out=tmp_path / "old")
    (tmp_path / "old/quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True})
    )
    changed(tmp_path / "old", lambda tensors: tensors, lambda c: None)
    assert_same_weights(source, tmp_path / "old")


def test_what_auto_awq_says_in_a_file_of_its_own_is_read(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32)
    lowbit.export(source, "awq", out=tmp_path / "old")
    said = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "old/quant_config.json").write_text(json.dumps(said))
    changed(tmp_path / "old", lambda tensors: tensors, lambda c: None)
    assert_same_weights(source, tmp_path / "old")


def test_a_group_of_compressed_tensors_names_layers_by_name_pattern_or_class(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32, symmetric=True)
    lowbit.export(source, "compressed-tensors", out=tmp_path / "out")

    def by_class(config):
        group = config["config_groups"]["group_0"]
        wrong = group | {"weights": group["weights"] | {"num_bits": 8}}
        patterns = group | {"targets": ["re:.*self_attn.*", "re:.*mlp.*"]}
        return config | {"config_groups": {"a": wrong | {"targets": ["Linear"]}, "b": patterns}, "ignore": ["lm_head"]}

    changed(tmp_path / "out", lambda tensors: tensors, by_class)
    assert_same_weights(source, tmp_path / "out")


def test_whole_codes_in_words_of_older_versions_are_read(tmp_path):
    source = quantized(tmp_path, bits=3, group_size=16, symmetric=True)
    lowbit.export(source, "compressed-tensors", out=tmp_path / "old")

    def padded(tensors):
        found = dict(tensors)
        for name, packed in tensors.items():
            if name.endswith("weight_packed"):
                columns = int(tensors[name.replace("packed", "shape")][1])
                codes = codes_of(packed, 3, columns)
                codes = torch.nn.functional.pad(codes, (0, -columns % 10)).unflatten(1, (-1, 10)).int()
                found[name] = sum(codes[..., i] << 3 * i for i in range(10)).to(torch.int32)
        return found

    changed(tmp_path / "old", padded)
    assert_same_weights(source, tmp_path / "old")


def test_groups_in_an_order_of_their_own_become_a_column_order(tmp_path):
    source = quantized(tmp_path, "gptq", random_ids(8, 32), bits=4, group_size=16, act_order=True)
    lowbit.export(source, "gptq", out=tmp_path / "out")
    lowbit.export(tmp_path / "out", "native", out=tmp_path / "back")
    assert_same_weights(source, tmp_path / "back")
    with pytest.raises(ValueError, match="layers keep column orders of inputs"):
        lowbit.export(tmp_path / "out", "compressed-tensors", out=tmp_path / "no")


def test_a_block_scale_that_is_zero_stands_for_zeros(tmp_path):
    tiny_llama(tmp_path / "model", blocks=1, dtype=torch.float16)
    model = load_file(tmp_path / "model/model.safetensors")
    model["model.layers.0.mlp.up_proj.weight"][:4] = 0
    save_file(model, tmp_path / "model/model.safetensors", {"format": "pt"})
    lowbit.quantize(tmp_path / "model", "nf4", None, out=tmp_path / "q")
    lowbit.export(tmp_path / "q", "bitsandbytes", out=tmp_path / "out")
    before = weights_of(tmp_path / "q")

    def zeros(tensors):
        return {n: t.where(t > 1e-20, 0) if n.endswith("absmax") else t for n, t in tensors.items()}

    changed(tmp_path / "out", zeros)
    after = weights_of(tmp_path / "out")
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


# Commands


def test_import_keeps_a_model_of_another_tool_and_commands_take_it_as_it_is(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32)
    lowbit.export(source, "awq", out=tmp_path / "awq")
    runner = CliRunner()
    result = runner.invoke(app, ["import", str(tmp_path / "awq"), "-o", str(tmp_path / "kept")])
    assert result.exit_code == 0 and "7 packed layers" in result.stdout
    assert_same(source, tmp_path / "kept")
    result = runner.invoke(app, ["import", str(tmp_path / "model"), "-o", str(tmp_path / "none")])
    assert result.exit_code == 1 and "nothing is packed in it" in result.stderr
    assert not (tmp_path / "none").exists()
