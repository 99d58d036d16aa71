"""GGUF: what is written is read back bit for bit, runs as it did, and what has no place is refused before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoints import native
from lowbit.checkpoints.formats import find_format, gguf_reading
from lowbit.checkpoints.formats.base import TensorRole
from lowbit.checkpoints.formats.gguf import FILE, Gguf
from lowbit.checkpoints.formats.gguf_presets import types_of
from lowbit.checkpoints.formats.gguf_types import decode, encode, type_of
from lowbit.cli import app
from lowbit.job import prepare
from lowbit.layouts import pack_qtensor, unpack_qtensor
from lowbit.layouts.ggml import BLOCK_TYPES, IQ4_LEVELS
from lowbit.modules import QuantEmbedding, QuantLinear
from lowbit.numerics import Int, MinMax, PerChannel, PerGroup, Spec, quantize
from lowbit.plan import explain, plan

from helpers import random_ids, tiny_llama


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


def quantized(place: Path, **options) -> Path:
    tiny_llama(place / "model", intermediate_size=128)
    lowbit.quantize(place / "model", lowbit.recipe("rtn", **options), None, out=place / "q")
    return place / "q"


def layers_of(model) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


# Types


EXACT = {
    "4 bits symmetric": (Spec(Int(4, symmetric=True), PerGroup(32)), "Q4_0"),
    "4 bits symmetric, larger groups": (Spec(Int(4, symmetric=True), PerGroup(64)), "Q4_0"),
    "3 bits symmetric": (Spec(Int(3, symmetric=True), PerGroup(32)), "Q4_0"),
    "4 bits full": (Spec(Int(4, symmetric=True, full=True), PerGroup(32)), "Q4_0"),
    "3 bits asymmetric": (Spec(Int(3), PerGroup(32)), "Q4_0"),
    "4 bits asymmetric": (Spec(Int(4), PerGroup(128)), "Q5_0"),
    "5 bits symmetric": (Spec(Int(5, symmetric=True), PerGroup(96)), "Q5_0"),
    "5 bits asymmetric": (Spec(Int(5), PerChannel()), "Q8_0"),
    "8 bits symmetric": (Spec(Int(8, symmetric=True), PerChannel(), scale_dtype="float32"), "Q8_0"),
    "7 bits asymmetric": (Spec(Int(7), PerGroup(32)), "Q8_0"),
}


@pytest.mark.parametrize(("spec", "name"), EXACT.values(), ids=EXACT)
def test_integers_are_stored_as_they_are_in_the_smallest_type_that_has_their_levels(spec, name):
    w = torch.randn(6, 320, generator=torch.Generator().manual_seed(0))
    w[1, 64:96] = 0
    q = quantize(w, spec, MinMax())
    tensors, shape = pack_qtensor(q), (6, 320)
    if spec.scale_dtype == "float32":  # of numbers that float16 holds
        tensors["scale"] = tensors["scale"].half().float()
    kind, data = encode(spec, shape, tensors)
    assert kind.name == name
    theirs = torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(theirs, unpack_qtensor(tensors, spec, shape).dequantize())


def test_blocks_of_iq4_nl_meet_its_largest_level_with_their_extreme_whatever_its_sign():
    w = torch.linspace(-1, 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))].view(1, 64)
    q = quantize(torch.cat([w, -w]), BLOCK_TYPES["IQ4_NL"].spec, MinMax())
    assert (q.params.scale < 0).any() and (q.params.scale > 0).any()
    assert torch.equal(q.dequantize()[0], -q.dequantize()[1])
    plain = replace(IQ4_LEVELS, signed=False)
    kind, data = encode(
        Spec(plain, PerGroup(32)),
        (2, 64),
        pack_qtensor(quantize(torch.cat([w, -w]), Spec(plain, PerGroup(32)), MinMax())),
    )
    assert kind.name == "IQ4_NL" and data.shape == (2, 36)  # what was packed with positive scales alone


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_a_weight_in_a_type_of_its_own_comes_back_with_its_codes_and_scales(kind):
    q = quantize(torch.randn(6, 512, generator=torch.Generator().manual_seed(0)), kind.spec, MinMax())
    tensors = pack_qtensor(q)
    found, data = encode(kind.spec, (6, 512), tensors, kind.name)
    assert found is kind
    spec, back = decode(kind, data, (6, 512))
    assert spec == kind.spec and back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_positive_scales_come_back_as_plain_symmetric_integers():
    spec = Spec(Int(4, symmetric=True), PerGroup(32))
    tensors = pack_qtensor(quantize(torch.randn(4, 64), spec, MinMax()))
    kind, data = encode(spec, (4, 64), tensors)
    back = decode(kind, data, (4, 64))
    assert back is not None and back[0] == spec
    assert all(torch.equal(back[1][name], tensors[name]) for name in tensors)


def test_a_scale_that_float16_does_not_hold_is_refused():
    spec = Spec(Int(8, symmetric=True), PerGroup(32), scale_dtype="bfloat16")
    tensors = pack_qtensor(quantize(torch.full((1, 32), 1e-6), spec, MinMax()))
    with pytest.raises(ValueError, match=r"a scale of .* is no number of float16"):
        encode(spec, (1, 32), tensors)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Spec(Int(4, zero="real"), PerGroup(32)), "integers with plain scales"),
        (Spec(Int(8), PerGroup(32)), "up to 8 bits, which 8 bits with zero points do not fit"),
        (Spec(Int(1, symmetric=True), PerGroup(32)), "no level at zero"),
        (Spec(Int(4, symmetric=True), PerGroup(48)), "--group-size 32 or a multiple of it fits"),
        (BLOCK_TYPES["Q4_K"].spec, "blocks of Q4_K are 256 inputs, which do not divide 320"),
    ],
)
def test_what_no_type_holds_has_a_reason(spec, words):
    assert words in type_of(spec, (4, 320))


# Files


def counting(calls, function):
    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return counted


@torch.no_grad()
def test_a_checkpoint_is_read_back_bit_for_bit_and_gives_the_same_logits(tmp_path):
    source = quantized(tmp_path, group_size=32, symmetric=True)
    report = lowbit.export(source, "gguf", out=tmp_path / "out")
    assert [file.name for file in report.out.iterdir()] == [FILE] and report.layers == 14
    before, after = lowbit.load(source), lowbit.load(tmp_path / "out")
    mine, theirs = layers_of(before), layers_of(after)
    assert mine.keys() == theirs.keys()
    for name, layer in mine.items():
        assert theirs[name].description == layer.description
        assert all(torch.equal(value, theirs[name].state_dict()[key]) for key, value in layer.state_dict().items())
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    ids = random_ids(2, 24, seed=3)
    assert torch.equal(before(ids).logits, after(ids).logits)
    lowbit.export(source, "gguf", out=tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


@torch.no_grad()
def test_a_packed_embedding_that_is_the_head_too_is_stored_once_and_stays_packed(tmp_path):
    tiny_llama(tmp_path / "model", intermediate_size=128, tie_word_embeddings=True)
    recipe = lowbit.recipe("rtn", group_size=32).with_overrides([{"match": "embedding", "bits": 8}])
    lowbit.quantize(tmp_path / "model", recipe, None, out=tmp_path / "q")
    lowbit.export(tmp_path / "q", "gguf", out=tmp_path / "out")
    names = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert names["token_embd.weight"] == "Q8_0" and "output.weight" not in names
    assert names["blk.0.attn_q.weight"] == "Q5_0" and names["blk.1.ffn_norm.weight"] == "F32"
    before, after = lowbit.load(tmp_path / "q"), lowbit.load(tmp_path / "out" / FILE)
    assert isinstance(after.model.embed_tokens, QuantEmbedding)
    ids = random_ids(2, 24, seed=3)
    torch.testing.assert_close(before(ids).logits, after(ids).logits, rtol=2e-4, atol=2e-4)
    for name, layer in layers_of(before).items():
        assert torch.equal(layer.dequantize(), layers_of(after)[name].dequantize()), name


def test_a_packed_file_is_read_once_and_its_weights_are_not_decoded_for_its_tokenizer(tmp_path, monkeypatch):
    source = quantized(tmp_path, group_size=32, symmetric=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:120]
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0} | {char: i for i, char in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(source)
    lowbit.export(source, "gguf", out=tmp_path / "out")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    read = []
    monkeypatch.setattr(gguf_reading.GGUFReader, "__init__", counting(read, gguf_reading.GGUFReader.__init__))
    for _ in range(2):
        assert isinstance(lowbit.load(tmp_path / "out").model.layers[0].mlp.up_proj, QuantLinear)
        assert lowbit.load_tokenizer(tmp_path / "out").convert_tokens_to_ids(alphabet[9]) == 10
    assert len(read) == 1
    assert len([each for each in (tmp_path / "cache/gguf").iterdir() if each.is_dir()]) == 1


def test_an_evaluation_counts_the_bytes_of_the_file_itself(tmp_path):
    lowbit.export(quantized(tmp_path, group_size=32, symmetric=True), "gguf", out=tmp_path / "out")
    ids = random_ids(1, 32, seed=3)
    for place in (tmp_path / "out", tmp_path / "out" / FILE):
        assert lowbit.evaluate(place, ids, seq_len=32, windows=1).bytes == (tmp_path / "out" / FILE).stat().st_size


@torch.no_grad()
@pytest.mark.parametrize(
    ("option", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_model_of_which_nothing_is_quantized_is_written_too(tmp_path, option, dtype):
    tiny_llama(tmp_path / "model")
    lowbit.export(tmp_path / "model", f"gguf:{option}", out=tmp_path / "out")
    before, after = lowbit.load(tmp_path / "model"), lowbit.load(tmp_path / "out")
    for name, value in before.state_dict().items():
        expected = value.to(dtype).float() if value.dim() > 1 else value
        assert torch.equal(after.state_dict()[name].float(), expected), name


def test_rows_of_queries_and_keys_are_in_the_order_of_llama_cpp(tmp_path):
    tiny_llama(tmp_path / "model")
    lowbit.export(tmp_path / "model", "gguf:f32", out=tmp_path / "out")
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    weights = lowbit.load(tmp_path / "model").state_dict()
    for heads, stored, name in ((4, "attn_q", "q_proj"), (2, "attn_k", "k_proj")):
        w = weights[f"model.layers.1.self_attn.{name}.weight"].numpy()
        turned = w.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(w.shape)
        assert np.array_equal(tensors[f"blk.1.{stored}.weight"], turned)


def test_a_file_is_described_by_keys_that_llama_cpp_reads(tmp_path):
    tiny_llama(tmp_path / "model")
    lowbit.export(tmp_path / "model", "gguf:f16", out=tmp_path / "out")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out" / FILE).fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    expected = {"block_count": 2, "embedding_length": 64, "attention.head_count_kv": 2, "rope.dimension_count": 16}
    assert {key: fields[f"llama.{key}"] for key in expected} == expected
    assert json.loads(fields["lowbit.config"])["model_type"] == "llama"


# Refusals


REFUSED = {
    "activations": ({"group_size": 32, "activation_bits": 8}, "it does not describe activations"),
    "groups": ({"group_size": 16}, "--group-size 32 or a multiple of it fits"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_place_is_refused_with_the_same_words_by_plan_and_export(tmp_path, options, words):
    source = quantized(tmp_path, **options)
    with pytest.raises(ValueError, match="cannot be written as llama") as refusal:
        lowbit.export(source, "gguf", out=tmp_path / "out")
    assert words in str(refusal.value) and not (tmp_path / "out").exists()
    answer = plan(tmp_path / "model", lowbit.recipe("rtn", **options)).compatibility[Gguf.title]
    assert answer.startswith("no: ") and answer.removeprefix("no: ") in str(refusal.value)


def test_a_model_that_llama_cpp_computes_otherwise_is_refused(tmp_path):
    for i, (changes, words) in enumerate(
        [
            ({"hidden_act": "gelu"}, "its llama computes silu, this model gelu"),
            (
                {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
                "rotary embeddings of type 'dynamic' are not written",
            ),
        ]
    ):
        tiny_llama(tmp_path / f"model{i}", **changes)
        with pytest.raises(ValueError, match=words):
            lowbit.export(tmp_path / f"model{i}", "gguf:f16", out=tmp_path / "out")


def test_an_unknown_option_is_answered_with_the_nearest_one_or_with_all_of_them_once():
    with pytest.raises(ValueError, match=r"unknown option gguf:q8_00 \(did you mean 'q8_0'\?\)$"):
        find_format("gguf:q8_00")
    with pytest.raises(ValueError, match="unknown option gguf:nosuch; known: ") as refused:
        find_format("gguf:nosuch")
    named = str(refused.value).split("known: ")[1].split(", ")
    assert len(named) == len(set(named)) and {"f16", "q4_k_m", "q8_0"} <= set(named)


def test_an_unknown_option_or_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gguf:q9"):
        find_format("gguf:q9")
    with pytest.raises(ValueError, match="format native has no options"):
        find_format("native:f16")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ValueError, match="not a GGUF file, or a damaged one"):
        lowbit.load(tmp_path / "x.gguf")


def test_tensors_that_the_model_does_not_have_are_refused(tmp_path):
    tiny_llama(tmp_path / "model")
    lowbit.export(tmp_path / "model", "gguf:f16", out=tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    writer = gguf.GGUFWriter(tmp_path / "more.gguf", "llama")
    for key in ("lowbit.config",):
        writer.add_string(key, reader.fields[key].contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="have no place in a llama model"):
        Gguf().read(tmp_path / "more.gguf")


# The command


def test_the_command_writes_one_file(tmp_path):
    source = quantized(tmp_path, group_size=32)
    result = CliRunner().invoke(app, ["export", str(source), "--format", "gguf", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and "14 packed layers in format gguf" in result.stdout
    assert native.is_native(native.read_checkpoint(source).config)


# Quantizing to it in one go


def wide_llama(place: Path, **changes) -> Path:
    return tiny_llama(place, hidden_size=256, intermediate_size=512, blocks=8, num_key_value_heads=4, **changes)


@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_model_is_quantized_by_a_method_in_the_types_of_a_preset_and_leaves_one_file(tmp_path, method):
    tiny_llama(tmp_path / "model", hidden_size=256, intermediate_size=512)
    report = lowbit.quantize(
        tmp_path / "model", method, random_ids(8, 64), out=tmp_path / "out", format="gguf:q4_k_m", max_kl=20
    )
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.gguf")] == [f"out/{FILE}"]
    assert report.out == tmp_path / "out" and not (tmp_path / "out.native").exists()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert {kinds[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_k", "attn_output", "ffn_up")} == {"Q4_K"}
    model = lowbit.load(tmp_path / "out")
    grid = layers_of(model)["model.layers.0.self_attn.q_proj"].spec
    assert grid == BLOCK_TYPES["Q4_K"].spec
    original = lowbit.load(tmp_path / "model")
    ids = random_ids(1, 64, seed=9)
    assert torch.isfinite(model(ids).logits).all() and model(ids).logits.shape == original(ids).logits.shape


@pytest.mark.parametrize("hidden", [64, 256])
def test_types_that_stand_in_for_those_of_a_preset_are_named_before_the_work(tmp_path, hidden):
    tiny_llama(tmp_path / "model", hidden_size=hidden, intermediate_size=512)
    job = prepare(tmp_path / "model", lowbit.recipe("rtn"), None, out=tmp_path / "out", format="gguf:q2_k")
    said = [warning for warning in job.warnings if "stand in" in warning]
    if hidden == 256:
        assert not said
        return
    assert len(said) == 1 and "gguf:q2_k: rows of 12 of 14 linears" in said[0]  # down reads 512
    assert "IQ4_NL, 4.5 bits for Q2_K in 8; IQ4_NL, 4.5 bits for Q3_K in 4" in said[0]


def test_a_preset_that_a_recipe_has_no_place_in_is_refused_before_any_work(tmp_path):
    tiny_llama(tmp_path / "model", intermediate_size=128)
    for name, options, words in (
        ("rtn", {"activation_bits": 8}, "does not describe activations"),
        ("quip", {}, "a range by the root mean square needs integers with a real zero point"),
        ("spqr", {}, "outliers in half precision"),
    ):
        recipe = lowbit.recipe(name, **options)
        with pytest.raises(ValueError, match=words):
            lowbit.quantize(tmp_path / "model", recipe, random_ids(4, 32), out=tmp_path / "out", format="gguf:q8_0")
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "override", [{"match": "down", "bits": 8}, {"match": "down", "skip": True}, {"match": "head", "bits": 8}]
)
def test_formats_that_a_recipe_gives_some_layers_are_not_replaced_by_those_of_a_preset(override, tmp_path):
    wide_llama(tmp_path / "model")
    recipe = lowbit.recipe("rtn").with_overrides([override])
    with pytest.raises(
        ValueError, match="gives every matrix its bits and groups here, and recipe 'rtn' says those of some"
    ):
        plan(tmp_path / "model", recipe, format="gguf:q4_k_m")
    assert plan(tmp_path / "model", recipe, format="gguf").layers


def test_plan_and_explain_say_the_types_of_a_preset(tmp_path):
    wide_llama(tmp_path / "model")
    planned = plan(tmp_path / "model", "rtn", format="gguf:q4_k_m")
    assert planned.compatibility[Gguf.title] == "yes: lowbit export DIR --format gguf"
    formats = {layer.name: layer.weight for layer in planned.layers if layer.name.startswith("model.layers.0.")}
    assert "scales as" in formats["model.layers.0.self_attn.q_proj"], formats
    said = explain("rtn", tmp_path / "model", format="gguf:q4_k_m")
    assert {layer.name: layer.weight for layer in said.layers}.items() >= formats.items()


def test_presets_give_more_bits_where_llama_cpp_does():
    roles = ["q", "k", "v", "o", "gate", "up", "down"]
    tensors = [TensorRole(f"{block}.{role}", role, block, 512) for block in range(8) for role in roles]
    tensors += [TensorRole("embedding", "embedding", 0, 512), TensorRole("head", "head", 0, 512)]

    def names(preset, tensors=tensors, **options):
        return {
            name: kind.name
            for name, kind in types_of(preset, tensors, **{"shared": 1, "tied": False} | options).items()
        }

    found = names("q4_k_m")
    assert [found[f"{block}.down"] for block in range(8)] == [
        "Q6_K",
        *["Q4_K"] * 2,
        "Q6_K",
        *["Q4_K"] * 2,
        "Q6_K",
        "Q6_K",
    ]
    assert {found[f"{block}.{role}"] for block in range(8) for role in ("q", "k", "o", "gate", "up")} == {"Q4_K"}
    assert found["head"] == "Q6_K" and found["embedding"] == "Q5_0"
    assert [names("q4_k_s")[f"{block}.v"] for block in range(8)] == [*["Q5_K"] * 4, *["Q4_K"] * 4]
    assert [names("q3_k_m")[f"{block}.v"] for block in range(3)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert names("q2_k", shared=4)["3.v"] == "Q4_K" and names("q2_k")["3.down"] == "Q3_K"
    assert set(names("q6_k").values()) == {"Q6_K", "Q8_0"} and set(names("q8_0").values()) == {"Q8_0"}
    narrow = [replace(tensor, columns=576) for tensor in tensors]
    assert names("q4_k_m", narrow)["0.q"] == "Q5_0" and names("q4_k_m", narrow)["0.down"] == "Q8_0"
    assert names("q2_k", narrow)["0.q"] == "IQ4_NL" and names("q5_k_m", narrow, tied=True)["embedding"] == "Q8_0"
    assert names("q4_k_m", [replace(tensor, columns=40) for tensor in tensors]) == {}
