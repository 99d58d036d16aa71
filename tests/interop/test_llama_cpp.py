"""llama.cpp runs what is exported: tiny random models of every architecture, both kinds of tokenizers, every type, SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import lowbit
from lowbit.checkpoints.formats.gguf import FILE
from lowbit.layouts import pack_qtensor, unpack_qtensor
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.modules import QuantLinear
from lowbit.numerics import ClipSearch, quantize
from lowbit.scheme import FormatRule, Scheme

from engines import LLAMA_CPP, LlamaCpp, dequantized, quantized_by_llama_cpp
from helpers import tiny_llama

pytest.importorskip(LLAMA_CPP)

VOCABULARY, WHOLE = 512, 300
TEXT = (Path(__file__).parent.parent / "helpers.py").read_text()
PROMPT = "def tiny_llama(path): it's 1234 words,\n\n  and a few more.  Größe"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


def bytes_tokenizer(place: Path, rule=None) -> PreTrainedTokenizerFast:
    """Byte pairs over bytes, trained on the text of a test."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = rule or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(place)
    return fast


def pieces_tokenizer(place: Path) -> PreTrainedTokenizerFast:
    """Byte pairs over characters with bytes to fall back on, as SentencePiece's tokenizers are converted."""
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    raw.train_from_iterator(TEXT.replace("\n", " ").split(" "), trainer)
    data = json.loads(raw.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    raw = Tokenizer.from_str(json.dumps(data))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(place)
    return fast


def random_model(place: Path, model_type: str, **changes) -> AutoModelForCausalLM:
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **(common | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(place)
    return model


def assert_agree(model, file: Path, ids: list[int], tolerance: float, prompt: str | list[int] | None = None) -> None:
    """The log probabilities of the 20 tokens that llama.cpp finds most likely."""
    found = LlamaCpp(file).most_likely(ids if prompt is None else prompt, WHOLE)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert len(found) == 20
    worst = max(abs(expected[i].item() - value) for i, value in found)
    assert worst <= tolerance, f"log probabilities differ by up to {worst:.3g}"


MODELS = {
    "llama": {},
    "llama with llama3 frequencies and biases": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama with linear frequencies": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 4},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
    "phi3": {},
    "phi3 with half of a head turned": {"partial_rotary_factor": 0.5, "head_dim": 16},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_every_architecture_gives_the_same_log_probabilities(tmp_path, name):
    tokenizer = pieces_tokenizer(tmp_path / "model")
    model = random_model(tmp_path / "model", name.split(" ")[0], **MODELS[name])
    lowbit.export(tmp_path / "model", "gguf:f32", out=tmp_path / "out")
    assert_agree(model, tmp_path / "out" / FILE, tokenizer(PROMPT).input_ids[:40], 5e-3)


RULES = {
    "gpt-2": None,
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("kind", [*RULES, "pieces"])
def test_text_becomes_the_same_tokens(tmp_path, kind):
    place = tmp_path / "model"
    tokenizer = pieces_tokenizer(place) if kind == "pieces" else bytes_tokenizer(place, RULES[kind])
    model = random_model(place, "llama")
    lowbit.export(place, "gguf:f32", out=tmp_path / "out")
    assert_agree(model, tmp_path / "out" / FILE, tokenizer(PROMPT).input_ids, 5e-3, prompt=PROMPT)
    assert lowbit.load_tokenizer(tmp_path / "out")(PROMPT).input_ids == tokenizer(PROMPT).input_ids


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_type_of_a_packed_layer_is_computed_as_its_numbers_say(tmp_path, name):
    pieces_tokenizer(tmp_path / "model")
    random_model(tmp_path / "model", "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    recipe = lowbit.recipe("rtn")
    recipe = recipe.__class__(name, Scheme((FormatRule(weight=BLOCK_TYPES[name].spec),)), recipe.stages)
    lowbit.quantize(tmp_path / "model", recipe, None, out=tmp_path / "q")
    lowbit.export(tmp_path / "q", "gguf", out=tmp_path / "out")
    # llama.cpp rounds inputs of products to 8 bits, which moves these by up to 0.13; another weight moves them by several.
    assert_agree(lowbit.load(tmp_path / "q"), tmp_path / "out" / FILE, list(range(3, 40)), 0.2)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_llama_cpp_decodes_every_type_to_the_same_bits(name):
    kind, w = BLOCK_TYPES[name], torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    q = quantize(w, kind.spec, ClipSearch())
    assert torch.equal(dequantized(name, kind.encode(pack_qtensor(q), (4, 512))), q.dequantize())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_what_llama_cpp_quantizes_is_read_as_it_reads_it_and_comes_back_byte_for_byte(name):
    kind, w = BLOCK_TYPES[name], torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    data = quantized_by_llama_cpp(name, w)
    tensors = kind.decode(data, (4, 512))
    assert torch.equal(unpack_qtensor(tensors, kind.spec, (4, 512)).dequantize(), dequantized(name, data))
    assert torch.equal(kind.encode(tensors, (4, 512)), data)


def test_a_tiny_model_is_quantized_and_exported_with_the_same_words(tmp_path):
    tiny_llama(tmp_path / "model", intermediate_size=128, vocab_size=VOCABULARY)
    pieces_tokenizer(tmp_path / "model")
    lowbit.quantize(tmp_path / "model", lowbit.recipe("rtn", group_size=32), None, out=tmp_path / "q")
    lowbit.export(tmp_path / "q", "gguf", out=tmp_path / "out")
    assert_agree(lowbit.load(tmp_path / "q"), tmp_path / "out" / FILE, list(range(3, 40)), 0.1)


PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time there was a small dragon who"]
NEAR_TIE = 0.05  # nats between two tokens that are likely


@pytest.mark.slow
@pytest.mark.parametrize(("option", "tolerance"), [("gguf:f16", 0.05), ("gguf:q4_0", 0.3)])
def test_a_real_model_continues_prompts_with_the_same_tokens_up_to_near_ties(tmp_path, monkeypatch, option, tolerance):
    monkeypatch.delenv("LOWBIT_CACHE")
    if option == "gguf:f16":
        lowbit.export("smollm2-135m", option, out=tmp_path / "out")
        model = lowbit.load("smollm2-135m")
    else:
        lowbit.quantize("smollm2-135m", "rtn", None, out=tmp_path / "out", format=option)
        monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
        model = lowbit.load(tmp_path / "out")
        assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 211
    tokenizer, engine = lowbit.load_tokenizer("smollm2-135m"), LlamaCpp(tmp_path / "out" / FILE)
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        steps = engine.complete(prompt, 16, top=5)
        chosen = [step[0][0] for step in steps]
        with torch.no_grad():
            rows = model(torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        gaps = [abs(row[i].item() - value) for row, step in zip(rows, steps, strict=True) for i, value in step]
        assert sum(gaps) / len(gaps) <= tolerance
        lost = [(row.max() - row[i]).item() for row, i in zip(rows, chosen, strict=True)]
        assert all(each <= NEAR_TIE + 2 * tolerance for each in lost), lost
