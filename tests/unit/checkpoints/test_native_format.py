"""The native checkpoint: what is saved comes back bit for bit, by either loader, or an error says what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)
from transformers.pytorch_utils import Conv1D

from lowbit.architectures.experts import unfuse_experts
from lowbit.checkpoints import native
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.shards import read_shard_header
from lowbit.checkpoints.swap import swap
from lowbit.modules import ActSpec, QuantLinear
from lowbit.numerics import NF4, Affine, Int, MinMax, PerChannel, PerGroup, PerTensor, PerToken, Spec, quantize
from lowbit.transforms import Scale, Shift

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "gpt2": GPT2Config(**GPT2),
    "experts": MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2),
}
IDS = torch.arange(18).reshape(2, 9)


@pytest.fixture(autouse=True)
def one_kernel_for_all(monkeypatch):
    """Equal logits mean equal bits stored: models that are loaded would run by other kernels than those in memory."""
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")


def packed(name: str, w_OI: torch.Tensor, bias: torch.Tensor | None) -> QuantLinear:
    """A format of its own for each role, so that every kind of buffer is somewhere."""
    width = w_OI.shape[1]
    spec, act, params, pre = Spec(Int(4), PerGroup(16)), None, None, ()
    if name.endswith("o_proj"):  # a bias where the model has none, as a shifted input gives
        bias, pre = torch.randn(w_OI.shape[0]), (Shift(torch.randn(width)),)
    if name.endswith(("q_proj", "c_fc")):
        spec, act = Spec(Int(8, True), PerChannel()), ActSpec(Spec(Int(8), PerTensor()), static=True)
        params = Affine(torch.tensor([[0.03]]), torch.tensor([[128.0]]))
    if name.endswith("v_proj"):
        spec, act = Spec(Int(8, True), PerChannel()), ActSpec(Spec(Int(8, True), PerToken()))
    if name.endswith("up_proj"):
        spec = Spec(NF4, PerGroup(16), stats=Spec(Int(8), PerGroup(256), scale_dtype="float32"))
        pre = (Scale(torch.rand(width) + 0.5),)
    return QuantLinear.from_qtensor(quantize(w_OI, spec, MinMax()), bias, act, params, pre)


def quantized(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype).eval()
    unfuse_experts(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or name == "lm_head" or name.endswith("experts.2.down_proj"):
            continue
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().float().contiguous()
        bias = None if module.bias is None else torch.randn(weight.shape[0])
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed(name, weight, bias))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every model and its checkpoint of several shards, written once."""
    made = {}
    for kind in CONFIGS:
        made[kind] = quantized(kind), tmp_path_factory.mktemp(kind)
        native.save(*made[kind], shard_bytes=15_000)
    return made


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(saved["untied"][1], tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read or written")

    for target in (torch, pickle):
        for name in ("load", "save", "loads", "dump", "dumps", "Unpickler"):
            if hasattr(target, name):
                monkeypatch.setattr(target, name, refuse)


def assert_packed_buffers_same(a: nn.Module, b: nn.Module) -> None:
    layers = {name: module for name, module in a.named_modules() if isinstance(module, QuantLinear)}
    assert layers
    for name, layer in layers.items():
        state, other = layer.state_dict(), b.get_submodule(name).state_dict()
        assert state.keys() == other.keys()
        for key in state:
            assert state[key].dtype == other[key].dtype and torch.equal(state[key], other[key]), f"{name}.{key}"


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_saved_model_computes_the_same_bits_by_either_loader_and_generates(saved, kind):
    model, directory = saved[kind]
    expected = model(IDS).logits
    for loaded in (native.load(directory), AutoModelForCausalLM.from_pretrained(directory)):
        assert torch.equal(loaded(IDS).logits, expected)
        assert not any(p.is_meta for p in loaded.parameters()) and not any(b.is_meta for b in loaded.buffers())
        assert not loaded.training
        tokens = loaded.generate(
            IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS), pad_token_id=0
        )
        assert tokens.shape[0] == 2 and tokens.shape[1] > IDS.shape[1]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto", None])
def test_packed_tensors_arrive_bit_for_bit_whatever_dtype_is_asked(saved, kind, dtype):
    model, directory = saved[kind]
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert_packed_buffers_same(model, loaded)
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.float32
    assert loaded.get_input_embeddings().weight.dtype == wanted
    assert loaded(IDS).logits.dtype == wanted
    assert_packed_buffers_same(model, loaded.to(torch.bfloat16))


def test_modules_that_a_class_keeps_in_float32_do_not_convert_packed_tensors(saved, monkeypatch):
    model, directory = saved["untied"]
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"self_attn", "norm"}, raising=False)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert loaded.model.norm.weight.dtype == torch.float32  # the plan is in force
    assert_packed_buffers_same(model, loaded)


def test_auto_is_the_dtype_that_the_checkpoint_was_written_with(tmp_path):
    model = quantized("untied", torch.bfloat16)
    native.save(model, tmp_path / "m")
    for loaded in (native.load(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")):
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_loading_draws_no_random_numbers(saved, kind):
    state = torch.get_rng_state()
    native.load(saved[kind][1])
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_embeddings_stay_tied_and_untied_ones_apart(saved):
    tied, untied = native.load(saved["tied"][1]), native.load(saved["untied"][1])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    names = {name for file in saved["tied"][1].glob("*.safetensors") for name in read_shard_header(file)}
    assert "lm_head.weight" not in names


def test_a_layer_may_gain_a_bias_that_the_config_does_not_have(saved):
    model, directory = saved["untied"]
    assert CONFIGS["untied"].attention_bias is False
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    bias = loaded.model.layers[1].self_attn.o_proj.bias
    assert bias.dtype == torch.float32 and torch.equal(bias, model.model.layers[1].self_attn.o_proj.bias)


def test_a_base_model_loads_from_the_checkpoint_of_the_model_with_a_head(saved):
    model, directory = saved["untied"]
    base = AutoModel.from_pretrained(directory)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_save_pretrained_of_a_loaded_model_is_a_checkpoint_too(saved, kind, tmp_path):
    model, directory = saved[kind]
    native.load(directory).save_pretrained(tmp_path / "again")
    again = native.load(tmp_path / "again")
    assert_packed_buffers_same(model, again)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_same_model_is_saved_as_the_same_bytes(saved, tmp_path):
    _, directory = saved["experts"]
    native.save(quantized("experts"), tmp_path / "again", shard_bytes=15_000)
    files = sorted(file.name for file in directory.iterdir())
    assert files == sorted(file.name for file in (tmp_path / "again").iterdir())
    assert all((directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    assert sum(name.endswith(".safetensors") for name in files) > 2


def test_descriptions_are_shared_by_blocks_and_say_only_what_is_stored(saved):
    description = json.loads((saved["untied"][1] / "config.json").read_text())["quantization_config"]
    assert description["quant_method"] == "lowbit" and description["version"] == 1
    assert len(description["layers"]) == 14 and len(description["schemes"]) == 7  # one for each role
    assert set(description) == {"quant_method", "version", "schemes", "layers"}
    assert set(ModelDescription.from_json(description).layers) == set(description["layers"])
    assert ModelDescription.from_json(description) == ModelDescription.of(saved["untied"][0])
    experts = json.loads((saved["experts"][1] / "config.json").read_text())["quantization_config"]
    assert experts["unfused_experts"] is True


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_bits_report_counts_the_bytes_that_are_there(saved, kind):
    model, directory = saved[kind]
    report = native.bits_report(directory)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    tensors = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    packed_names = [n for n in tensors if n.rpartition(".")[0] in layers and not n.endswith(".bias")]
    assert report["layers"] == len(layers)
    assert report["bytes"] == sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert report["quantized_bytes"] == sum(tensors[n].nbytes for n in packed_names)
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert report["quantized_weights"] == weights
    assert report["bits_per_weight"] == 8 * report["quantized_bytes"] / weights == native.bits_per_weight(model)
    parameters = weights + sum(t.numel() for n, t in tensors.items() if n not in packed_names)
    assert report["model_bits_per_weight"] == 8 * sum(t.nbytes for t in tensors.values()) / parameters


def test_an_ordinary_model_directory_loads_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["tied"]).eval()
    model.save_pretrained(tmp_path)
    loaded = native.load(tmp_path, torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert native.bits_per_weight(loaded) is None
    with pytest.raises(ValueError, match="not quantized by lowbit"):
        native.bits_report(tmp_path)


def test_a_directory_is_a_checkpoint_only_when_its_config_is_written(saved, tmp_path):
    model, directory = saved["untied"]
    shards = sorted(file.name for file in directory.glob("*.safetensors"))
    for shard in shards:
        shutil.copy(directory / shard, tmp_path / shard)
    with pytest.raises(ValueError, match=r"unfinished, it has weights but no config.json"):
        native.load(tmp_path)
    (tmp_path / "journal.jsonl").write_text("{}\n")
    native.write_checkpoint(tmp_path, model.config, ModelDescription.of(model), shards, torch.float32)
    assert (tmp_path / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    with pytest.raises(ValueError, match="an unfinished run; run the command that makes it again"):
        native.load(tmp_path)
    assert torch.equal(native.load(tmp_path, unfinished=True)(IDS).logits, model(IDS).logits)


def test_an_index_is_not_written_for_shards_that_do_not_make_a_checkpoint(saved, copy):
    config = json.loads((copy / "config.json").read_text())
    shards = sorted(file.name for file in copy.glob("*.safetensors"))
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="is missing; was it written"):
        native.write_checkpoint_index(copy, [*shards, "model-00099-of-00099.safetensors"], config)
    with pytest.raises(ValueError, match="of a quantized layer is not in the checkpoint"):
        native.write_checkpoint_index(copy, shards[1:], config)
    shutil.copy(copy / shards[0], copy / "twice.safetensors")
    with pytest.raises(ValueError, match=r"is in two shards, model-00001-of-\d+.safetensors and twice.safetensors"):
        native.write_checkpoint_index(copy, [*shards, "twice.safetensors"], config)
    assert not (copy / "config.json").exists()


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


def drop_tensor(directory: Path, name: str) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shard = directory / index["weight_map"].pop(name)
    save_file({key: t for key, t in load_file(shard).items() if key != name}, shard, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_directories_that_are_no_checkpoint_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such directory$"):
        native.load(tmp_path / "nowhere")
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(ValueError, match=r"half.partial holds an unfinished run: run the command that makes it again"):
        native.load(tmp_path / "half")
    with pytest.raises(ValueError, match=r"no config.json; expected a directory that lowbit or save_pretrained wrote"):
        native.load(tmp_path / "half.partial")


def test_missing_and_truncated_shards_are_named(copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{shard.name}: truncated"):
        native.load(copy)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"shards .* are missing: {shard.name}"):
        native.load(copy)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.scale_codes", "model.layers.0.self_attn.o_proj.bias"])
def test_a_packed_layer_that_lacks_a_tensor_is_named(copy, name):
    drop_tensor(copy, name)
    with pytest.raises(ValueError, match=f"tensor {name} of a quantized layer is not in the checkpoint"):
        native.load(copy)


def test_other_missing_and_unexpected_tensors_are_named(saved, copy):
    drop_tensor(copy, "model.layers.1.input_layernorm.weight")
    with pytest.raises(ValueError, match=r"tensor model.layers.1.input_layernorm.weight .* is not in the checkpoint"):
        native.load(copy)
    shutil.rmtree(copy)
    shutil.copytree(saved["untied"][1], copy)
    layers = json.loads((copy / "config.json").read_text())["quantization_config"]["layers"]
    del layers["model.layers.1.mlp.down_proj"]
    edit_config(copy, layers=layers)
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.down_proj.weight .* is not in the checkpoint"):
        native.load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "version 9 of the native format, this lowbit reads versions 1 to 8"),
        ({"schemes": []}, "has scheme 1 of 0|has scheme 0 of 0"),
        ({"schemes": None}, "damaged: expected a list 'schemes'"),
        ({"layers": {}}, "damaged"),
    ],
)
def test_unknown_versions_and_damaged_descriptions_are_refused_by_either_loader(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(ValueError, match=message):
        native.load(copy)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def test_tensors_of_another_format_than_described_are_refused(copy):
    description = json.loads((copy / "config.json").read_text())["quantization_config"]
    for scheme in description["schemes"]:
        scheme["spec"]["scale_dtype"] = "bfloat16"
    edit_config(copy, schemes=description["schemes"])
    with pytest.raises(
        ValueError, match=r"scale is torch.float16 .* describes torch.bfloat16 .* of different checkpoints"
    ):
        native.load(copy)


def test_an_index_that_points_outside_the_directory_is_refused(copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="points outside the model directory"):
        native.load(copy)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_swapping_fits_empty_layers_into_a_model_of_any_device(saved, device):
    model, _ = saved["gpt2"]
    with torch.device(device):
        fresh = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).eval()
    swapped = swap(fresh, ModelDescription.of(model))
    assert set(swapped) == {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert all(buffer.device.type == device for layer in swapped.values() for buffer in layer.buffers())
    if device == "cpu":
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_places_that_do_not_fit_are_refused(saved):
    q_proj = saved["untied"][0].get_submodule("model.layers.0.self_attn.q_proj").description

    def put(name, description=q_proj, kind="untied"):
        swap(AutoModelForCausalLM.from_config(CONFIGS[kind]), ModelDescription({name: description}))

    with pytest.raises(ValueError, match=r"model.layers.7.self_attn.q_proj, which LlamaForCausalLM does not have"):
        put("model.layers.7.self_attn.q_proj")
    with pytest.raises(ValueError, match="is a LlamaRMSNorm and not a linear"):
        put("model.norm")
    with pytest.raises(ValueError, match=r"maps 32 channels to 32 in the checkpoint, \(32, 16\) here"):
        put("model.layers.0.self_attn.k_proj")
    head = QuantLinear.from_qtensor(quantize(torch.randn(96, 32), Spec(Int(8), PerChannel()), MinMax())).description
    with pytest.raises(ValueError, match="lm_head is quantized but its weight is tied"):
        put("lm_head", head, "tied")
    put("lm_head", head, "untied")
    with pytest.raises(ValueError, match="no layer is quantized"):
        ModelDescription.of(nn.Linear(2, 2)).to_json()


def test_nothing_is_saved_over_other_files(saved, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        native.save(saved["tied"][0], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_either_loader_refuses_tensors_that_are_missing_or_hold_no_number(copy):
    def refuse(said: str) -> None:
        for load in (native.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=said) as refused:
                load(copy)
            assert str(copy) in str(refused.value) and "\n" not in str(refused.value)

    shard = next(file for file in sorted(copy.glob("*.safetensors")) if "model.norm.weight" in load_file(file))
    tensors = load_file(shard)
    spoiled = tensors["model.norm.weight"].clone()
    spoiled[3] = torch.nan
    save_file(tensors | {"model.norm.weight": spoiled}, shard, {"format": "pt"})
    refuse(r"tensor model\.norm\.weight holds NaN or Inf")
    save_file(tensors | {"model.norm.weight": spoiled[:-1].clone()}, shard, {"format": "pt"})
    refuse(r"tensor model\.norm\.weight is .* the model that config\.json describes has")
    save_file(tensors, shard, {"format": "pt"})
    drop_tensor(copy, "model.norm.weight")
    refuse(r"tensor model\.norm\.weight .* is not in the checkpoint")


def test_damaged_json_ends_in_one_line(copy):
    for name in ("config.json", "model.safetensors.index.json"):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(b"[" * 100_000)
        with pytest.raises(ValueError, match="nested too deeply"):
            native.load(copy)
        (copy / name).write_bytes(kept)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": "int4"}))
    with pytest.raises(ValueError, match=r"quantization_config of config.json is an object, found 'int4'"):
        native.load(copy)
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "nothing"}))
    with pytest.raises(ValueError, match="transformers cannot load the model"):
        native.load(copy)
