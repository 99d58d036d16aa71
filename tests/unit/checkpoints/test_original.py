"""Whether a model can be the original of another, and what is said where it is doubtful."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoints import native
from lowbit.checkpoints.original import OriginalWarning, check_original, original_doubts
from lowbit.checkpoints.shards import fingerprint, read_headers
from lowbit.cli import app
from lowbit.data import Calibration
from lowbit.recipes import Recipe, Train
from lowbit.training import NextToken, StoredFloats

from helpers import random_ids, tiny_llama, tiny_writer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, what was made of it, and others: one of the same sizes, one with a block more, one that is wider."""
    root = tmp_path_factory.mktemp("original")
    tiny_writer(root / "model")
    lowbit.quantize(root / "model", lowbit.recipe("rtn", bits=8, group_size=32), None, out=root / "packed")
    tiny_llama(root / "same sizes", seed=5)
    tiny_llama(root / "deeper", blocks=3)
    tiny_llama(root / "wider", hidden_size=128)
    return root


@pytest.mark.parametrize(
    ("other", "words"), [("deeper", "num_hidden_layers is 2 here and 3"), ("wider", "hidden_size is 64 here and 128")]
)
def test_a_model_of_other_sizes_is_refused_as_the_original_before_weights_are_read(place, other, words, monkeypatch):
    in_memory = lowbit.load(place / "packed")
    monkeypatch.setattr(native, "load", None)
    for ask in (
        lambda: lowbit.evaluate(place / "packed", random_ids(2, 16), against=place / other),
        lambda: lowbit.evaluate(in_memory, random_ids(2, 16), against=place / other),
        lambda: lowbit.evaluate_chat(place / "packed", place / other, ["w7"]),
    ):
        with pytest.raises(
            ValueError, match=f"{other} is not the original of .*: {words} there. Name the model that was"
        ):
            ask()


def test_another_model_answers_tasks_with_its_own_tokenizer_and_a_warning(place):
    """Nothing but items that are right or wrong is compared, so sizes and vocabularies may differ."""
    (place / "a.jsonl").write_text('{"query": "w7", "choices": ["w8", "w9"], "gold": 0}\n' * 3)
    other = tiny_writer(place / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.warns(OriginalWarning, match="other is not the original of .*num_hidden_layers is 2 here and 1 there"):
        (found,) = lowbit.evaluate_tasks(place / "packed", ["a"], place, against=other)
    (alone,) = lowbit.evaluate_tasks(other, ["a"], place)
    assert found.metrics[0].against.original == alone.metrics[0].value
    with pytest.raises(ValueError, match="pass its place instead of a model in memory"):
        lowbit.evaluate_tasks(place / "packed", ["a"], place, against=lowbit.load(other))


def test_python_warns_where_the_command_does(place):
    (place / "a.jsonl").write_text('{"query": "w7", "choices": ["w8", "w9"], "gold": 0}\n' * 3)
    for ask in (
        lambda: lowbit.evaluate(
            place / "packed", random_ids(2, 16), seq_len=16, windows=2, against=place / "same sizes"
        ),
        lambda: lowbit.evaluate_tasks(place / "packed", ["a"], place, against=place / "same sizes"),
        lambda: lowbit.evaluate_chat(place / "packed", place / "same sizes", ["w7"]),
    ):
        with pytest.warns(OriginalWarning, match="compares two different models") as said, suppress(ValueError):
            ask()  # the model has no chat template
        assert said[0].filename == __file__


def test_what_a_checkpoint_was_made_of_is_no_doubt_and_a_model_of_the_same_sizes_is_one(place):
    for original in ("model", "packed"):  # itself: what another cache costs
        check_original(place / "packed", place / original)
        assert original_doubts(place / "packed", place / original) == ()
    check_original(place / "packed", place / "same sizes")
    (doubt,) = original_doubts(place / "packed", place / "same sizes")
    assert "same sizes has other bytes (fingerprint " in doubt and "compares two different models" in doubt
    assert original_doubts(place / "model", place / "same sizes") == ()  # no report says what it was made of


def test_a_packed_model_that_is_given_as_the_original_of_a_plain_one_is_a_doubt(place):
    (doubt,) = original_doubts(place / "model", place / "packed")
    assert "packed, which is given as the original, is packed" in doubt and "--against" in doubt


def test_a_trained_checkpoint_was_made_of_the_checkpoint_before_and_of_its_original(place):
    ids = random_ids(3, 16)
    text = Calibration(ids[:1], "a text", "0", held_out=ids[1:2], further=ids[2:])
    base, training = lowbit.recipe("rtn"), Train(StoredFloats(), NextToken(), tokens=16)
    recipe = Recipe("trained", base.scheme, (*base.stages, training))
    lowbit.train(place / "packed", recipe, text, out=place / "trained")
    for original in ("packed", "model"):
        assert original_doubts(place / "trained", place / original) == ()
    (doubt,) = original_doubts(place / "trained", place / "same sizes")
    assert fingerprint(place / "model" / "config.json", read_headers(place / "model"))[:12] in doubt


def test_an_exported_checkpoint_says_what_it_was_made_of(place, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(place / "cache"))
    recipe = lowbit.recipe("rtn", bits=8, group_size=32, symmetric=True)
    lowbit.quantize(place / "model", recipe, None, out=place / "symmetric")
    lowbit.export(place / "symmetric", "compressed-tensors", out=place / "exported")
    assert original_doubts(place / "exported", place / "model") == ()
    (doubt,) = original_doubts(place / "exported", place / "same sizes")
    assert "same sizes has other bytes (fingerprint " in doubt


def test_types_that_a_gguf_file_does_not_tell_apart_are_one_kind_and_others_are_not(place):
    """llama.cpp calls a model of mistral's type llama, so its file and its original have two types."""
    for kind in ("mistral", "qwen2"):
        shutil.copytree(place / "model", place / kind)
        config = json.loads((place / kind / "config.json").read_text())
        (place / kind / "config.json").write_text(json.dumps(config | {"model_type": kind, "sliding_window": None}))
    check_original(place / "packed", place / "mistral")
    check_original(place / "mistral", place / "packed")
    with pytest.raises(ValueError, match="model_type is llama here and qwen2 there"):
        check_original(place / "packed", place / "qwen2")


def test_evaluate_warns_of_another_model_of_the_same_sizes(place):
    (place / "text.txt").write_text(" ".join(f"w{i % 100 + 10}" for i in range(200)))
    window = ("--text", str(place / "text.txt"), "--seq-len", "16", "--windows", "2")

    def said(original: str) -> str:
        asked = ["evaluate", str(place / "packed"), *window, "--against", str(place / original), "--json"]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.stderr
        return result.stderr

    assert "warning: " in said("same sizes") and "other bytes" in said("same sizes")
    assert "other bytes" not in said("model")
