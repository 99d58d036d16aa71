"""Answers beside the original's, and a judge."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from lowbit.evaluation import Answer, check_judge, compare_chat, judge_answers, read_prompts
from lowbit.evaluation.chat import repetition

from evaluation_models import char_tokenizer, tiny_model

TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    made = char_tokenizer()
    made.chat_template = TEMPLATE
    return made


def test_a_model_answers_as_itself(model, tokenizer):
    score = compare_chat(model, model, tokenizer, ["hello", "why?"], 12)
    assert (score.kl, score.top1_agreement, score.same) == (0.0, 1.0, 2)
    assert all(answer.diverges_at is None and answer.original == answer.model for answer in score.answers)
    assert score.protocol == "greedy answers of up to 12 tokens, chat template"


def test_a_damaged_model_diverges_where_its_first_choice_along_the_originals_answer_differs(model, tokenizer):
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.lm_head.weight.add_(
            torch.randn(damaged.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
        )
    score = compare_chat(damaged, model, tokenizer, [f"prompt {i}" for i in range(6)], 16)
    assert score.kl > 0 and score.same < 6
    for answer in score.answers:
        ids = tokenizer(f"<{answer.prompt}>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
            )
            first = damaged(theirs).logits[0, ids.shape[1] - 1 : -1].argmax(-1) != theirs[0, ids.shape[1] :]
        assert answer.tokens == len(first)
        assert answer.top1_agreement == pytest.approx(1 - first.double().mean().item())
        assert answer.diverges_at == (int(first.nonzero()[0]) if first.any() else None)
    kl = sum(answer.kl * answer.tokens for answer in score.answers) / sum(answer.tokens for answer in score.answers)
    assert score.kl == pytest.approx(kl) and score.kl_interval is not None
    assert json.dumps(score.to_dict())


def test_repetition_is_the_share_of_passages_that_came_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0 == repetition([1, 2])
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)


def test_prompts_come_from_a_file_or_along(tmp_path, model):
    assert len(read_prompts()) == 12
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "p.txt") == ("one", "two")
    with pytest.raises(ValueError, match="no file of prompts"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"one\n\xff")
    with pytest.raises(ValueError, match=r"bytes.txt: not UTF-8 text \(byte 4\)"):
        read_prompts(tmp_path / "bytes.txt")
    with pytest.raises(ValueError, match="no chat template"):
        compare_chat(model, model, char_tokenizer(), ["a"], 4)


# The judge


@contextmanager
def server(reply) -> Iterator[tuple[str, list[dict]]]:
    """A local endpoint that answers with ``reply(request body)``, and the bodies that it got."""
    got: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
            said = reply(body)
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", got
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def answer(prompt: str, original: str, model: str) -> Answer:
    return Answer(prompt, original, model, 1, 0.0, 1.0, None, 0.0, 0.0)


def longer_is_better(body: dict) -> str:
    asked = body["messages"][1]["content"]
    first, second = (asked.split(f"Start of Assistant {i}'s Answer]\n")[1].split("\n[The End")[0] for i in (1, 2))
    return f"{min(10, len(first))} {min(10, len(second))}\nBecause of their length."


def test_both_orders_are_judged_and_each_is_a_trial(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    pairs = [answer("q1", "short", "much longer"), answer("q2", "same", "size"), answer("q3", "longer", "less")]
    with server(longer_is_better) as (address, got):
        found = judge_answers(pairs, address, "our-judge")
    assert (found.won, found.tied, found.lost, found.decided) == (2, 2, 2, (1, 1))
    assert found.scores[0] == ((10, 5), (10, 5)) and found.p_value == 1.0
    assert [body["path"] for body in got] == ["/v1/chat/completions"] * 6
    assert got[0]["key"] == "Bearer secret" and got[0]["model"] == "our-judge" and got[0]["temperature"] == 0


def test_a_judge_that_prefers_the_first_answer_decides_nothing():
    with server(lambda body: "9 3") as (address, _):
        found = judge_answers([answer("q", "a", "b")] * 4, address, "biased")
    assert (found.won, found.lost, found.decided) == (4, 4, (0, 0))


@pytest.mark.parametrize("said", ["Assistant 1 is better", "11 4", "0 3", "8"])
def test_a_judge_without_two_scores_is_refused(said):
    with server(lambda body: said) as (address, _), pytest.raises(ValueError, match="expected two scores of 1 to 10"):
        judge_answers([answer("q", "a", "b")], address, "vague")


def test_a_pair_on_which_the_judge_gave_no_scores_is_left_out_and_counted():
    pairs = [answer("q1", "short", "much longer"), answer("q2", "vague", "vague words"), answer("q3", "longer", "less")]

    def sometimes(body):
        return "Both are fine" if "vague words" in body["messages"][1]["content"] else longer_is_better(body)

    with server(sometimes) as (address, _):
        found = judge_answers(pairs, address, "our-judge")
    assert (found.won, found.lost, found.decided, found.unread, len(found.scores)) == (2, 2, (1, 1), 1, 2)


def test_a_judge_is_asked_for_a_word_before_the_work():
    with server(lambda body: "yes") as (address, got):
        check_judge(address, "our-judge")
    assert [body["max_tokens"] for body in got] == [8]
    with pytest.raises(ValueError, match="gave no answer"):
        check_judge("http://127.0.0.1:9/v1", "gone", timeout_s=2)


def test_an_endpoint_that_does_not_answer_is_refused():
    with pytest.raises(ValueError, match="gave no answer"):
        judge_answers([answer("q", "a", "b")], "http://127.0.0.1:9/v1", "gone", timeout_s=2)
    with pytest.raises(ValueError, match="expected http"):
        judge_answers([answer("q", "a", "b")], "file:///etc", "gone")
