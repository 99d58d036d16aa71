from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lowbit.checkpoints.tokenizer import load_tokenizer
from lowbit.generation.tokens import FirstTokens, ends_of, special_ids, tokenizer_sha256

from helpers import CONTROLS, VOCABULARY, tiny_writer


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    place = tiny_writer(tmp_path_factory.mktemp("writer") / "model")
    return load_tokenizer(place), LlamaConfig.from_pretrained(place)


def test_every_usual_token_begins_a_text_once_before_any_does_again(writer):
    firsts = FirstTokens(*writer, seed=3)
    usual = range(len(CONTROLS), 120)  # neither control tokens nor the ids beyond the tokenizer
    first, again = [[firsts.of(i) for i in range(n * len(usual), (n + 1) * len(usual))] for n in (0, 1)]
    assert sorted(token for token, _ in first) == list(usual) and {turn for _, turn in first} == {0}
    assert [token for token, _ in again] == [token for token, _ in first] and {turn for _, turn in again} == {1}


def test_the_order_of_first_tokens_is_the_seeds(writer):
    def order(seed: int) -> list[int]:
        firsts = FirstTokens(*writer, seed=seed)
        return [firsts.of(i)[0] for i in range(40)]

    assert order(1) == order(1) != order(2)
    assert FirstTokens(*writer, seed=1).of(25)[0] == order(1)[25]  # also where it is asked first


def test_added_tokens_begin_no_text(writer):
    tokenizer, config = load_tokenizer_with(writer[0], "w50"), writer[1]
    firsts = FirstTokens(tokenizer, config, 0)
    assert tokenizer.convert_tokens_to_ids("w50") == 50
    assert 50 not in {firsts.of(i)[0] for i in range(200)}


def load_tokenizer_with(tokenizer, token: str):
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), unk_token="<unk>", eos_token="<eos>"
    )
    copy.add_tokens([token])
    return copy


def test_pieces_of_a_character_begin_no_text():
    pieces = {"a": 0, "Ã": 1, "©": 2, "Ã©": 3, "Ġb": 4}  # bytes as characters: C3 and A9 are the two halves of an é
    inner = Tokenizer(models.BPE(vocab=pieces, merges=[("Ã", "©")]))
    inner.decoder = decoders.ByteLevel()
    firsts = FirstTokens(PreTrainedTokenizerFast(tokenizer_object=inner), LlamaConfig(vocab_size=5), 0)
    assert {firsts.of(i)[0] for i in range(9)} <= {0, 3, 4}
    assert {firsts.of(i)[0] for i in range(9)} >= {0, 3} - {1, 2}


def test_without_a_tokenizer_the_config_says_which_tokens_are_special():
    config = LlamaConfig(vocab_size=9, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=8)
    assert special_ids(config) == {0, 1, 2, 8}
    firsts = FirstTokens(None, config, 0)
    assert sorted(firsts.of(i)[0] for i in range(5)) == [3, 4, 5, 6, 7]


def test_a_vocabulary_of_special_tokens_alone_is_refused():
    with pytest.raises(ValueError, match="no token of the model's vocabulary can begin a text"):
        FirstTokens(None, LlamaConfig(vocab_size=2, bos_token_id=0, eos_token_id=1), 0).of(0)


def test_texts_end_where_the_tokenizer_or_any_config_says():
    model = SimpleNamespace(
        config=LlamaConfig(eos_token_id=[4, 5]),
        generation_config=SimpleNamespace(eos_token_id=6),
        device=torch.device("cpu"),
    )
    assert ends_of(model, SimpleNamespace(eos_token_id=7)) == {4, 5, 6, 7}
    assert ends_of(SimpleNamespace(config=LlamaConfig(eos_token_id=None)), None) == set()


def test_tokenizers_with_other_ids_have_other_hashes(writer):
    assert tokenizer_sha256(None) is None
    assert tokenizer_sha256(writer[0]) == tokenizer_sha256(load_tokenizer_with(writer[0], "w50"))  # a token it has
    assert tokenizer_sha256(writer[0]) != tokenizer_sha256(load_tokenizer_with(writer[0], "another"))
    assert VOCABULARY == writer[1].vocab_size
