"""Losses of windows piece by piece: the value and the gradients of the whole, without the logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from lowbit.training import Answer, Batch, NextToken, OriginalKL, loss_in_pieces
from lowbit.training.pieces import PIECE

from helpers import random_ids

TOKENS, VOCABULARY = 2 * PIECE + 9, 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def capped() -> Gemma2ForCausalLM:
    """Its logits are not the head's product alone."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.1)).eval()


def deeper() -> OPTForCausalLM:
    """Its head asks a part of its base model, and positions count."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=256, init_std=0.5)).eval()


def nameless() -> Llama4ForCausalLM:
    """It does not name the part that its head asks."""
    torch.manual_seed(0)
    experts: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **experts, head_dim=16, attention_chunk_size=256)).eval()


class Bare(torch.nn.Module):
    """A model with no model inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, use_cache=False):
        return CausalLMOutput(logits=self.head(self.embed(input_ids).cumsum(1)))


def unasked(i: int) -> Answer:
    raise AssertionError("next tokens ask no original")


def whole(model, ids):
    return NextToken().loss(Batch(range(len(ids)), ids, model(input_ids=ids, use_cache=False).logits, unasked))


def gradients(model, loss) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("make", [llama, capped, deeper, nameless, Bare])
@pytest.mark.parametrize("tokens", [TOKENS, 2 * PIECE + 1, 2])
def test_pieces_have_the_loss_and_the_gradients_of_the_whole(make, tokens):
    model, ids = make(), random_ids(2, tokens)
    first, second = whole(model, ids), loss_in_pieces(model, ids, NextToken())
    torch.testing.assert_close(second, first)
    for one, other in zip(gradients(model, first), gradients(model, second), strict=True):
        torch.testing.assert_close(other, one)


def test_the_head_never_sees_more_than_a_piece_and_nothing_of_the_size_of_all_logits_is_kept():
    model, ids, rows, kept = llama(), random_ids(1, TOKENS), [], []
    model.lm_head.register_forward_hook(lambda module, given, y: rows.append(y.shape[1]))

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_in_pieces(model, ids, NextToken()).backward()
        assert rows[: len(rows) // 2] == [PIECE, PIECE, 8] and max(kept) < TOKENS * VOCABULARY
        kept.clear()
        whole(model, ids).backward()
        assert max(kept) >= (TOKENS - 1) * VOCABULARY


def test_the_model_answers_as_before_afterwards():
    model, ids = llama(), random_ids(1, TOKENS)
    before = model(input_ids=ids, use_cache=False).logits
    loss_in_pieces(model, ids, NextToken()).backward()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_only_objectives_of_next_tokens_go_in_pieces():
    assert NextToken().reads_next and not OriginalKL().reads_next
