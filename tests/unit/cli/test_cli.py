"""The command line from outside: what it prints where, what it makes, and how it refuses."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import lowbit
from lowbit import texts
from lowbit.cli import app, common
from lowbit.cli.choose import byte_count, override
from lowbit.cli.quantize import describe
from lowbit.cli.train import _announce as announce_training
from lowbit.retraining import prepare_training
from lowbit.stages.journal import Journal

COMMANDS = (
    "quantize",
    "train",
    "evaluate",
    "generate",
    "generate-data",
    "merge-adapter",
    "chat",
    "serve",
    "plan",
    "explain",
    "methods",
    "recipes",
    "imatrix",
    "inspect",
    "report",
    "recommend",
    "compare",
    "allocate",
    "cache",
)
WORDS = [f"w{i}" for i in range(60)]
SHORT = ("--samples", "4", "--seq-len", "16")
RTN = ("--method", "rtn", "--bits", "8", "--group-size", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model of two blocks, its tokenizer, and a text of its words."""
    root = tmp_path_factory.mktemp("cli")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(
        root / "model"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    words = random.Random(0).choices(WORDS, k=400)
    (root / "text.txt").write_text(" ".join(words))
    (root / "short.txt").write_text("w1 w2 w3")
    return root


def run(*arguments: object, stdin: str | None = None, **environment: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env=environment)


def quantize(place: Path, out: Path, *more: object, method: tuple[str, ...] = RTN):
    return run("quantize", place / "model", *method, "--calibration", place / "text.txt", *SHORT, "-o", out, *more)


@pytest.fixture(scope="module")
def quantized(place):
    """What `lowbit quantize` printed, and where it wrote."""
    out = place / "quantized"
    result = quantize(place, out)
    assert result.exit_code == 0, result.stderr
    return SimpleNamespace(out=out, stdout=result.stdout, stderr=result.stderr)


def assert_refused(result, *words: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)  # and nothing that would print a traceback
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_of_the_command(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: lowbit {command}" in result.stdout


@pytest.mark.parametrize(
    ("command", "least"),
    [
        *((("quantize", "m", "-o", "x"), 1), (("allocate", "m", "--bits", "4", "-o", "x"), 1), (("compare", "m"), 1)),
        *((("plan", "m"), 0), (("imatrix", "m", "-o", "x"), 1), (("inspect", "m", "-o", "x"), 1)),
        *(
            (("merge-adapter", "m", "-o", "x"), 1),
            (("generate-data", "m", "-o", "x"), 1),
            (("train", "m", "-o", "x"), 1),
        ),
    ],
)
def test_numbers_of_windows_and_tokens_that_cannot_be_are_errors_of_usage(command, least):
    for option, value in (("--samples", least - 1), ("--seq-len", 1)):
        result = run(*command, option, value)
        assert result.exit_code == 2 and f"'{option}'" in result.stderr and not result.stdout


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"│ {command} " in result.stdout for command in COMMANDS)


def test_documented_default_of_max_kl_is_the_pipelines():
    from lowbit.report import MAX_KL

    assert f"(default {MAX_KL:g})" in " ".join(run("quantize", "--help", COLUMNS="300").stdout.split())


# Quantize and what follows


def test_quantize_says_what_it_does_and_shows_what_came_out(quantized, place):
    assert (quantized.out / "config.json").is_file()
    for words in (
        "rtn",
        "weights int8 asymmetric, groups of 32",
        "text.txt, 4 x 16 tokens",
        str(quantized.out),
        "model (",
    ):
        assert words in quantized.stderr
    for words in (
        "bits per weight",
        "KL from the original",
        "top-1 agreement",
        "100.0%",
        "output error of model.layers.",
    ):
        assert words in quantized.stdout
    *_, last = quantized.stdout.splitlines()
    assert re.fullmatch(
        r"\d+\.\d kB to \d+\.\d kB in \d+ s \([\d.]+ bits per weight in the quantized linears, [\d.]+ in the whole "
        rf'model\)\. Next: lowbit generate {quantized.out} --prompt "Once upon a time"',
        last,
    )
    card = (quantized.out / "README.md").read_text()
    whole = next(line for line in card.splitlines() if line.startswith("| bits per weight of the whole model"))
    assert 8.5 < float(whole.split(" | ")[1].strip(" |")) < 32


def test_the_card_keeps_the_sources_licence_and_its_code_runs(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\nbase_model: some/where\n---\n# A model\n")
    lowbit.quantize(tmp_path / "model", lowbit.recipe("rtn", group_size=32), None, out=tmp_path / "out")
    _, front, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(front)
    assert (told["license"], told["base_model"], told["pipeline_tag"]) == ("mit", "some/where", "text-generation")
    monkeypatch.chdir(tmp_path / "out")
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip()
    model = LlamaForCausalLM.from_pretrained(place / "model").bfloat16()
    model.save_pretrained(tmp_path / "half")
    report = lowbit.quantize(tmp_path / "half", lowbit.recipe("rtn", bits=8, group_size=2), None, out=tmp_path / "big")
    assert report.bytes > report.source_bytes and "more than the original's" in report.warnings[-1]


def test_quantize_json_is_the_report_alone(place, tmp_path):
    result = quantize(
        place, tmp_path / "out", "--json", "--override", "down:bits=4,group_size=64", "--override", "re:q_proj:skip"
    )
    report = json.loads(result.stdout)
    assert report["out"] == str(tmp_path / "out")
    assert {layer["role"] for layer in report["layers"]} == {"k", "v", "o", "gate", "up", "down"}
    bits = {layer["role"]: layer["bits_per_weight"] for layer in report["layers"]}
    assert bits["down"] < 5 < 8 < bits["up"]
    assert 0 <= report["kl"] < 0.1


def test_evaluate_json_has_the_promised_keys(quantized, place):
    result = run(
        *(
            "evaluate",
            quantized.out,
            "--text",
            place / "text.txt",
            "--protocol",
            "gptq",
            "--seq-len",
            16,
            "--windows",
            5,
        ),
        *("--against", place / "model", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert {"perplexity", "kl", "top1_agreement", "bits_per_weight", "bytes"} <= values.keys()
    assert values["bytes"] == sum(file.stat().st_size for file in quantized.out.glob("*.safetensors"))
    assert 8 < values["bits_per_weight"] < 9 < values["model_bits_per_weight"]
    report = json.loads((quantized.out / "lowbit-report.json").read_text())
    assert values["model_bits_per_weight"] == report["model_bits_per_weight"]
    assert report["source_bytes"] > report["bytes"] == values["bytes"]
    assert 0 <= values["kl"] < 0.1
    assert values["windows"] == 5
    assert values["text"] == "text.txt"


def test_evaluate_of_an_ordinary_model_shows_a_table(place):
    result = run("evaluate", place / "model", "--text", place / "text.txt", "--seq-len", 16, "--windows", 0)
    assert result.exit_code == 0, result.stderr
    assert "perplexity" in result.stdout
    assert "text.txt: 25 windows of 16 by protocol gptq" in result.stdout
    assert "KL" not in result.stdout


def test_a_model_that_gives_nan_is_measured_and_not_a_success(place, tmp_path):
    model = LlamaForCausalLM.from_pretrained(place / "model")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.save_pretrained(tmp_path)
    result = run("evaluate", tmp_path, "--text", place / "text.txt", "--seq-len", 16, "--windows", 2, "--json")
    assert result.exit_code == 1
    values = json.loads(result.stdout)
    assert (values["perplexity"], values["broken"]) == (None, True)
    assert "error: the model is broken: 30 of 30" in result.stderr


@pytest.mark.parametrize(("answers", "expected"), [(True, "wikitext2"), (False, "python-docs")])
def test_text_that_is_not_given_is_wikitext2_where_a_hub_answers(monkeypatch, answers, expected):
    def load_text(spec, split):
        if not answers:
            raise texts.TextError("no hub")

    monkeypatch.setattr(texts, "load_text", load_text)
    assert common.text_or_default(None, "evaluation") == expected
    assert common.text_or_default("mine.txt", "evaluation") == "mine.txt"


def test_generate_streams_the_text_that_json_gives(quantized):
    streamed = run("generate", quantized.out, "--prompt", "w1 w2", "--max-new-tokens", 5)
    whole = run("generate", quantized.out, "--prompt", "w1 w2", "--max-new-tokens", 5, "--json")
    assert streamed.exit_code == whole.exit_code == 0, streamed.stderr + whole.stderr
    assert json.loads(whole.stdout)["text"].split() == streamed.stdout.split() != []


@pytest.mark.parametrize("asked", [("generate", "--prompt", "w1"), ("chat",)])
def test_what_cannot_be_sampled_by_is_refused_before_a_model_is_looked_for(asked):
    command, *prompt = asked
    assert_refused(run(command, "no/such/model", *prompt, "--top-p", 0), "top_p is 0", "more than 0 and at most 1")


def test_generate_reads_its_prompt_from_stdin(quantized):
    given = run("generate", quantized.out, "--prompt", "w1 w2", "--json")
    assert json.loads(run("generate", quantized.out, "--prompt", "-", "--json", stdin="w1 w2\n").stdout) == json.loads(
        given.stdout
    )


# Caches

KIVI = ("--kv", "kivi:2", "--kv-set", "recent=32")


def test_a_cache_alone_or_beside_a_method_is_written_and_used(place, tmp_path):
    alone = run("quantize", place / "model", *KIVI, "--calibration", "none", "-o", tmp_path / "alone", "--allow-broken")
    assert alone.exit_code == 0, alone.stderr
    assert "recipe:      kivi: cache: keys int2 asymmetric" in alone.stderr
    assert "bits per number in the cache" in alone.stdout and "bits per weight, quantized" not in alone.stdout
    assert "weights as they were, 3.5 bits per number in the cache" in alone.stdout
    beside = quantize(place, tmp_path / "beside", "--kv", "kivi", "--kv-bits", 2, "--kv-set", "recent=32", "--json")
    assert beside.exit_code == 0, beside.stderr
    report = json.loads(beside.stdout)
    assert report["cache_bits"] == 3.5 and report["bits_per_weight"] > 8
    mixed = quantize(
        place, tmp_path / "mixed", "--kv-bits", 2, "--json", method=("--method", "rtn+kivi", "--bits", "8")
    )
    assert json.loads(mixed.stdout)["recipe"]["scheme"]["kv"]["key"]["grid"]["bits"] == 2
    for out in ("alone", "beside"):
        shown = run("generate", tmp_path / out, "--prompt", "w1 w2", "--max-new-tokens", 5)
        assert shown.exit_code == 0 and "cache: keys int2" in shown.stderr
        off = run("generate", tmp_path / out, "--prompt", "w1 w2", "--max-new-tokens", 5, "--kv", "none")
        assert off.exit_code == 0 and "cache: " not in off.stderr


def test_an_ordinary_model_runs_and_is_measured_with_a_cache(place, chatty, tmp_path):
    shown = run("generate", place / "model", "--prompt", "w1 w2", *KIVI, "--max-new-tokens", 5)
    assert shown.exit_code == 0 and "cache: keys int2 asymmetric with real zero points" in shown.stderr
    talk = run("chat", chatty, *KIVI, "--max-new-tokens", 4, stdin="w1 w2\n")
    assert talk.exit_code == 0 and "cache: keys int2" in talk.stderr
    assert_refused(
        run("evaluate", place / "model", "--text", place / "text.txt", "--seq-len", 48, "--windows", 2, "--generation"),
        "positions",
    )
    longer = shutil.copytree(place / "model", tmp_path / "longer")
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    measure = ("evaluate", longer, "--text", place / "text.txt", "--seq-len", 48, "--windows", 2)
    against = ("--against", longer)
    found = json.loads(run(*measure, *against, "--kv", "kv-int:2", "--generation", "--json").stdout)
    assert found["cache_bits"] == 3 and found["kl"] > 0 and "through the cache, token by token" in found["protocol"]
    assert [check["name"] for check in found["checks"]] == ["copying", "counting", "arithmetic"]
    table = run(*measure, "--kv", "kv-int:2", "--generation").stdout
    assert all(words in table for words in ("bits per number in the cache", "right, plain cache", "arithmetic"))
    assert "through the cache" not in run(*measure).stdout
    for windows, told in (("recent=8", True), ("recent=64", False)):
        for form in ((), ("--json",)):
            said = run(*measure, "--kv", "kivi:2", "--kv-set", windows, "--kv-set", "group_size=8", *form)
            assert said.exit_code == 0, said.stderr
            assert ("tell nothing of the quantized cache" in said.stderr) is not told


def test_a_method_that_says_nothing_of_caches_is_no_cache(place, tmp_path):
    assert_refused(run("generate", place / "model", "--prompt", "w1", "--kv", "rtn"), "'rtn' is no method for caches")
    assert_refused(run("generate", place / "model", "--prompt", "w1", "--kv", "kivy"), "kivi")


def test_a_cache_that_needs_calibration_is_calibrated_by_quantize_and_refused_elsewhere(place, tmp_path):
    oscar = ("--kv", "kv-oscar:2", "--kv-set", "recent=8", "--kv-set", "sink=2")
    refused = run("generate", place / "model", "--prompt", "w1", *oscar)
    assert_refused(refused, "only calibration finds", "lowbit quantize MODEL --kv NAME --calibration TEXT")
    out = ("-o", tmp_path / "none")
    assert_refused(run("quantize", place / "model", *oscar, "--calibration", "none", *out), "needs calibration text")
    text = ("--calibration", place / "text.txt", "--samples", 2, "--seq-len", 24, "--allow-broken")
    for name, method in (("alone", ()), ("beside", RTN)):
        made = run("quantize", place / "model", *method, *oscar, *text, "-o", tmp_path / name)
        assert made.exit_code == 0, made.stderr
        assert "rotated (learned)" in made.stderr
        for bits in (2, 3):
            asked = ("--kv", f"kv-oscar:{bits}", *oscar[2:])
            shown = run("generate", tmp_path / name, "--prompt", "w1 w2", "--max-new-tokens", 20, *asked)
            assert shown.exit_code == 0 and f"cache: keys int{bits}" in shown.stderr


def test_plan_counts_the_cache_of_a_sequence(place):
    asked = ("plan", place / "model", *RTN, "--context", 64)
    plain, packed = (json.loads(run(*asked, *more, "--json").stdout)["cache"] for more in ((), KIVI))
    assert plain["tokens"] == 64 and plain["bytes"] == plain["bytes_floating"] == packed["bytes_floating"]
    heads, dim, layers = 2, 16, 2
    numbers = 2 * heads * dim * layers
    assert plain["bytes"] == 64 * numbers * 4 and packed["bytes"] == 32 * numbers * 4 + 32 * numbers * 3.5 / 8
    assert "cache of a sequence of 64 tokens" in run(*asked, *KIVI).stdout
    alone = run("plan", place / "model", *KIVI)
    assert alone.exit_code == 0 and "0 of 16" in " ".join(alone.stdout.split())


# Chat

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w0{% endif %}"


def test_generate_data_writes_texts_reports_on_them_and_names_the_next_command(place, tmp_path):
    out = tmp_path / "written"
    result = run("generate-data", place / "model", "--tokens", 90, "--seq-len", 20, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "strategy: hybrid, temperature 1, top_k 0, top_p 1, seed 0" in result.stderr
    assert "bad data: the mean probability of the tokens is below 0.05" in result.stderr
    assert "4-grams repeated in their text" in result.stdout
    assert f"--calibration {out} -o DIR" in result.stdout.splitlines()[-1]
    assert (
        int(result.stdout.splitlines()[-1].partition(" tokens, ")[0]) >= 90
    )  # first tokens too, which no model writes
    made = quantize(place, tmp_path / "packed", "--calibration", out, method=("--method", "gptq", "--bits", "8"))
    assert made.exit_code == 0 and "generated texts" in made.stderr and "bad data" in made.stderr
    as_json = run("generate-data", place / "model", "--samples", 2, "--seq-len", 20, "-o", tmp_path / "j", "--json")
    assert json.loads(as_json.stdout)["tokens"] >= 40
    assert_refused(run("generate-data", place / "model", "-o", out), "exists and is not empty")


def test_text_that_the_model_writes_for_a_run_has_the_report_of_kept_text(place, tmp_path):
    out = tmp_path / "packed"
    made = quantize(place, out, "--calibration", "self:greedy", method=("--method", "gptq", "--bits", "8"))
    assert made.exit_code == 0, made.stderr
    before, after = made.stderr.split("target:")
    for words in ("self:greedy is bad data: the mean probability", "below 0.05"):
        assert words in before and words in after
    tokens = (4 + 1) * 16 + 1  # calibration and held-out windows
    asked = ("--tokens", tokens, "--seq-len", 16, "--strategy", "greedy")
    assert run("generate-data", place / "model", *asked, "-o", tmp_path / "kept").exit_code == 0
    figures = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert json.loads((out / "lowbit-report.json").read_text())["generated_text"] == figures
    assert figures["summary"] in before and figures["summary"] in (out / "README.md").read_text()
    assert run("report", out, "-o", tmp_path / "page.html").exit_code == 0
    assert figures["summary"] in (tmp_path / "page.html").read_text()


def test_every_command_that_calibrates_on_bad_data_says_so(place, tmp_path):
    method = ("--method", "rtn", "--group-size", "channel")
    for command in (
        ("inspect", place / "model", "-o", tmp_path / "inspection"),
        ("imatrix", place / "model", "-o", tmp_path / "x.gguf"),
        ("allocate", place / "model", *method, "--target-bits", "5", "-o", tmp_path / "mixed.yaml"),
    ):
        result = run(*command, "--calibration", "self", *SHORT)
        assert result.exit_code == 0, result.stderr
        assert "warning: self is bad data: the mean probability of the tokens is below 0.05" in result.stderr, command


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for what peft calls
def test_merge_adapter_writes_a_checkpoint_and_says_what_was_lost(quantized, place, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(lowbit.load(quantized.out), peft.LoraConfig(target_modules=["up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["--text", place / "text.txt", "--samples", 3, "--seq-len", 16]
    result = run("merge-adapter", quantized.out, tmp_path / "adapter", *arguments, "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert "2 packed layers merged" in result.stdout and "top-1 agreement" in result.stdout
    assert run("generate", tmp_path / "merged", "--prompt", "w1 w2").exit_code == 0
    assert_refused(
        run("merge-adapter", place / "model", tmp_path / "adapter", "-o", tmp_path / "m"), "not packed by lowbit"
    )


def test_train_trains_a_checkpoint_or_a_model(quantized, place, tmp_path):
    arguments = ["--text", place / "text.txt", "--samples", 4, "--seq-len", 16, "--tokens", 64, "--lr", "1e-3"]
    distil = ["--set", "objective=original", "--set", "measures=1"]
    result = run(
        "train", "efficientqat", quantized.out, *arguments, *distil, "--against", place / "model", "-o", tmp_path / "a"
    )
    assert result.exit_code == 0, result.stderr
    assert "KL from the original" in result.stdout and "trains StoredFloats" in result.stderr
    assert (tmp_path / "a" / "training-1.svg").is_file()
    assert run("generate", tmp_path / "a", "--prompt", "w1 w2").exit_code == 0
    assert_refused(
        run("train", "efficientqat", quantized.out, *arguments, "-o", tmp_path / "b"),
        "compares with the original",
        "--against",
    )
    whole = run(
        "train",
        "paretoq",
        place / "model",
        *arguments,
        "--set",
        "bits=4",
        "--allow-broken",
        "--json",
        "-o",
        tmp_path / "c",
    )
    assert whole.exit_code == 0, whole.stderr
    assert json.loads(whole.stdout)["recipe"]["stages"][1]["tokens"] == 64
    assert_refused(run("train", "rtn", place / "model", "--tokens", 8, "-o", tmp_path / "d"), "no stage trains")
    assert run("train", "w3-owq-tuned", place / "model", "--set", "bits=2", "-o", tmp_path / "e").exit_code == 2
    original = run("train", "efficientqat", place / "model", "--against", place / "model", "-o", tmp_path / "e")
    assert_refused(original, "own original", "lowbit import")


def test_too_little_text_is_said_before_the_training(quantized, place, tmp_path, capsys):
    recipe, text = lowbit.recipe("efficientqat", tokens=64000), str(place / "text.txt")
    asked = {"out": tmp_path / "a", "against": place / "model", "samples": 4, "seq_len": 16}
    announce_training(prepare_training(quantized.out, recipe, text, **asked))
    assert "training asks for 4000 windows of 16 tokens; behind" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chatty(quantized):
    """The quantized model, its tokenizer with a chat template."""
    out = quantized.out.with_name("chatty")
    shutil.copytree(quantized.out, out)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def seen_by_the_model(monkeypatch, answers=("w7 w8",)) -> list[Any]:
    """Replaces generation; returns the list of the conversations that it is asked to continue."""
    seen: list[Any] = []

    def generate_text(model, tokenizer, prompt, max_new_tokens, *, on_text, **options):
        seen.append(prompt)
        answer = answers[min(len(seen), len(answers)) - 1]
        if isinstance(answer, BaseException):
            on_text("w9 ")
            raise answer
        on_text(answer)
        return answer

    monkeypatch.setattr("lowbit.evaluation.generate_text", generate_text)
    return seen


def test_chat_answers_each_line_of_a_pipe_and_remembers(chatty, monkeypatch):
    result = run("chat", chatty, "--max-new-tokens", 4, stdin="w1 w2\n\nw3\n")
    assert result.exit_code == 0, result.stderr
    first, second = result.stdout.splitlines()
    said = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": first.strip()}]
    whole = run("generate", chatty, "--chat", "--prompt", "w1 w2", "--max-new-tokens", 4)
    assert whole.stdout.splitlines() == [first] and first.strip()
    seen = seen_by_the_model(monkeypatch, (first.strip(), second.strip()))
    run("chat", chatty, "--system", "w5", stdin="w1 w2\nw3\n/reset\nw4\n/what\n/exit\nw6\n")
    system = {"role": "system", "content": "w5"}
    asked = {"role": "user", "content": "w3"}
    assert seen == [[system, said[0]], [system, *said, asked], [system, {"role": "user", "content": "w4"}]]


def test_ctrl_c_at_a_terminal_stops_the_answer_and_the_chat_goes_on(chatty, monkeypatch):
    from lowbit.cli import chat

    seen = seen_by_the_model(monkeypatch, (KeyboardInterrupt(), ValueError("too long"), "w8"))
    typed = iter(["w1", KeyboardInterrupt(), "w2", "w3", EOFError()])

    def typing(prompt):
        text = next(typed)
        if isinstance(text, BaseException):
            raise text
        return text

    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr(chat, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    result = run("chat", chatty)
    assert result.exit_code == 0, result.stderr
    assert [part["content"] for part in seen[-1]] == ["w1", "w9 ", "w3"]
    assert "error: too long. Start again with /reset" in result.stderr and "/exit" in result.stderr


def test_chat_without_a_template_is_refused_before_the_model_is_loaded(quantized, monkeypatch):
    monkeypatch.setattr(lowbit, "load", None)
    assert_refused(run("chat", quantized.out, stdin="w1\n"), "no chat template", "lowbit generate")


def test_a_recipe_file_and_options_give_the_same_recipe(place, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"method": "rtn", "options": {"bits": 8, "group_size": 32}}))
    by_file = run("plan", place / "model", "--recipe", file, "--json")
    by_name = run("plan", place / "model", "--method", "rtn", "--set", "bits=8", "--set", "group_size=32", "--json")
    assert by_file.exit_code == 0, by_file.stderr
    assert json.loads(by_file.stdout)["recipe"] == json.loads(by_name.stdout)["recipe"]


@pytest.mark.parametrize("spelling", ["channel", "none", "-1"])
def test_group_size_channel_is_one_scale_for_each_row(place, spelling):
    result = run("plan", place / "model", "--method", "rtn", "--group-size", spelling, "--json")
    assert json.loads(result.stdout)["recipe"]["scheme"]["rules"][0]["weight"]["granularity"] == {"type": "PerChannel"}


def test_groups_of_no_weights_are_refused_with_how_one_scale_for_each_row_is_asked_for(place):
    for given in (("--group-size", 0), ("--set", "group_size=0"), ("--override", "down:group_size=0")):
        refused = run("plan", place / "model", "--method", "rtn", *given)
        assert_refused(refused, "group size must be at least 1, found 0", "--group-size channel")


def test_groups_that_do_not_divide_a_row_are_said_before_the_work_and_in_the_report(place, tmp_path):
    words = "group size 24 does not divide the 64 inputs of q, k, v, o, gate, up (12 layers): the last group of each row holds 16"
    result = quantize(place, tmp_path / "out", method=(*RTN[:-1], "24"))
    assert result.exit_code == 0, result.stderr
    before, after = result.stderr.split("target:")
    assert words in before and words in after
    assert words in (tmp_path / "out" / "README.md").read_text()
    silent = quantize(place, tmp_path / "even", method=(*RTN[:-1], "32"))
    assert "does not divide" not in silent.stderr


def test_names_of_other_tools_work_and_a_scheme_is_bits_and_activation_bits(place):
    def recipe(*words):
        result = run("plan", place / "model", *words, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["recipe"]

    eight = recipe("--method", "rtn", "--bits", 8, "--activation-bits", 8)
    assert recipe("--method", "rtn", "--scheme", "W8A8") == eight
    owq = recipe("--method", "owq", "--wbits=4", "--nsamples", 4, "--seqlen", 16)  # knows no activation bits
    assert recipe("--method", "owq", "--scheme", "w4a16", "--samples", 4, "--seq-len", 16) == owq
    assert_refused(run("plan", place / "model", "--method", "llm-int8", "--scheme", "W8A16"), "always quantizes inputs")
    assert "--nsamples" not in run("plan", "--help").stdout


def test_quiet_leaves_results_and_verbose_shows_tracebacks(quantized, place):
    asked = ("generate", quantized.out, "--prompt", "w1", "--max-new-tokens", 2)
    for words in (("-q", *asked), (*asked, "-q")):
        result = run(*words)
        assert (result.exit_code, result.stderr) == (0, "") and result.stdout.strip()
    assert "loading" in run(*asked).stderr
    assert isinstance(run("plan", "absent", *RTN, "-v").exception, ValueError)
    assert_refused(run("plan", "absent", *RTN, "-q"), "absent")


def test_a_group_size_that_is_not_given_is_the_methods_own(place):
    result = run("plan", place / "model", "--method", "gptq", "--json")
    assert json.loads(result.stdout)["recipe"]["scheme"]["rules"][0]["weight"]["granularity"] == {
        "type": "PerGroup",
        "size": 128,
    }


def test_plan_says_what_a_run_then_does(quantized, place):
    result = run("plan", place / "model", *RTN, "--samples", 4, "--seq-len", 16, "--json")
    assert result.exit_code == 0, result.stderr
    foretold = json.loads(result.stdout)
    measured = run("evaluate", quantized.out, "--text", place / "text.txt", "--seq-len", 16, "--windows", 1, "--json")
    for name in ("bits_per_weight", "model_bits_per_weight"):
        assert foretold[name] == pytest.approx(json.loads(measured.stdout)[name], rel=1e-6), name
    shown = run("plan", place / "model", *RTN).stdout
    for words in (
        "14 of 16",
        "model.layers.*.mlp.down_proj",
        "int8 asymmetric, groups of 32",
        "head: not in a block",
        "runs in",
    ):
        assert words in " ".join(shown.split())


def test_explain_takes_a_mix_with_options_or_a_file(place, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: smoothquant+gptq\noptions: {bits: 4, group_size: 32}\n")
    by_name = run("explain", "smoothquant+gptq", place / "model", "--bits", 4, "--group-size", 32, "--json")
    by_file = run("explain", file, place / "model", "--json")
    assert by_name.exit_code == 0, by_name.stderr
    assert json.loads(by_name.stdout) == json.loads(by_file.stdout)
    assert len(json.loads(by_name.stdout)["steps"]) == 2
    cached = run("explain", file, place / "model", "--kv", "kivi:2", "--json")
    assert "keys int2" in "".join(json.loads(cached.stdout)["notes"]), cached.stderr
    shown = run("explain", file, place / "model").stdout
    assert shown.startswith("1. Set")
    assert "\n2. Solve" in shown


def test_inspect_writes_its_files_and_shows_the_hardest_layers(place, tmp_path):
    result = run("inspect", place / "model", "--calibration", place / "text.txt", *SHORT, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "model.layers.0.mlp.down_proj" in result.stdout
    files = sorted((tmp_path / "out").iterdir())
    assert files
    assert all(str(file) in result.stdout for file in files)


def test_inspect_and_report_of_a_checkpoint_show_no_table_of_errors_that_it_does_not_have(quantized, place, tmp_path):
    out = tmp_path / "out"
    shown = run("inspect", quantized.out, "--calibration", place / "text.txt", *SHORT, "-o", out)
    assert shown.exit_code == 0, shown.stderr
    assert "widest inputs" in shown.stdout and "hardest" not in shown.stdout and "4 bits" not in shown.stdout
    tables = run("report", out, "--markdown").stdout
    assert "median channel" in tables and "weights from" in tables and "error at 4 bits" not in tables


def test_report_of_a_model_that_lowbit_did_not_write_says_what_it_reads(place):
    for form in (("--markdown",), ("-o", place / "report.html")):
        refused = run("report", place / "model", *form)
        assert_refused(refused, "found a model without lowbit-report.json", "expected results of", "lowbit inspect")
    assert not (place / "report.html").exists()


def test_ctrl_c_while_the_program_starts_is_a_line(monkeypatch, capsys):
    from lowbit import __main__, cli

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(__main__.gc, "freeze", lambda: None)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(monkeypatch, given, spins):
    from lowbit import __main__, cli

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, given.get(name, ""))
        if name not in given:
            monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "app", lambda **_: None)
    monkeypatch.setattr(__main__.gc, "freeze", lambda: None)
    __main__.main()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_ctrl_c_says_how_to_continue_and_the_same_command_does(place, tmp_path, monkeypatch):
    from lowbit.stages.blockwise import Walk

    done = Walk._quantize

    def interrupted(self, i, call):
        if i == 1:
            raise KeyboardInterrupt
        return done(self, i, call)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_quantize", interrupted)
        stopped = quantize(place, tmp_path / "out")
    assert stopped.exit_code == 130
    assert "repeat the same command to continue" in stopped.stderr
    assert not (tmp_path / "out").exists()
    another = quantize(place, tmp_path / "out", method=(*RTN[:2], "--bits", "3"))
    assert_refused(another, "holds an unfinished run of something else")
    with FileLock(tmp_path / "out.partial.lock"):
        beside = quantize(place, tmp_path / "out")
    assert_refused(beside, "is being written by another run")
    assert "continuing" not in another.stderr + beside.stderr
    again = quantize(place, tmp_path / "out")
    assert again.exit_code == 0, again.stderr
    assert "continuing the unfinished run" in again.stderr
    assert "finished blocks: 1 of 2" in again.stderr and "since it was continued" in again.stdout


def test_a_run_of_generate_data_says_that_it_continues_or_discards_only_where_it_does(place, tmp_path, monkeypatch):
    asked = ("generate-data", place / "model", "--tokens", 60, "--seq-len", 20, "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*asked).exit_code == 130
        refused = run(*asked, "--seed", 1)
        assert_refused(refused, "holds an unfinished run of something else")
        assert "unfinished run in" not in refused.stderr
        continued = run(*asked)
        assert f"continuing the unfinished run in {tmp_path / 'out.partial'}" in continued.stderr
    discarded = run(*asked, "--restart")
    assert discarded.exit_code == 0, discarded.stderr
    assert "discarding the unfinished run" in discarded.stderr


# Refusals


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (("--method", "gptk"), ("gptk", "did you mean 'gptq'")),
        (("--method", "rtn", "--set", "symetric=true"), ("symetric", "did you mean 'symmetric'")),
        (("--method", "rtn", "--group-size", "-3"), ("-3",)),
        (("--method", "smoothquant", "--set", "level=O1", "--group-size", "32"), ("group_size", "O1-pc")),
        (("--method", "rtn", "--bits", "99"), ("99",)),
        ((*RTN, "--override", "dwn:bits=3"), ("dwn", "did you mean 'down'")),
        ((*RTN, "--override", "down:bit=3"), ("bit", "did you mean 'bits'")),
        (("--recipe", "absent.yaml"), ("absent.yaml", "lowbit recipes")),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_in_a_line(place, tmp_path, method, words):
    assert_refused(quantize(place, tmp_path / "out", method=method), *words)
    assert not list(tmp_path.iterdir())


def test_a_missing_model_is_refused(place, tmp_path):
    result = run("quantize", place / "absent", *RTN, "--calibration", place / "text.txt", "-o", tmp_path / "out")
    assert_refused(result, "absent", "no such directory")
    assert_refused(run("evaluate", place / "absent", "--text", place / "text.txt"), "absent")
    assert_refused(run("generate", place / "absent", "--prompt", "w1"), "absent")


def test_an_existing_target_is_refused_and_kept(quantized, place):
    before = (quantized.out / "config.json").read_bytes()
    assert_refused(quantize(place, quantized.out), "not empty", "-o DIR")
    assert (quantized.out / "config.json").read_bytes() == before


def test_a_text_that_is_too_short_is_refused(quantized, place, tmp_path):
    words = ("quantize", place / "model", *RTN, "--calibration", place / "short.txt", *SHORT, "-o", tmp_path / "out")
    assert_refused(run(*words), "short.txt", "too short")
    assert_refused(run("evaluate", quantized.out, "--text", place / "short.txt", "--seq-len", 16), "longer text")
    assert_refused(run("evaluate", quantized.out, "--text", place / "absent.txt"), "absent.txt", "no such file")


def test_a_quantized_model_is_not_quantized_again(quantized, place, tmp_path):
    result = run("quantize", quantized.out, *RTN, "--calibration", place / "text.txt", *SHORT, "-o", tmp_path / "out")
    assert_refused(result, "already quantized")


def test_a_broken_result_is_refused_unless_allowed(place, tmp_path):
    limit = ("--max-kl", "1e-9")
    assert_refused(quantize(place, tmp_path / "out", *limit), "broken", "KL", "--allow-broken")
    assert not (tmp_path / "out").exists()
    allowed = quantize(place, tmp_path / "out", *limit, "--allow-broken")
    assert allowed.exit_code == 0, allowed.stderr
    assert "warning: the mean KL divergence" in allowed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "MODEL", "-o", "OUT"),
        ("quantize", "MODEL", "--method", "rtn", "--recipe", "x.yaml", "-o", "OUT"),
        ("quantize", "MODEL", "--recipe", "x.yaml", "--bits", "4", "-o", "OUT"),
        ("quantize", "MODEL", "--method", "rtn", "--set", "bits", "-o", "OUT"),
        ("quantize", "MODEL", "--method", "rtn", "--bits", "4", "--set", "bits=3", "-o", "OUT"),
        ("quantize", "MODEL", "--method", "rtn", "--override", "down", "-o", "OUT"),
        ("quantize", "MODEL", "--method", "rtn", "--ram-limit", "much", "-o", "OUT"),
        ("quantize", "MODEL", "--method", "rtn", "--ram-limit", "8", "-o", "OUT"),
        ("quantize", "MODEL", "--method", "rtn", "--group-size", "chanel", "-o", "OUT"),
        ("recommend", "MODEL", "--memory", "4"),
        ("quantize", "MODEL", "--method", "rtn"),
        ("plan", "MODEL", "--method", "rtn", "--scheme", "W4A16", "--bits", "4"),
        ("plan", "MODEL", "--method", "rtn", "--scheme", "4x16"),
        ("plan", "MODEL", "--method", "rtn", "-q", "-v"),
        ("quantize", "MODEL", "--method", "rtn", "--kv", "kivi", "--kv-set", "recent", "-o", "OUT"),
        ("quantize", "MODEL", "--kv", "kivi", "--bits", "4", "-o", "OUT"),
        ("generate", "MODEL", "--prompt", "w1", "--kv-bits", "4"),
        ("evaluate", "MODEL", "--retrieval", "many"),
        ("compare", "MODEL", "--kv", "kivi", "--kv-bits", "4,x", "-o", "OUT.jsonl"),
        ("quantise",),
        ("allocate", "MODEL", "--method", "rtn", "--target-bits", "nan", "-o", "OUT.yaml"),
        ("quantize", "MODEL", "--method", "rtn", "--max-kl", "nan", "-o", "OUT"),
        ("quantize", "MODEL", "--method", "rtn", "--max-kl", "-1", "-o", "OUT"),
        ("train", "efficientqat", "MODEL", "--lr", "nan", "-o", "OUT"),
    ],
)
def test_a_command_that_is_not_well_formed_exits_with_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--bits", "3"), "--bits 3"),
        (("--group-size", "32"), "--group-size 32"),
        (("--group-size", "channel"), "--group-size channel"),
        (("--scheme", "W3A16"), "leave out --scheme W3A16, or"),
        (("--override", "down:bits=8"), "down:bits=8"),
        (("--set", "bits=3"), "--set bits=3"),
        (("--set", "symmetric=true"), "--set symmetric=true"),
    ],
)
def test_numbers_that_a_preset_of_a_file_format_would_replace_are_refused(place, given, words):
    for command in (("plan", place / "model", "--method", "rtn"), ("explain", "rtn", place / "model")):
        result = run(*command, *given, "--format", "gguf:q8_0", COLUMNS="400")
        assert result.exit_code == 2 and result.stdout == ""
        assert "gguf:q8_0 gives every matrix its bits and groups" in result.stderr and words in result.stderr
        assert run(*command, *given, "--format", "gguf", COLUMNS="400").exit_code == 0


def test_bits_of_embedding_and_head_beside_a_preset_are_refused_by_the_names_that_they_were_given_by(place):
    given = ("--embedding-bits", "8", "--head-bits", "6", "--format", "gguf:q8_0")
    result = run("plan", place / "model", "--method", "rtn", *given, COLUMNS="400")
    assert result.exit_code == 2 and "leave out --embedding-bits 8, --head-bits 6, or name the format" in result.stderr


def test_options_that_change_more_than_numbers_go_with_a_preset_of_a_file_format(place):
    steps = ("plan", place / "model", "--method", "rtn", "--set", "mse=true", "--format", "gguf:q8_0")
    assert run(*steps).exit_code == 0


def test_debug_shows_the_error_as_it_is():
    result = run("quantize", "m", "--method", "gptk", "-o", "o", LOWBIT_DEBUG="1")
    assert isinstance(result.exception, ValueError)


# Lists


def test_methods_json_has_the_five_methods():
    result = run("methods", "--json")
    assert result.exit_code == 0
    entries = {entry["name"]: entry for entry in json.loads(result.stdout)}
    assert {"rtn", "gptq", "awq", "smoothquant", "omniquant"} <= entries.keys()
    assert all({"name", "family", "paper", "needs"} <= entry.keys() for entry in entries.values())
    assert entries["gptq"]["needs"] == ["Gram", "Tokens"]
    listed = run("methods").stdout
    assert all(entry["name"] in listed for entry in entries.values()) and "arXiv" not in listed
    told = run("methods", "gptq").stdout
    assert "arXiv:2210.17323" in told and re.search(r"act_order +│ false", told)
    assert_refused(run("methods", "gptk"), "did you mean 'gptq'")


def test_a_terminal_of_80_columns_shows_every_number_and_name_whole(place, monkeypatch):
    from rich.console import Console

    wide = run("plan", place / "model", *RTN).stdout
    monkeypatch.setattr(common, "console", lambda *, stderr=False: Console(stderr=stderr, width=80, highlight=False))
    narrow = run("plan", place / "model", *RTN).stdout
    assert "int8 asymmetric, groups of 32" in narrow and " shape: 128 x 64;" in narrow
    assert set(re.findall(r"[\d.]+ [kM]?B|\d+\.\d+|model\.layers\S+|\d+ x \d+", wide)) <= set(
        re.findall(r"[\d.]+ [kM]?B|\d+\.\d+|model\.layers\S+|\d+ x \d+", narrow)
    )
    for words in (("methods",), ("recipes",)):
        assert max(map(len, run(*words).stdout.splitlines())) <= 80


def test_recipes_are_listed_and_printed(tmp_path, monkeypatch):
    file = tmp_path / "small.yaml"
    file.write_text("method: rtn\noptions: {bits: 3}\ndescription: As small as it gets.\n")
    monkeypatch.setattr("lowbit.cli.recipes.builtin_recipes", lambda: {"small": file})
    assert "As small as it gets." in run("recipes").stdout
    [entry] = json.loads(run("recipes", "--json").stdout)
    assert (entry["name"], entry["method"], entry["description"]) == ("small", "rtn", "As small as it gets.")
    assert run("recipes", "small").stdout == file.read_text()
    assert json.loads(run("recipes", "small", "--json").stdout)["recipe"]["name"] == "rtn"
    assert_refused(run("recipes", "smal"), "did you mean 'small'")


def test_the_cache_of_converted_files_is_listed_and_cleared(tmp_path):
    model = tmp_path / "gguf" / "small-0123"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"0" * 1500)
    listed = run("cache", "list", LOWBIT_CACHE=str(tmp_path))
    assert listed.stdout.split() == [str(model), "1.5", "kB"]
    assert json.loads(run("cache", "clear", "--json", LOWBIT_CACHE=str(tmp_path)).stdout)[0]["bytes"] == 1500
    assert not model.exists() and run("cache", "list", LOWBIT_CACHE=str(tmp_path)).stdout == ""


# Progress and parsing


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 12.0, 13.0, 30.0, 31.0])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    with common.progress() as report:
        report(0, 4, "walking")
        report(1, 4, "walking")
        report(2, 4, "walking")
        report(3, 4, "walking")
        report(1, 2, "comparing")
    assert capsys.readouterr() == ("", "walking: 25%, elapsed 0:11, ETA 0:33\nwalking: 75%, elapsed 0:29, ETA 0:09\n")


def test_overrides_are_read_from_the_right():
    assert override(r"re:layers\.(0|1)\.:bits=8,symmetric=true") == {
        "match": r"re:layers\.(0|1)\.",
        "bits": 8,
        "symmetric": True,
    }
    assert override("re:a:b:skip") == {"match": "re:a:b", "skip": True}
    assert override("down:group_size=-1")["group_size"] == "channel"


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4 * 10**9), ("4GiB", 2**32), ("512 mb", 512 * 10**6), ("1.5k", 1500), ("42000000", 42 * 10**6), ("0", 0)],
)
def test_sizes_are_read_with_their_units(text, count):
    assert byte_count(text) == count


# Runs the command line given as arguments; the user presses Ctrl-C when the first block has been written.
INTERRUPTED = """
import os, signal, sys
from lowbit.stages.journal import Journal
number = getattr(signal, sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it runs in the background with it ignored
write = Journal.write
def interrupted(self, *args):
    write(self, *args)
    if len(self.finished) == 1:
        os.kill(os.getpid(), number)
Journal.write = interrupted
from lowbit.cli import app
app(prog_name="lowbit")
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_ctrl_c_and_sigterm_keep_finished_blocks_say_so_and_the_same_command_continues(place, tmp_path, name, code):
    out = tmp_path / "out"
    arguments = ["quantize", place / "model", "--method", "gptq", "--bits", "8", "--group-size", "32"]
    arguments += ["--calibration", place / "text.txt", *SHORT, "-o", out]
    command = [sys.executable, "-c", INTERRUPTED, name, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    stopped = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert stopped.returncode == code, stopped.stderr
    assert "continue" in stopped.stderr
    assert not out.exists() and len((tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()) >= 2
    finished = run(*arguments)
    assert finished.exit_code == 0, finished.stderr
    assert "continuing" in finished.stderr and "finished blocks: 1 of 2" in finished.stderr
    assert "since it was continued (" in finished.stdout.splitlines()[-1]
    assert (out / "config.json").exists() and not (tmp_path / "out.partial").exists()


def test_allocate_writes_a_recipe_that_quantize_takes_and_keeps_to_the_budget(place, tmp_path):
    out = tmp_path / "mixed.yaml"
    asked = (
        "--method",
        "gptq",
        "--group-size",
        "channel",
        "--target-bits",
        "5.5",
        "--calibration",
        place / "text.txt",
        *SHORT,
        "--kv",
        "kivi:2",
    )
    result = run("allocate", place / "model", *asked, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["bits_per_weight"] <= 5.5 and len(told["scheme"]["rules"]) > 2
    assert told["scheme"]["kv"]["key"]["grid"]["bits"] == 2
    made = quantize(place, tmp_path / "q", "--json", method=("--recipe", out))
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["bits_per_weight"] == pytest.approx(told["bits_per_weight"])
    assert_refused(run("allocate", place / "model", *asked, "-o", out), "mixed.yaml exists")
    impossible = run("allocate", place / "model", *asked[:5], "1.5", *asked[6:], "-o", tmp_path / "no.yaml")
    assert_refused(impossible, "1.5 bits a weight were asked for", "codes of 2 to 8 bits", "ask for more")
    unused = run("allocate", place / "model", *asked[:5], "99", *asked[6:], "-o", tmp_path / "no.yaml")
    assert_refused(unused, "99.0 bits a weight were asked for", "this recipe takes 2.", " to 8.", "at most")
    assert not (tmp_path / "no.yaml").exists()
    for name, words in (("recipe.txt", "a recipe file ends in .yaml"), ("mixed.yaml/no.yaml", "cannot be made")):
        refused = run(
            "allocate", tmp_path / "no-model", *asked, "-o", tmp_path / name
        )  # before the model is looked for
        assert_refused(refused, words)


def test_a_recipe_of_many_rules_is_still_a_line():
    recipe = lowbit.recipe("rtn", bits=4)
    rules = tuple(replace(recipe.scheme.rules[0], match=f"re:^layer{i}$") for i in range(20))
    many = describe(replace(recipe, scheme=replace(recipe.scheme, rules=rules)))
    assert "layer3" in many and "layer4" not in many
    assert many.endswith("16 more rules for some layers") and "more rules" not in describe(recipe)
