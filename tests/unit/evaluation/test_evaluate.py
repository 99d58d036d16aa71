"""The evaluation package on tiny random models: every figure against a small computation of its own."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from lowbit.evaluation import (
    PROTOCOLS,
    as_protocol_reads,
    directory_bytes,
    evaluate_model,
    generate_text,
    measure_speed,
    memory,
    model_bytes,
    output_error,
    peak_rss,
    reset_peak_rss,
    speed,
    sqnr_db,
)
from lowbit.evaluation.intervals import mean_and_interval, student_t
from lowbit.evaluation.speed import Plan, fit_budget
from lowbit.evaluation.windows import cut
from lowbit.texts import load_text

from evaluation_models import BOS, EOS, VOCABULARY, char_tokenizer, random_ids, tiny_model

TEXT = "the cat sat on the mat and\n looked at  the dog; \n\nnothing happened for a long while. " * 3


def perturbed(model: nn.Module, amount: float = 0.1) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += amount * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def other(model) -> nn.Module:
    return perturbed(model)


# perplexity by protocol


@torch.no_grad()
def test_gptq_perplexity_is_the_mean_over_all_predictions_of_disjoint_windows(model):
    ids = random_ids(5 * 16 + 9)
    losses = []
    for start in range(0, 5 * 16, 16):
        window = ids[start : start + 16]
        losses += F.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none").tolist()
    found = evaluate_model(model, ids, None, "gptq", 16)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-12)
    assert (found.tokens, found.windows, found.words) == (5 * 15, 5, None)


@pytest.mark.parametrize("seq_len", [16, 17, 3])
@pytest.mark.parametrize("adds_bos", [False, True])
@torch.no_grad()
def test_llama_cpp_perplexity_counts_the_second_half_and_puts_bos_first(model, adds_bos, seq_len):
    tokenizer = char_tokenizer(adds_bos=adds_bos)
    stream = ([BOS] if adds_bos else []) + tokenizer(TEXT, add_special_tokens=False).input_ids
    total, count = 0.0, 0
    for chunk in range(4):
        start = chunk * seq_len
        tokens = stream[start : start + seq_len]
        if adds_bos:
            tokens[0] = BOS
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for position in range(seq_len // 2, seq_len - 1):
            total -= float(logprobs[position, stream[start + position + 1]])
            count += 1
    found = evaluate_model(model, TEXT, tokenizer, "llama.cpp", seq_len, 4)
    assert count == 4 * (seq_len - 1 - seq_len // 2)
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-12)


def test_word_perplexity_is_that_of_lm_eval(model):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    tokenizer = char_tokenizer()
    documents = [TEXT, "a short one", "exactly thirty-two characters ok"]
    assert len(documents[2]) == 32
    judge = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, max_length=32, batch_size=1, device="cpu")
    requests = [Instance("loglikelihood_rolling", {}, (document,), index) for index, document in enumerate(documents)]
    expected = -sum(judge.loglikelihood_rolling(requests, disable_tqdm=True))
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    found = evaluate_model(model, documents, tokenizer, "word", 32)
    assert found.words == words
    assert found.tokens == sum(map(len, documents))
    assert math.log(found.perplexity) == pytest.approx(expected / words, rel=1e-12)


@torch.no_grad()
def test_word_windows_predict_every_token_once_and_the_last_is_filled_with_context(model):
    ids = char_tokenizer()(TEXT, add_special_tokens=False).input_ids
    assert len(ids) == 7 * 32 + 31
    total = 0.0
    for position, token in enumerate(ids):
        # the context of this token: earlier tokens of its window, or in the short last window 32 tokens to the end
        first = position // 32 * 32 if position < 7 * 32 else len(ids) - 32
        context = [BOS, *ids][first : position + 1]
        total -= float(model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token])
    found = evaluate_model(model, TEXT, char_tokenizer(), "word", 32)
    assert found.perplexity == pytest.approx(math.exp(total / len(re.split(r"\s+", TEXT))), rel=1e-9)


def test_word_perplexity_of_a_cut_document_counts_the_words_that_were_predicted(model):
    cut_short = evaluate_model(model, [TEXT, TEXT], char_tokenizer(), "word", 32, 2)
    whole = evaluate_model(model, TEXT[:64], char_tokenizer(), "word", 32)
    assert (cut_short.words, cut_short.tokens) == (len(re.split(r"\s+", TEXT[:64])), 64)
    assert cut_short.perplexity == whole.perplexity


def test_protocols_disagree_on_one_text(model):
    figures = {name: evaluate_model(model, TEXT, char_tokenizer(), name, 32, 3).perplexity for name in PROTOCOLS}
    assert len(set(figures.values())) == len(PROTOCOLS)


def test_text_ids_and_rows_of_ids_are_one_input(model):
    tokenizer = char_tokenizer(adds_bos=True)
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False).input_ids)
    by_text = evaluate_model(model, TEXT, tokenizer, "gptq", 32, 4)
    assert evaluate_model(model, ids, None, "gptq", 32, 4) == by_text
    assert evaluate_model(model, ids[: 4 * 32].view(4, 32), None, "gptq", 32) == by_text
    assert evaluate_model(model, ids.flip(0), None, "gptq", 32, 4).ids_sha256 != by_text.ids_sha256
    assert evaluate_model(model, ids, None, "gptq", 16, 8).ids_sha256 != by_text.ids_sha256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "gtpq"}, "unknown perplexity protocol 'gtpq': choose one of gptq, llama.cpp, word"),
        ({"seq_len": 1}, "at least 2 tokens"),
        ({"seq_len": 2, "protocol": "llama.cpp"}, "at least 3"),
        ({"windows": 0}, "at least 1"),
        ({"windows": 99}, r"holds \d+ windows of 32 tokens and 99 were asked"),
        ({"windows": 99, "protocol": "word"}, r"holds \d+ windows of 32 tokens and 99 were asked"),
        ({"text": ""}, "holds 0 windows"),
        ({"text": "", "protocol": "word"}, "holds 0 windows"),
        ({"text": ["a", "b"]}, "several documents"),
        ({"text": random_ids(99), "protocol": "word"}, "pass text and a tokenizer"),
        ({"text": random_ids(64).view(2, 32), "seq_len": 16}, "windows of 32 and seq_len is 16"),
        ({"text": random_ids(64).float()}, r"ids are integers .*found torch.float32 \[64\]"),
        ({"text": random_ids(64).view(4, 4, 4)}, r"ids are integers .*found torch.int64 \[4, 4, 4\]"),
        ({"text": random_ids(64).numpy()}, r"type ndarray; expected .*torch\.tensor\(ids\)"),
        ({"text": random_ids(64).tolist()}, "type list; expected a text, a list of texts, or token ids"),
        ({"text": [[1, 2], [3, 4]], "protocol": "word"}, "type list; expected"),
        ({"text": None}, "type NoneType; expected"),
        ({"text": torch.full((64,), VOCABULARY)}, "vocabulary has 128"),
        ({"text": torch.full((64,), -1)}, "ids run from -1"),
        ({"tokenizer": None}, "needs a tokenizer"),
        ({"seq_len": 65}, "the model has 64"),
    ],
)
def test_bad_arguments_say_what_to_do(model, arguments, message):
    call = {"text": TEXT, "tokenizer": char_tokenizer(), "protocol": "gptq", "seq_len": 32, "windows": None} | arguments
    with pytest.raises(ValueError, match=message):
        evaluate_model(model, **call)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_are_integers_of_any_type(model, dtype):
    assert evaluate_model(model, random_ids(64).to(dtype), None, "gptq", 32) == evaluate_model(
        model, random_ids(64), None, "gptq", 32
    )


def test_evaluation_ignores_dropout_and_puts_each_mode_back():
    model = tiny_model(attention_dropout=0.9)
    expected = evaluate_model(model, random_ids(64), None, "gptq", 32)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert evaluate_model(model, random_ids(64), None, "gptq", 32) == expected
    assert [module.training for module in model.modules()] == before
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_progress_counts_every_window(model):
    seen: list[tuple] = []
    evaluate_model(model, random_ids(96), None, "gptq", 32, progress=lambda *call: seen.append(call))
    assert seen == [(done, 3, "perplexity") for done in range(4)]


# the distance to another model


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_against_itself_has_no_divergence(model, protocol):
    single = copy.deepcopy(model).float()
    found = evaluate_model(single, TEXT, char_tokenizer(), protocol, 32, against=single)
    assert (found.kl, found.kl_interval) == (0.0, (0.0, 0.0))
    assert (found.top1_agreement, found.top1_interval) == (1.0, (1.0, 1.0))
    assert found.reference_perplexity == found.perplexity
    assert (found.log_perplexity_difference, found.log_perplexity_difference_interval) == (0.0, (0.0, 0.0))


def test_without_an_original_there_is_no_comparison(model):
    found = evaluate_model(model, random_ids(64), None, "gptq", 32)
    compared = (found.kl, found.kl_interval, found.top1_agreement, found.top1_interval, found.reference_perplexity)
    assert (*compared, found.log_perplexity_difference, found.log_perplexity_difference_interval) == (None,) * 7


@torch.no_grad()
def test_one_pass_gives_the_figures_of_separate_passes(model, other):
    ids = random_ids(6 * 16)
    found = evaluate_model(other, ids, None, "gptq", 16, against=model)
    logp, logq = (judged(ids.view(6, 16)).logits[:, :-1].log_softmax(-1).flatten(0, 1) for judged in (model, other))
    assert found.kl == pytest.approx(float(F.kl_div(logq, logp, log_target=True, reduction="batchmean")), rel=1e-12)
    assert found.top1_agreement == float((logp.argmax(-1) == logq.argmax(-1)).double().mean())
    assert found.perplexity == evaluate_model(other, ids, None, "gptq", 16).perplexity
    assert found.reference_perplexity == evaluate_model(model, ids, None, "gptq", 16).perplexity
    assert found.kl > 0 and 0 < found.top1_agreement < 1
    ratio = math.log(found.perplexity / found.reference_perplexity)
    assert found.log_perplexity_difference == pytest.approx(ratio, rel=1e-9)
    # Windows that are hard for one model are hard for the other: the interval of differences is the narrower.
    low, high = found.log_perplexity_difference_interval
    assert low < ratio < high
    own_low, own_high = found.perplexity_interval
    assert high - low < math.log(own_high / own_low)


def test_models_of_different_vocabularies_are_not_compared(model):
    wider = tiny_model(vocab_size=VOCABULARY + 8)
    with pytest.raises(ValueError, match="128 logits and the original 136"):
        evaluate_model(model, random_ids(64), None, "gptq", 32, against=wider)


# intervals


def test_intervals_hold_the_point_and_shrink_with_more_windows(model, other):
    few, many = (evaluate_model(other, random_ids(n * 16), None, "gptq", 16, against=model) for n in (5, 80))
    for name, interval in (
        ("perplexity", "perplexity_interval"),
        ("kl", "kl_interval"),
        ("top1_agreement", "top1_interval"),
    ):
        widths = []
        for found in (few, many):
            low, high = getattr(found, interval)
            assert low < getattr(found, name) < high
            widths.append(high - low)
        assert widths[1] < widths[0] / 2


def test_one_window_has_no_interval(model, other):
    found = evaluate_model(other, random_ids(16), None, "gptq", 16, against=model)
    assert (found.perplexity_interval, found.kl_interval, found.top1_interval) == (None, None, None)


def test_with_equal_windows_the_interval_is_students():
    stats = pytest.importorskip("scipy.stats")
    means = np.random.default_rng(0).normal(3, 1, size=9)
    mean, interval = mean_and_interval(means * 31, np.full(9, 31.0))
    expected = stats.t.interval(0.95, 8, loc=means.mean(), scale=stats.sem(means))
    assert mean == pytest.approx(means.mean(), rel=1e-12)
    assert interval == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 19, 100, 10_000])
def test_student_t_is_scipys(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert student_t(freedom) == pytest.approx(float(stats.t.ppf(0.975, freedom)), rel=2e-3)


def test_95_percent_intervals_hold_the_truth_about_95_percent_of_the_time():
    draws = np.random.default_rng(1).normal(2.0, 1.0, size=(4000, 8))
    held = [low <= 2.0 <= high for _, (low, high) in (mean_and_interval(row * 15, np.full(8, 15.0)) for row in draws)]
    assert 0.94 < np.mean(held) < 0.96


# broken models and JSON


def test_a_model_of_nan_is_reported_as_broken(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    found = evaluate_model(broken, random_ids(64), None, "gptq", 32, against=model)
    assert found.broken and found.broken_tokens == found.tokens == 62
    assert math.isnan(found.perplexity) and found.kl is not None and math.isnan(found.kl)
    assert found.top1_agreement == 0
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["perplexity"] is None and written["kl"] is None and written["broken"] is True


def test_a_model_that_rules_out_what_came_is_broken(model):
    ids = random_ids(64)
    broken = copy.deepcopy(model)
    # a forbidden token: its logit is minus infinity
    broken.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits.index_fill(-1, ids[1:2], -torch.inf))
    found = evaluate_model(broken, ids, None, "gptq", 32, against=model)
    assert found.perplexity == math.inf and found.kl == math.inf and found.broken
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["perplexity"] is None


def test_infinite_divergence_alone_is_broken(model):
    broken = copy.deepcopy(model)
    # id 0 never comes, so the loss stays finite; the original gives it some probability and this model none
    broken.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([0]), -torch.inf)
    )
    found = evaluate_model(broken, random_ids(64), None, "gptq", 32, against=model)
    assert math.isfinite(found.perplexity) and found.kl == math.inf
    assert found.broken and found.broken_tokens == found.tokens


def test_a_finite_loss_too_large_for_a_float_is_infinite_perplexity(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight *= 1e6
    found = evaluate_model(broken, random_ids(64), None, "gptq", 32)
    assert found.perplexity == math.inf and found.broken and found.broken_tokens == 0


def test_a_broken_original_is_an_error(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the original model's own logits"):
        evaluate_model(model, random_ids(64), None, "gptq", 32, against=broken)


def test_to_dict_has_the_names_that_scripts_read(model, other):
    found = evaluate_model(other, random_ids(64), None, "gptq", 32, against=model, text_name="random")
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (written["bits_per_weight"], written["bytes"], written["broken"]) == (None, None, False)
    assert (written["text"], written["protocol"], written["seq_len"], written["windows"]) == ("random", "gptq", 32, 2)
    assert written["perplexity"] == found.perplexity and written["kl"] == found.kl
    assert written["perplexity_interval"] == list(found.perplexity_interval)
    filled = replace(found, bits_per_weight=4.5, bytes=1234).to_dict()
    assert (filled["bits_per_weight"], filled["bytes"]) == (4.5, 1234)


# speed


def record_passes(model: nn.Module) -> list[int]:
    """Records the input lengths of all later forward passes."""
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def test_speed_runs_a_warm_up_and_the_repeats_with_a_token_a_step():
    model = tiny_model(dtype=torch.float32)
    lengths = record_passes(model)
    caches: list[DynamicCache] = []

    def make_cache() -> DynamicCache:
        caches.append(DynamicCache(config=model.config))
        return caches[-1]

    found = measure_speed(model, 20, 5, 2, make_cache=make_cache)
    assert lengths == [20, 1, 1, 1, 1, 1] * 3
    assert [cache.get_seq_length() for cache in caches] == [25, 25, 25]
    assert found.prefill_tokens_per_s > 0 and found.decode_tokens_per_s > 0
    assert (found.prompt_tokens, found.new_tokens, found.repeats) == (20, 5, 2)
    assert found.to_dict()["new_tokens"] == 5


def test_speed_is_the_median_of_the_passes_after_the_first(monkeypatch):
    times = iter([(900.0, 900.0), (1.0, 4.0), (2.0, 1.0), (60.0, 2.0)])
    monkeypatch.setattr(speed, "_timed_pass", lambda *_: next(times))
    found = measure_speed(tiny_model(dtype=torch.float32), 20, 10, 3)
    assert (found.prefill_tokens_per_s, found.decode_tokens_per_s) == (20 / 2, 10 / 2)


def test_speed_without_time_measures_one_token_and_says_so():
    model = tiny_model(dtype=torch.float32)
    found = measure_speed(model, 40, 8, 3, time_budget_s=0)
    assert (found.prompt_tokens, found.new_tokens, found.repeats) == (1, 1, 1)
    assert found.prefill_tokens_per_s > 0


def test_speed_with_time_enough_measures_all_that_was_asked():
    found = measure_speed(tiny_model(dtype=torch.float32), 24, 3, 2, time_budget_s=600)
    assert (found.prompt_tokens, found.new_tokens, found.repeats) == (24, 3, 2)


@pytest.mark.parametrize(
    ("budget_s", "expected"),
    [
        (100, Plan(100, 10, 3)),  # a pass takes 2 s: the whole plan fits
        (7, Plan(100, 10, 2)),  # a warm-up and two
        (4, Plan(100, 10, 1)),
        (2, Plan(50, 5, 1)),  # half of every phase, twice
        (0, Plan(1, 1, 1)),
    ],
)
def test_a_budget_takes_repeats_before_tokens(budget_s, expected):
    assert fit_budget(Plan(100, 10, 3), 0.01, 0.1, budget_s) == expected


def test_speed_refuses_what_the_model_cannot_hold():
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match="60 prompt \\+ 5 new tokens needs 65 positions and the model has 64"):
        measure_speed(model, 60, 5)
    with pytest.raises(ValueError, match="at least 1, found prompt_tokens=8, new_tokens=0"):
        measure_speed(model, 8, 0)


# memory


def test_directory_bytes_are_exact(tmp_path):
    (tmp_path / "model-00001.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "config.json").write_bytes(b"x" * 30)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.safetensors").write_bytes(b"x" * 7)
    (tmp_path / "linked.gguf").symlink_to(tmp_path / "sub" / "more.safetensors")
    found = directory_bytes(tmp_path)
    assert (found.weights, found.total) == (1014, 1044)
    assert directory_bytes(tmp_path / "config.json").total == 30
    with pytest.raises(ValueError, match="no checkpoint at"):
        directory_bytes(tmp_path / "absent")


def test_tied_weights_and_views_count_once():
    untied, tied = (tiny_model(dtype=torch.float32, tie_word_embeddings=tie) for tie in (False, True))
    assert model_bytes(untied) - model_bytes(tied) == VOCABULARY * 32 * 4

    module = nn.Linear(8, 4, dtype=torch.float16)
    assert model_bytes(module) == (8 * 4 + 4) * 2
    module.register_buffer("codes", torch.zeros(100, dtype=torch.uint8))
    module.register_buffer("view", module.codes[10:20], persistent=False)
    assert model_bytes(module) == (8 * 4 + 4) * 2 + 100


def test_peak_rss_holds_the_largest_allocation_until_it_is_reset():
    size = 200 * 2**20
    if not reset_peak_rss():
        pytest.skip("this system does not let a process reset its peak")
    before = peak_rss()
    block = torch.ones(size, dtype=torch.uint8)
    assert peak_rss() - before > 0.9 * size
    del block
    high = peak_rss()
    assert high - before > 0.9 * size
    assert reset_peak_rss()
    assert peak_rss() < high - 0.5 * size


def test_without_proc_the_peak_comes_from_getrusage_in_bytes(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(memory, "_status_bytes", lambda field: None)
    scale = 1 if sys.platform == "darwin" else 1024
    assert peak_rss() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale > 50 * 2**20
    monkeypatch.setattr(memory.Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert reset_peak_rss() is False


# layers


def test_output_error_is_relative_and_in_float64():
    reference = torch.tensor([[3.0, 4.0]])
    assert output_error(reference, reference) == 0.0
    assert output_error(reference, torch.zeros(1, 2)) == 1.0
    assert output_error(reference, torch.tensor([[3.0, 4.5]])) == 0.01
    assert sqnr_db(reference, torch.tensor([[3.0, 4.5]])) == pytest.approx(20.0, rel=1e-12)
    # in float32 the sum of squares would be infinite
    huge = torch.full((10,), 1e30)
    assert output_error(huge, huge * 1.5) == pytest.approx(0.25, rel=1e-6)
    many = torch.full((3, 2**20), 2.0)  # more than is held in float64 at once
    assert output_error(many, many * 1.25) == 0.0625


def test_output_error_of_the_edges():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert output_error(zeros, zeros) == 0.0 and sqnr_db(zeros, zeros) == math.inf
    assert output_error(zeros, ones) == math.inf and sqnr_db(zeros, ones) == -math.inf
    assert math.isnan(output_error(ones, torch.full((3,), math.nan)))
    assert math.isnan(sqnr_db(zeros, torch.full((3,), math.nan)))
    with pytest.raises(ValueError, match=r"found \[3\] and \[1\]"):
        output_error(ones, torch.ones(1))


# generation


def test_generate_is_greedy_and_gives_only_the_new_text():
    model, tokenizer = tiny_model(dtype=torch.float32, vocab_size=98), char_tokenizer()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
        if ids[0, -1] == EOS:
            break
    expected = tokenizer.decode(ids[0, 7:], skip_special_tokens=True)
    pieces: list[str] = []
    found = generate_text(model, tokenizer, "the cat", 12, on_text=pieces.append)
    assert found == expected
    assert "".join(pieces) == expected


def test_sampling_follows_its_seed_and_leaves_the_callers_random_state():
    model, tokenizer = tiny_model(dtype=torch.float32, vocab_size=98), char_tokenizer()
    state = torch.get_rng_state()
    first, again, different = (generate_text(model, tokenizer, "the", 30, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert first == again != different
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_nan_is_refused_instead_of_writing_nothing(temperature):
    model, tokenizer = tiny_model(dtype=torch.float32, vocab_size=98), char_tokenizer()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        generate_text(model, tokenizer, "the cat", 4, temperature=temperature)


def test_chat_goes_through_the_template():
    model, tokenizer = tiny_model(dtype=torch.float32, vocab_size=98), char_tokenizer()
    hello = [{"role": "user", "content": "hello"}]
    with pytest.raises(ValueError, match="no chat template"):
        generate_text(model, tokenizer, hello)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    assert generate_text(model, tokenizer, hello, 9) == generate_text(model, tokenizer, "[hello]A:", 9)
    long = [{"role": "user", "content": "a" * model.config.max_position_embeddings}]
    with pytest.raises(ValueError, match=r"the conversation needs .* positions"):
        generate_text(model, tokenizer, long)
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(ValueError, match="refuses messages of the roles user: no system messages"):
        generate_text(model, tokenizer, hello)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_text(model, tokenizer, "")


def test_the_tokenizer_of_these_tests_gives_the_text_back():
    tokenizer = char_tokenizer(adds_bos=True)
    assert tokenizer("a").input_ids[0] == BOS
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT
    assert len(cut(TEXT, tokenizer, "gptq", 32, None).windows) == len(TEXT) // 32


# protocols that join rows


def test_ptb_and_c4_join_rows_as_gptqs_code_does(model):
    tokenizer, rows = char_tokenizer(), [f" sentence {i} of some text \n" for i in range(1200)]
    joined = {"ptb": " ".join(row.strip() for row in rows), "c4": " ".join(rows[:1100])}
    for protocol, text in joined.items():
        for given in (rows, "".join(rows)) if protocol == "ptb" else (rows,):
            found = evaluate_model(model, given, tokenizer, protocol, 32, 4)
            assert found.ids_sha256 == evaluate_model(model, text, tokenizer, "gptq", 32, 4).ids_sha256
    assert len(cut(rows, tokenizer, "c4", 16, None).windows) == 256
    with pytest.raises(ValueError, match="256 windows at most, and 300 were asked"):
        cut(rows, tokenizer, "c4", 16, 300)
    with pytest.raises(ValueError, match="pass text, not ids"):
        cut(random_ids(64), tokenizer, "c4", 16, 1)


def test_rows_of_a_file_reach_the_protocols_that_join_them(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n{"text": "another\\nrow"}\n')
    text = load_text(str(tmp_path / "rows.jsonl"), "evaluation")
    assert as_protocol_reads(text, "c4") == ("one row", "another\nrow")
    assert as_protocol_reads(text, "gptq") == "one row\n\nanother\nrow"
