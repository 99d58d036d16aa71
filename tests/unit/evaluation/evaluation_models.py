"""What the tests of evaluation share: a tiny random model, a tokenizer of characters, random ids."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128
BOS, EOS = 1, 2


def tiny_model(seed: int = 0, *, dtype: torch.dtype = torch.float64, **config) -> LlamaForCausalLM:
    """Two blocks of width 32, weights large enough that the logits are far from uniform."""
    torch.manual_seed(seed)
    settings = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_hidden_layers": 2,
    }
    settings |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCABULARY, "initializer_range": 0.3}
    settings |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).to(dtype).eval()


def char_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one id for each character; decoding gives the text back exactly."""
    pieces = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({piece: id for id, piece in enumerate(pieces)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
