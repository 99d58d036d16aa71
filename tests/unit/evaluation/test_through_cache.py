"""Measurements through a quantized cache: perplexity and divergence in chunks, retrieval and generation."""

from __future__ import annotations

import copy
import itertools
import random
import re
from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit.decoding import cache_argument, use_cache
from lowbit.evaluation import cache_checks, check_generation, check_retrieval, evaluate_model, forward
from lowbit.evaluation.forward import MOST, chunk_of, logits_of
from lowbit.modules import KVFormats, KVSpec
from lowbit.recipes import kv_scheme
from lowbit.scheme import activation, linears, weight

from evaluation_models import char_tokenizer, random_ids, tiny_model

LONG = {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def model():
    return tiny_model(**LONG)


def with_cache(model, kv: str | KVSpec, **options):
    other = copy.deepcopy(model)
    use_cache(other, kv_scheme(kv, **options).cache)
    return other


def test_a_cache_that_packs_nothing_changes_no_figure(model):
    ids = random_ids(300)
    found = evaluate_model(with_cache(model, KVSpec(None, None)), ids, None, "gptq", 150, against=model)
    assert found.kl == pytest.approx(0, abs=1e-9) and found.top1_agreement == 1
    assert found.protocol == f"gptq, through the cache, chunks of {MOST}"
    assert evaluate_model(model, ids, None, "gptq", 150).protocol == "gptq"


@pytest.mark.parametrize(
    ("method", "options", "chunk", "text"),
    [
        ("kv-int:3", {}, 1, "token by token"),
        ("kv-int:3", {"recent": 11}, 5, "chunks of 5"),
        ("kivi:2", {"recent": 32}, 16, "chunks of 16"),
        ("kivi:2", {}, 32, "chunks of 32"),
    ],
)
def test_a_window_is_read_in_chunks_through_the_cache_the_first_one_too(model, method, options, chunk, text):
    packed, ids = with_cache(model, method, **options), random_ids(200)
    cache, parts = lowbit.kv_cache(model, method, **options), []
    assert chunk_of(lowbit.modules.kv_formats(packed)) == chunk
    with torch.no_grad():
        for start in range(0, 200, chunk):
            parts.append(model(ids[None, start : start + chunk], **{cache_argument(model): cache}).logits[0])
        wanted = torch.cat(parts)
        assert torch.allclose(logits_of(packed, ids), wanted, atol=1e-4)  # attention sums in another order
        assert not torch.allclose(wanted, logits_of(packed, ids, cached=False), rtol=1e-3)
        assert torch.allclose(logits_of(packed, ids, last=50), wanted[-50:], atol=1e-4)
        assert torch.allclose(logits_of(packed, ids, cached=False, last=50), logits_of(model, ids)[-50:])
    found = evaluate_model(packed, ids, None, "gptq", 200)
    assert found.protocol == f"gptq, through the cache, {text}"
    assert evaluate_model(packed, ids, None, "gptq", 200, chunk=7).protocol == "gptq, through the cache, chunks of 7"
    with pytest.raises(ValueError, match="chunk is 7, and nothing quantizes this model's cache"):
        evaluate_model(model, ids, None, "gptq", 200, chunk=7)


@pytest.mark.parametrize(
    ("method", "options", "chunk", "floating"),
    [("kivi:2", {"sink": 4}, None, 132), ("kv-int:3", {}, 40, 40), ("kv-int:3", {"recent": 20}, None, 20)],
)
def test_windows_that_are_too_short_to_read_anything_packed_say_so(model, method, options, chunk, floating):
    packed, ids = with_cache(model, method, **options), random_ids(floating + 50)
    short, long = (evaluate_model(packed, ids, None, "gptq", floating + more, chunk=chunk) for more in (0, 41))
    plain = [evaluate_model(model, ids, None, "gptq", floating + more) for more in (0, 41)]
    words = f", of which nothing was read packed: the first {floating} tokens are read as they are"
    assert short.protocol.endswith(words) and "read packed" not in long.protocol
    assert short.perplexity == pytest.approx(plain[0].perplexity, rel=1e-6)
    assert abs(long.perplexity / plain[1].perplexity - 1) > 1e-6


def calls_of(model, ids):
    """How often ``logits_of`` calls the model, and what it gives."""
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(1))
    logits = logits_of(model, ids)
    hook.remove()
    return len(seen), logits


def test_token_by_token_is_one_call_where_that_is_the_same(model, monkeypatch):
    packed, ids = with_cache(model, "kv-int:3"), random_ids(60)
    with torch.no_grad():
        calls, at_once = calls_of(packed, ids)
        assert calls == 1
        monkeypatch.setattr(forward, "AT_ONCE", 0)
        calls, one_by_one = calls_of(packed, ids)
    assert calls == 60
    assert torch.allclose(at_once, one_by_one, atol=1e-4)


def test_a_range_that_belongs_to_a_whole_call_is_read_token_by_token(tmp_path):
    tiny_model(dtype=torch.float32, **LONG).save_pretrained(tmp_path / "model")
    kv = kv_scheme("kv-int:3").kv
    for per, calls in (("tensor", 40), ("token", 1)):
        scheme = replace(linears(weight(8, None), activation(8, per=per)), kv=kv)
        recipe = lowbit.Recipe("rtn", scheme, lowbit.recipe("rtn").stages)
        lowbit.quantize(tmp_path / "model", recipe, random_ids(256).view(2, 128), out=tmp_path / per, max_kl=50)
        with torch.no_grad():
            assert calls_of(lowbit.load(tmp_path / per), random_ids(40))[0] == calls


def test_fewer_bits_cost_more_and_longer_chunks_flatter_a_cache_without_a_window(model):
    ids = random_ids(400)

    def cost(bits, **options):
        packed = with_cache(model, "kv-int", bits=bits)
        return evaluate_model(packed, ids, None, "gptq", 200, against=model, **options).kl

    costs = [cost(bits) for bits in (8, 4, 2)]
    assert 0 < costs[0] < costs[1] / 10 and costs[1] < costs[2]
    assert cost(2, chunk=200) == pytest.approx(0, abs=1e-9) and cost(2, chunk=32) < costs[2]


def test_a_model_in_memory_has_its_own_cache_and_one_by_name_takes_another(model, tmp_path):
    tiny_model(dtype=torch.float32, **LONG).save_pretrained(tmp_path / "model")
    ids = random_ids(128)
    plain = lowbit.evaluate(tmp_path / "model", ids, seq_len=128, windows=1)
    packed = lowbit.evaluate(tmp_path / "model", ids, seq_len=128, windows=1, kv="kivi:2", against=tmp_path / "model")
    assert plain.cache_bits is None and packed.cache_bits == kv_scheme("kivi:2").kv.bits(8)
    assert packed.reference_perplexity == pytest.approx(plain.perplexity)
    lowbit.quantize(tmp_path / "model", "kivi", random_ids(256).view(2, 128), out=tmp_path / "out", max_kl=50)
    own = lowbit.evaluate(tmp_path / "out", ids, seq_len=128, windows=1)
    assert own.perplexity == pytest.approx(packed.perplexity, rel=1e-5) and own.cache_bits == packed.cache_bits
    off = lowbit.evaluate(tmp_path / "out", ids, seq_len=128, windows=1, kv="none")
    assert off.perplexity == pytest.approx(plain.perplexity, rel=1e-5) and off.cache_bits is None
    with pytest.raises(ValueError, match="kv= goes with a model's place"):
        lowbit.evaluate(model, ids, kv="kivi")


@pytest.mark.parametrize("length", [600, 901])
def test_a_retrieval_prompt_has_its_length_and_every_answer_stands_in_it_before(length):
    tokenizer = char_tokenizer()
    ids, answers = cache_checks._facts(tokenizer, length, random.Random(0))
    text = tokenizer.decode(ids)
    asked = [tokenizer.decode(ids[answer.start : answer.stop]) for answer in answers]
    assert len(ids) == length and len(set(asked)) == cache_checks.PAIRS
    for answer, code in zip(answers, asked, strict=True):
        name = re.search(r"The code of (\w+) is$", text[: answer.start])[1]
        assert re.fullmatch(r" \d{4}\.", code)
        assert text[: answers[0].start - 30].count(f"The code of {name} is{code}") == 1
        assert text.count(f"The code of {name} is{code}") == 2


def test_retrieval_counts_an_answer_only_if_every_token_of_it_is_first(model, monkeypatch):
    tokenizer, calls = char_tokenizer(), []

    def oracle(model, ids, *, cached=True, last=None):
        calls.append(cached)
        logits = torch.full((len(ids), 128), -20.0)
        logits[torch.arange(len(ids) - 1), ids[1:]] = 20.0
        if cached:  # one wrong token in the last answer
            logits[-3] = 0.0
            logits[-3, 5] = 1.0
        return logits[-last:]

    monkeypatch.setattr(cache_checks, "logits_of", oracle)
    (score,) = check_retrieval(model, tokenizer, [600])
    assert (score.answers, score.tokens, score.name) == (cache_checks.PAIRS * cache_checks.PROMPTS, 600, "retrieval")
    assert score.solved_floating == 1 and score.solved == 1 - 1 / cache_checks.PAIRS
    assert score.nll_floating < 1e-6 < score.nll and set(calls) == {True, False}


def test_checks_of_a_model_without_a_quantized_cache_are_the_same_twice_and_a_cache_changes_them(model):
    tokenizer = char_tokenizer()
    for other in (model, with_cache(model, KVSpec(None, None))):
        (score,) = check_retrieval(other, tokenizer, [600])
        assert score.solved == score.solved_floating and score.nll == pytest.approx(score.nll_floating)
    (score,) = check_retrieval(with_cache(model, "kv-int:1"), tokenizer, [600])
    assert score.nll != pytest.approx(score.nll_floating, rel=1e-3)


def test_generation_runs_the_packed_cache_beside_transformers_own(model, monkeypatch):
    monkeypatch.setattr(cache_checks, "GENERATED", 1)
    tokenizer, packed = char_tokenizer(), with_cache(model, "kv-int:1")
    start = torch.tensor(tokenizer("the cat sat on the mat " * 4)["input_ids"])
    ours, theirs = cache_checks._generated(packed, start, 40, tokenizer)
    assert len(ours) == len(theirs) == 40 and not torch.equal(ours, theirs)
    plain = model.generate(start[None], max_new_tokens=40, do_sample=False, eos_token_id=None)[0, len(start) :]
    assert torch.equal(theirs, plain)
    scores = check_generation(packed, tokenizer)
    assert [score.name for score in scores] == ["copying", "counting", "arithmetic"]
    assert all(score.answers == 1 and score.tokens > 256 and score.solved == 0 for score in scores)


def test_answers_of_the_generation_checks_are_right():
    draw = random.Random(0)
    prompt, answer = cache_checks._arithmetic(draw)
    for a, b, c in re.findall(r"(\d+) \+ (\d+) = (\d+)\n", prompt + answer):
        assert int(a) + int(b) == int(c)
    prompt, answer = cache_checks._counting(draw)
    numbers = [int(each) for each in (prompt + answer).strip(",").split(", ")]
    assert len(numbers) == 88 and len({b - a for a, b in itertools.pairwise(numbers)}) == 1
    prompt, answer = cache_checks._copying(draw)
    listed = prompt.partition("\n")[0]
    assert (prompt.rpartition("\n")[2] + answer) == listed and answer.count(", ") == 7


def test_a_prompt_that_the_model_or_the_facts_do_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="prompt of 5000 tokens needs 5000 positions"):
        check_retrieval(model, char_tokenizer(), [5000])
    with pytest.raises(ValueError, match="does not hold 8 facts"):
        check_retrieval(model, char_tokenizer(), [100])
    assert KVFormats() == lowbit.modules.kv_formats(model)
