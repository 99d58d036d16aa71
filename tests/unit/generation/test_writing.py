"""Texts that tiny random models write. In float64, where no sum rounds near enough to matter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from families import FAMILIES
from lowbit import decoding
from lowbit.generation import Sampling, Start, write, write_tokens
from lowbit.generation.writing import Total

from helpers import random_ids, tiny_llama

NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lowbit.load(tiny_llama(tmp_path_factory.mktemp("writer") / "model"), dtype=torch.float64)


def starts(count: int, sampling: Sampling, most: int = 24, given: int = 1) -> list[Start]:
    first = random_ids(count, given, seed=5).tolist()
    return [Start(i, tuple(first[i]), sampling.greedy_tokens(i), most) for i in range(count)]


def ids(texts) -> list[tuple[int, ...]]:
    return [text.ids for text in texts]


def test_two_seeds_agree_on_the_greedy_prefix_and_on_nothing_more(model):
    one, two = (write(model, starts(6, Sampling()), Sampling(seed=seed), NEVER) for seed in (1, 2))
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        prefix = (3, 4, 5)[i % 3]
        assert a.ids[:prefix] == b.ids[:prefix]
    assert all(a.ids[5:] != b.ids[5:] for a, b in zip(one, two, strict=True))


def test_a_prefix_is_what_the_model_thinks_likeliest(model):
    texts = write(model, starts(6, Sampling()), Sampling(), NEVER)
    with torch.no_grad():
        likeliest = model(torch.tensor(ids(texts))).logits.argmax(-1).tolist()
    for text, best in zip(texts, likeliest, strict=True):
        assert list(text.ids[1 : text.start.greedy + 1]) == best[: text.start.greedy]
    greedy = write(model, starts(3, Sampling("greedy")), Sampling("greedy"), NEVER)
    with torch.no_grad():
        likeliest = model(torch.tensor(ids(greedy))).logits.argmax(-1).tolist()
    assert all(list(text.ids[1:]) == best[:-1] for text, best in zip(greedy, likeliest, strict=True))


def test_a_text_does_not_depend_on_the_texts_beside_it(model):
    sampling = Sampling(seed=4)
    together = write(model, starts(7, sampling, given=3), sampling, NEVER)
    alone = [write(model, [start], sampling, NEVER)[0] for start in starts(7, sampling, given=3)]
    assert together == [dataclasses.replace(text, confidence=pytest.approx(text.confidence)) for text in alone]


def test_a_text_that_ends_is_the_start_of_the_one_that_does_not(model):
    sampling, ends = Sampling("sampled"), frozenset(range(16))
    whole = write(model, starts(8, sampling), sampling, NEVER)
    cut = write(model, starts(8, sampling), sampling, ends)
    lengths = set()
    for text, longer in zip(cut, whole, strict=True):
        at = next((i for i, id in enumerate(longer.ids) if i and id in ends), None)
        assert text.ids == (longer.ids if at is None else longer.ids[: at + 1]) and text.ended == (at is not None)
        lengths.add(len(text.ids))
    assert len(lengths) > 2  # some left the batch before others


def test_confidence_is_the_mean_probability_of_what_was_chosen(model):
    sampling = Sampling("sampled", temperature=0.5)
    [text] = write(model, starts(1, sampling, given=4), sampling, NEVER)
    with torch.no_grad():
        chances = model(torch.tensor([text.ids])).logits[0].softmax(-1)
    chosen = [chances[i - 1, text.ids[i]].item() for i in range(4, len(text.ids))]
    assert text.confidence == pytest.approx(sum(chosen) / len(chosen))


def test_a_start_of_full_length_stays_as_it_is(model):
    start = Start(0, (9, 8, 7), 0, 3)
    [text] = write(model, [start], Sampling(), NEVER)
    assert text.ids == (9, 8, 7) and not text.ended and text.confidence == 0


@pytest.mark.parametrize("family", ["lfm2", "gemma3n", "falcon_h1", "bamba"])
def test_caches_with_states_and_windows_let_texts_leave_a_batch(family):
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval().double()
    sampling, ends = Sampling("sampled"), frozenset(range(2, 12))
    together = write(made, starts(5, sampling, most=20), sampling, ends)
    assert len({len(text.ids) for text in together}) > 1
    assert ids(together) == [write(made, [start], sampling, ends)[0].ids for start in starts(5, sampling, most=20)]


def test_tokens_are_written_until_there_are_enough_and_a_later_call_goes_on(model):
    def texts(done=Total(), batch: int = 4) -> list:
        return list(write_tokens(model, None, Sampling(seed=7), 200, 16, batch=batch, done=done))

    batches = texts()
    together = [text for batch in batches for text in batch]
    assert [text.start.number for text in together] == list(range(len(together)))
    assert (
        sum(len(text.ids) for text in together) >= 200 > sum(len(text.ids) for batch in batches[:-1] for text in batch)
    )
    assert texts(Total().plus(batches[0]).plus(batches[1])) == batches[2:]
    assert [text.ids for batch in texts(batch=1) for text in batch][:8] == ids(together)[:8]
    assert len({text.ids[0] for text in together}) == len(together)


def test_every_text_begins_with_bos_where_the_model_was_trained_so(model):
    batch, *_ = write_tokens(model, None, Sampling(), 40, 20, bos=119)
    assert all(text.ids[0] == 119 and len(text.start.ids) == 2 for text in batch)


def test_a_packed_model_writes_one_text_by_its_compiled_step(tmp_path):
    place = tiny_llama(tmp_path / "model")
    lowbit.quantize(place, lowbit.recipe("rtn", bits=8, group_size=32), None, out=tmp_path / "packed")
    packed = lowbit.load(tmp_path / "packed")
    [text] = write(packed, starts(1, Sampling()), Sampling(), NEVER)
    if "as one compiled step" in decoding.explain(packed):
        assert f"So far: {len(text.ids) - 2} tokens by it." in decoding.explain(packed)  # all but the first


def test_a_quantized_cache_is_read_by_the_model_that_writes(tmp_path):
    place = tiny_llama(tmp_path / "model")
    plain, held = lowbit.load(place), lowbit.load(place, kv="kv-int:2")
    sampling = Sampling("greedy")
    assert ids(write(plain, starts(3, sampling, 40), sampling, NEVER)) != ids(
        write(held, starts(3, sampling, 40), sampling, NEVER)
    )


@pytest.mark.parametrize(
    ("tokens", "length", "batch", "words"),
    [
        (0, 8, 1, "0 tokens in texts of 8"),
        (9, 1, 1, "texts of 2 tokens or more"),
        (9, 8, 0, "8, 0 at a time"),
        (9, 257, 1, "256"),
    ],
)
def test_what_cannot_be_written_is_refused(model, tokens, length, batch, words):
    with pytest.raises(ValueError, match=words):
        next(write_tokens(model, None, Sampling(), tokens, length, batch=batch))
