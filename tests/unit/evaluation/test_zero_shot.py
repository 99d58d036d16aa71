"""Zero-shot tasks from files: what is asked, what counts as right, and which files are refused.

That the scores are lm-eval's is tested against lm-eval in tests/interop/test_lm_eval.py.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.evaluation import forward, likelihood
from lowbit.evaluation.likelihood import Request, likelihoods
from lowbit.evaluation.zero_shot import PROMPTS, read_tasks, score_task

from evaluation_models import char_tokenizer, tiny_model

ITEMS = {
    "piqa": [{"query": "Question: how?\n", "choices": ["so", "like this"], "gold": 1}],
    "boolq": [{"query": "Passage: It is.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}],
    "hellaswag": [{"query": "He sits. he", "choices": ["runs.", ", then, stands."], "gold": 0}],
    "winogrande": [{"context_options": ["So Ann", "So Eve"], "continuation": "won.", "gold": 0}],
}


def write(folder: Path, tasks: dict[str, list[dict]]) -> Path:
    for name, rows in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


def test_the_papers_tasks_are_asked_with_lm_evals_prompts(tmp_path):
    piqa, boolq, hellaswag, winogrande = read_tasks(ITEMS, write(tmp_path, ITEMS))
    assert piqa.items[0].requests[1] == ("Question: how?\nAnswer:", " like this")
    assert boolq.items[0].requests == (
        ("It is.\nQuestion: is it?\nAnswer:", " no"),
        ("It is.\nQuestion: is it?\nAnswer:", " yes"),
    )
    assert hellaswag.items[0].requests[1] == ("He sits. he", " , then, stands.")
    assert winogrande.items[0].requests == (("So Ann", " won."), ("So Eve", " won."))
    assert set(PROMPTS) == {"piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande"}


def test_accuracy_is_by_likelihood_and_normalized_accuracy_by_likelihood_per_character(model, tmp_path, monkeypatch):
    rows = [{"query": "q", "choices": ["ab", "abcdefghij"], "gold": gold} for gold in (0, 1)]
    nats = {" ab": -4.0, " abcdefghij": -10.0}  # the short one is likelier, the long one per character

    def told(model, tokenizer, items):
        for requests in items:
            yield tuple(likelihood.Likelihood(nats[each.continuation], False, 1) for each in requests)

    monkeypatch.setattr("lowbit.evaluation.zero_shot.likelihoods", told)
    (task,) = read_tasks(["mine"], write(tmp_path, {"mine": rows}))
    acc, norm = score_task(model, char_tokenizer(), task).metrics
    assert (acc.values, norm.values) == ((1, 0), (0, 1))
    nats[" ab"] = math.nan
    broken = score_task(model, char_tokenizer(), task)
    assert [metric.values for metric in broken.metrics] == [(0, 0)] * 2 and broken.broken == 2


def test_a_likelihood_is_the_sum_of_the_continuations_log_probabilities(model):
    tokenizer = char_tokenizer(adds_bos=True)
    ((found,),) = likelihoods(model, tokenizer, [[Request("to be or ", "not")]])
    ids = torch.tensor([tokenizer("to be or not")["input_ids"]])
    with torch.no_grad():
        log = model(ids).logits[0, :-1].log_softmax(-1)
    wanted = log.gather(1, ids[0, 1:, None])[-4:]  # the space before "not" belongs to it
    assert (found.tokens, found.cut) == (4, 0) and found.nats == pytest.approx(wanted.sum().item(), rel=1e-5)


def test_a_continuation_is_greedy_where_each_of_its_tokens_is_the_first_choice(model):
    tokenizer, seen = char_tokenizer(), 0
    for context in ("abc", "why", "no, not", "a = 1", "Zoo"):
        with torch.no_grad():
            best = tokenizer.decode(model(tokenizer(context, return_tensors="pt")["input_ids"]).logits[0, -1].argmax())
        if len(best) == 1 and best.strip():
            asked = [
                Request(context, best),
                Request(context, "b" if best == "a" else "a"),
                Request(context, best + "~~~"),
            ]
            ((right, wrong, longer),) = likelihoods(model, tokenizer, [asked])
            assert (right.greedy, wrong.greedy, longer.greedy) == (True, False, False)
            seen += 1
    assert seen


def test_requests_in_a_batch_score_as_alone_and_equal_inputs_run_once(model, monkeypatch):
    requests = [Request("a question", f" {answer}") for answer in ("a", "b", "some more", "x" * 60)]
    (together,) = likelihoods(model, char_tokenizer(), [requests])
    monkeypatch.setattr(likelihood, "rows_are_alone", lambda model: False)
    apart = [each for (each,) in likelihoods(model, char_tokenizer(), ([request] for request in requests))]
    assert [each.nats for each in together] == pytest.approx([each.nats for each in apart], rel=1e-5)
    assert [each.cut for each in together] == [0, 0, 0, 6]
    calls = []
    monkeypatch.setattr(likelihood, "logits_of", lambda *a, **k: calls.append(a) or forward.logits_of(*a, **k))
    list(likelihoods(model, char_tokenizer(), [[Request("is it? ", "y"), Request("is it? ", "n")]]))
    assert len(calls) == 1


def test_models_whose_ranges_belong_to_a_call_read_each_request_alone(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    for method, options, alone in (
        ("rtn", {"bits": 8, "activation_bits": 8, "group_size": None}, True),
        ("llm-int8", {}, False),
    ):
        lowbit.quantize(tmp_path / "model", lowbit.recipe(method, **options), None, out=tmp_path / method, max_kl=9)
        assert forward.rows_are_alone(lowbit.load(tmp_path / method, torch.float32)) == alone
    assert not forward.rows_are_alone(lowbit.load(tmp_path / "model", torch.float32, kv="kv-int:4"))


def test_the_last_word_is_right_where_every_token_is_the_first_choice(model, tmp_path):
    (tmp_path / "lambada.txt").write_text("To be or not to be\n\nso it goes\n")
    (task,) = read_tasks(["lambada"], tmp_path)
    assert [item.requests for item in task.items] == [(("To be or not to", " be"),), (("so it", " goes"),)]
    accuracy, perplexity = score_task(model, char_tokenizer(), task).metrics
    ours = [each.nats for (each,) in likelihoods(model, char_tokenizer(), (item.requests for item in task.items))]
    assert perplexity.value == pytest.approx(math.exp(-sum(ours) / 2)) and set(accuracy.values) <= {0.0, 1.0}
    (tmp_path / "short.txt").write_text("word\n")
    with pytest.raises(ValueError, match="at least two words"):
        read_tasks(["short"], tmp_path)


def test_what_holds_no_tasks_is_named_and_a_mark_of_byte_order_is_no_text(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"{}\xff")
    with pytest.raises(ValueError, match=r"bytes.jsonl: not UTF-8 text \(byte 2\)"):
        read_tasks(["bytes"], tmp_path)
    with pytest.raises(ValueError, match=r"absent: no such directory; expected a directory that holds NAME\.jsonl"):
        read_tasks(["bytes"], tmp_path / "absent")
    with pytest.raises(ValueError, match=r"bytes.jsonl: a file; expected a directory"):
        read_tasks(["bytes"], tmp_path / "bytes.jsonl")
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "a", "choices": ["b", "c"], "gold": 1}')
    (task,) = read_tasks(["marked"], tmp_path)
    assert len(task.items) == 1


def test_a_passage_is_one_line_of_the_file_whatever_characters_it_holds(tmp_path):
    (tmp_path / "lambada.txt").write_text("To be or\u2028not to be\nso it\x85 goes\n", encoding="utf-8")
    (task,) = read_tasks(["lambada"], tmp_path)
    assert [item.requests for item in task.items] == [(("To be or\u2028not to", " be"),), (("so it\x85", " goes"),)]


def test_a_context_of_white_space_is_no_context(model):
    ((found, bare),) = likelihoods(model, char_tokenizer(adds_bos=True), [[Request(" ", "b"), Request("", " b")]])
    assert found == bare and found.tokens == 2


def test_scores_say_what_was_asked_and_limits_change_it(model, tmp_path):
    rows = [{"query": "q", "choices": ["a", "b"], "gold": i % 2} for i in range(4)]
    write(tmp_path, {"mine": rows})
    (whole,), (part,) = read_tasks(["mine"], tmp_path), read_tasks(["mine"], tmp_path, 2)
    assert len(part.items) == 2 and part.sha256 != whole.sha256 and "q a" in part.text
    assert score_task(model, char_tokenizer(), part).protocol == "lm-eval's multiple choice, no examples"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "gold is 2 for 2 choices"),
        ({"query": "q", "choices": ["a", "b"], "gold": "1"}, "gold is '1'"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "for 1 choices"),
        ({"query": "q", "choices": "ab", "gold": 0}, "choices are a list of texts"),
        ({"question": "q"}, "expected query, choices and gold"),
        ({"query": 3, "choices": ["a", "b"], "gold": 0}, "query is a text, found 3"),
        ({"context_options": ["a", "b"], "continuation": None, "gold": 0}, "continuation is a text, found None"),
        ({"context_options": ["a", "b"], "continuation": " ", "gold": 0}, "the continuation is empty"),
        (
            {"query": "q", "choices": ["a", "b"], "gold": 1, "text": "so it goes"},
            "text and choices are of different forms",
        ),
        ({"text": 3}, "text is a text, found 3"),
    ],
)
def test_rows_that_are_no_items_are_refused(tmp_path, row, words):
    with pytest.raises(ValueError, match=r"mine\.jsonl, item 1: .*" + words):
        read_tasks(["mine"], write(tmp_path, {"mine": [row]}))


def test_files_that_are_absent_damaged_or_mixed_are_refused(tmp_path):
    write(tmp_path, {"one": ITEMS["piqa"], "mixed": [*ITEMS["piqa"], {"text": "so it goes"}]})
    with pytest.raises(ValueError, match=r"no file two\.jsonl or two\.txt; it has mixed, one"):
        read_tasks(["two"], tmp_path)
    with pytest.raises(ValueError, match="make it two files"):
        read_tasks(["mixed"], tmp_path)
    (tmp_path / "one.txt").write_text("so it goes\n")
    with pytest.raises(ValueError, match=r"one\.jsonl and one\.txt: keep one"):
        read_tasks(["one"], tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="item 1: not JSON"):
        read_tasks(["bad"], tmp_path)
    with pytest.raises(ValueError, match="limit is 0"):
        read_tasks(["one"], tmp_path, 0)


def test_the_original_against_itself_changes_no_answer(model, tmp_path):
    write(tmp_path, ITEMS)
    scores = lowbit.evaluate_tasks(model, ["piqa", "boolq"], tmp_path, against=model, tokenizer=char_tokenizer())
    for metric in (metric for score in scores for metric in score.metrics):
        assert metric.against is not None and (metric.against.lost, metric.against.gained) == ((), ())
        assert (metric.against.difference, metric.against.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        lowbit.evaluate_tasks(model, ["piqa"], tmp_path)


def test_without_lm_eval_its_tasks_are_refused_with_what_to_do(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'lowbit\[harness\]', or give local files with --task-files"):
        lowbit.evaluate_tasks(model, ["piqa"], tokenizer=char_tokenizer())
