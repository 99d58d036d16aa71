"""``lowbit evaluate`` with tasks and with answers: what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app

from helpers import VOCABULARY, tiny_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model that chats, the same at three bits, a task and passages."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_llama(folder / "model")
    vocabulary = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(VOCABULARY - 1))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="w126")
    tokenizer.chat_template = "{% for message in messages %}w1 {{ message['content'] }} w2{% endfor %}"
    tokenizer.save_pretrained(model)
    lowbit.quantize(model, lowbit.recipe("rtn", bits=3, group_size=32), None, out=folder / "w3", max_kl=9)
    rows = [{"query": f"w{i} w3", "choices": [f"w{i}", f"w{i + 9} w4"], "gold": i % 2} for i in range(8)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "passages.txt").write_text("w1 w2 w3\nw4 w5\n")
    (folder / "prompts.txt").write_text("w5 w6\nw7\n")
    return folder


def evaluate(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in ("evaluate", *arguments)])


def test_tasks_beside_the_original_as_a_table_and_as_json(place):
    asked = (
        place / "w3",
        "--tasks",
        "mine,passages",
        "--task-files",
        place,
        "--against",
        place / "model",
        "--threads",
        1,
    )
    shown = evaluate(*asked)
    assert shown.exit_code == 0, shown.stderr
    for words in ("mine", "acc_norm", "perplexity", "lost", "McNemar", "lm-eval's multiple choice, no examples"):
        assert words in shown.stdout
    found = json.loads(evaluate(*asked, "--limit", 1, "--json").stdout)
    assert set(found) == {"tasks"} and found["tasks"]["mine"]["items"] == 1
    assert found["tasks"]["mine"]["metrics"]["acc"]["against"]["p_value"] is not None


def test_answers_side_by_side_as_text_and_as_json(place):
    asked = (
        place / "w3",
        "--chat",
        "--prompts",
        place / "prompts.txt",
        "--answer-tokens",
        6,
        "--against",
        place / "model",
    )
    shown = evaluate(*asked)
    assert shown.exit_code == 0, shown.stderr
    assert "> w5 w6" in shown.stdout and "top-1 agreement along them" in shown.stdout and "original: w" in shown.stdout
    found = json.loads(evaluate(*asked, "--json").stdout)["chat"]
    assert len(found["answers"]) == 2 and found["kl"] > 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--chat",), 2, "give --against MODEL"),
        (("--limit", 3), 2, "it goes with --tasks"),
        (("--judge", "http://localhost"), 2, "it goes with --chat"),
        (("--answer-tokens", 6), 2, "it goes with --chat"),
        (("--judge-model", "a"), 2, "it goes with --judge"),
        *(
            (
                (*asked, *given),
                2,
                f"{given[0]}: it goes with --text, because only perplexity is measured on windows of a text",
            )
            for asked in (("--tasks", "mine", "--task-files", "."), ("--chat", "--against", "."))
            for given in (("--protocol", "gptq"), ("--seq-len", 8), ("--windows", 0), ("--chunk", 4))
        ),
        (("--tasks", ","), 2, "expected names"),
        (("--tasks", "absent", "--task-files", "."), 1, "no file absent.jsonl"),
    ],
)
def test_what_would_be_ignored_is_refused(place, options, code, words):
    result = evaluate(place / "w3", *options)
    said = " ".join(result.stderr.replace("│", " ").split())  # errors of usage are in a box
    assert result.exit_code == code and result.stdout == "" and words in said


def test_windows_of_a_text_are_as_asked_and_as_the_help_says_else(place):
    text = place / "passages-long.txt"
    text.write_text(" ".join(f"w{i % 100}" for i in range(200)))
    asked = (place / "w3", "--text", text, "--tasks", "mine", "--task-files", place, "--json")
    found = json.loads(evaluate(*asked, "--protocol", "llama.cpp", "--seq-len", 16, "--windows", 0).stdout)
    assert (found["protocol"], found["seq_len"], found["windows"]) == ("llama.cpp", 16, 12) and "mine" in found["tasks"]
    usual = json.loads(evaluate(*asked, "--seq-len", 8).stdout)
    assert (usual["protocol"], usual["seq_len"], usual["windows"]) == ("gptq", 8, 20)
    words = " ".join(CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "300"}).stdout.split())
    for default in ("gptq (default)", "(default 1024)", "(default 20)", "(default 128)", "(default gpt-4)"):
        assert default in words


def test_a_model_that_gives_nan_in_tasks_is_measured_and_not_a_success_and_no_original(place, tmp_path):
    broken = shutil.copytree(place / "model", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    asked = ("--tasks", "mine,passages", "--task-files", place, "--threads", 1, "--json")
    measured = evaluate(broken, *asked, "--against", place / "model")
    assert measured.exit_code == 1
    assert "gave NaN in mine (8 of 8 items), passages (2 of 2 items), which count as wrong" in measured.stderr
    figures = json.loads(measured.stdout)["tasks"]["passages"]["metrics"]["perplexity"]
    assert figures["value"] is None and figures["against"]["original"] > 1
    refused = evaluate(place / "model", *asked, "--against", broken)
    assert refused.exit_code == 1 and "task mine: the original model gave NaN for 8 of 8 items" in refused.stderr
    assert not refused.stdout


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--tasks", "other", "--task-files", "{place}"), "has no file other.jsonl"),
        (("--chat", "--against", "{place}/model", "--prompts", "{place}/none.txt"), "no file of prompts"),
        (("--retrieval", "100000"), "ask for at most 256"),
        (("--retrieval", "20"), "does not hold 8 facts"),
    ],
    ids=["task", "prompts", "beyond the positions", "too short for the facts"],
)
def test_what_follows_the_text_is_refused_before_the_text_is_read(place, tmp_path, monkeypatch, asked, message):
    """A pass over a text may take hours, and an error behind it would lose its figures."""
    monkeypatch.setattr("lowbit.evaluation.perplexity.logits_of", lambda *_, **__: pytest.fail("the text was read"))
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 " * 40)
    windows = ("--text", text, "--seq-len", 32, "--windows", 2)
    refused = evaluate(place / "w3", *windows, *(word.format(place=place) for word in asked))
    assert refused.exit_code == 1 and message in refused.stderr, refused.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 20}, "2 windows of 32 tokens and 20 were asked"),
        ({"protocol": "other"}, "unknown perplexity protocol"),
    ],
    ids=["text", "protocol"],
)
def test_a_text_that_cannot_be_cut_is_refused_before_weights_are_read(place, tmp_path, options, message):
    bare = shutil.copytree(place / "model", tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 " * 20)
    with pytest.raises(ValueError, match=message):
        lowbit.evaluate(bare, text, **{"seq_len": 32, "windows": 2} | options)
