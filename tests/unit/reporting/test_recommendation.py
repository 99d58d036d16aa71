"""A recommendation is the best measured choice that fits, its command makes it, and a refusal says what would fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.cli.choose import byte_count, choose_recipe, method_options
from lowbit.plan import plan
from lowbit.reporting.choices import ENGINES
from lowbit.reporting.measured import MeasuredRow, measured
from lowbit.reporting.recommendation import recommend

from helpers import tiny_llama

CONTEXT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("recommend") / "model"
    return tiny_llama(place, hidden_size=256, intermediate_size=512, max_position_embeddings=10**6)


def parsed(row: MeasuredRow):
    """The recipe that the words of a row ask for, read as the command line reads them."""
    given: dict[str, list[str]] = {}
    words = row.words()
    for name, value in zip(words[::2], words[1::2], strict=True):
        given.setdefault(name, []).append(value)
    bits, activation_bits = (int(given[key][0]) if key in given else None for key in ("--bits", "--activation-bits"))
    group_size = given.get("--group-size", [None])[0]
    options = method_options(bits, group_size, activation_bits, given.get("--set"))
    return choose_recipe(given.get("--method", [None])[0], given.get("--recipe", [None])[0], options, None)


def test_the_words_of_every_row_ask_for_what_was_measured():
    for row in measured().rows:
        assert parsed(row) == row.recipe, row.label


def test_no_row_is_broken_and_losses_are_those_of_the_perplexities():
    for row in measured().rows:
        assert row.kl is None or row.kl < 2
        assert row.perplexity > 0.9 * row.original


def test_what_fits_and_lost_least_is_chosen(model):
    roomy = recommend(model, 10**9, context=CONTEXT)
    assert roomy.chosen.cache is None and not roomy.better
    untrained = [row for row in measured().rows if not row.trains]
    assert roomy.chosen.row.loss == min(row.loss for row in untrained)
    tight = recommend(model, roomy.chosen.bytes - 1, context=CONTEXT)
    assert tight.chosen.bytes < roomy.chosen.bytes and tight.chosen.loss >= roomy.chosen.loss
    for row in untrained:  # in the model at hand, not in the table
        if max(0.0, row.loss) < tight.chosen.loss:
            size = plan(model, row.recipe, context=CONTEXT)
            assert size.cache is not None and size.bytes_out + size.cache.bytes_floating > tight.memory, row.label


def test_recipes_that_train_are_chosen_only_if_asked_for(model):
    assert not recommend(model, 10**9, context=CONTEXT).chosen.row.trains
    assert recommend(model, 10**9, context=CONTEXT, train=True).chosen.row.trains


def test_impatience_leaves_out_what_takes_longer_or_was_not_timed(model):
    quick = recommend(model, 10**9, context=CONTEXT, patience=1.0).chosen.row
    assert quick.time is not None and quick.time <= 1.0
    able = [row.loss for row in measured().rows if row.time is not None and row.time <= 1.0]
    assert quick.loss == min(able)
    with pytest.raises(ValueError, match="by any measured recipe"):
        recommend(model, 10**9, context=CONTEXT, patience=0.0)


def test_presets_are_taken_by_falling_bits_and_stand_on_rows_that_bound_their_loss(model):
    roomy = recommend(model, 10**9, "llama.cpp", context=CONTEXT)
    assert roomy.chosen.file_format == "gguf:q8_0" and roomy.chosen.row.asked <= 8
    tight = recommend(model, roomy.chosen.bytes - 1, "llama.cpp", context=CONTEXT)
    assert tight.chosen.file_format == "gguf:q6_k" and tight.chosen.bytes < roomy.chosen.bytes
    assert "--bits" not in tight.command and "--format gguf:q6_k" in tight.command
    assert tight.chosen.bound and any("upper bound" in reason for reason in tight.reasons)


def test_a_long_sequence_has_its_cache_packed(model):
    whole = recommend(model, 10**9, context=4096)
    packed = recommend(model, whole.chosen.weight_bytes + whole.chosen.cache_bytes // 2, context=4096)
    assert packed.chosen.cache is not None and f"--kv {packed.chosen.cache.name}" in packed.command
    assert packed.chosen.cache_bytes < whole.chosen.cache_bytes / 2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_command_makes_what_is_recommended(model, engine):
    result = recommend(model, 10**9, engine, context=CONTEXT)
    words = result.command.split()
    assert words[:2] == ["lowbit", "quantize"] and words[-2:] == ["-o", "DIR"]
    kept = [word for word in words[2:-2] if word not in ("--calibration", "TEXT")]
    planned = CliRunner().invoke(app, ["plan", *kept, "--context", str(CONTEXT), "--json"])
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["bytes_out"] == result.chosen.weight_bytes
    assert result.chosen.file_format in ENGINES[engine]


def test_a_refusal_says_what_would_fit_and_that_fits(model):
    with pytest.raises(ValueError) as refused:
        recommend(model, 1000, context=CONTEXT)
    message = str(refused.value)
    assert "What would fit: --memory" in message and "--context" not in message  # its weights alone are too many
    memory = re.search(r"--memory (\S+GB)", message)
    assert memory is not None
    fits = recommend(model, byte_count(memory[1]), context=CONTEXT)
    with pytest.raises(ValueError) as refused:
        recommend(model, fits.chosen.bytes, context=10**6)
    tokens = re.search(r"--context (\d+)", str(refused.value))
    assert tokens is not None
    assert recommend(model, fits.chosen.bytes, context=int(tokens[1]))


def test_an_engine_that_is_not_known_and_a_model_that_is_missing_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"unknown engine 'x': expected lowbit, vllm, llama\.cpp"):
        recommend(model, 10**9, "x")
    for arguments in ([str(tmp_path / "none"), "--memory", "1GB"], [str(model), "--memory", "1kB"]):
        result = CliRunner().invoke(app, ["recommend", *arguments])
        assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("error: ")


def test_a_sequence_longer_than_the_models_positions_is_refused(model):
    words = "a sequence of 1000001 tokens needs 1000001 positions and the model has 1000000: ask for at most 1000000"
    with pytest.raises(ValueError, match=words):
        recommend(model, 10**9, context=10**6 + 1)
    assert recommend(model, 10**9, context=10**6).tokens == 10**6


def test_the_command_line_shows_the_choice_its_command_and_its_measurement(model):
    result = CliRunner().invoke(
        app, ["recommend", str(model), "--memory", "1GB", "--context", "64"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0
    assert "lowbit quantize" in result.stdout and "benchmarks/results/" in result.stdout
