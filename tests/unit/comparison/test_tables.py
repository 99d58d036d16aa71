"""The papers' tables: every recipe is one that a model can have, and our rows stand beside what was published."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app, complete
from lowbit.comparison import ORIGINAL, Row, costs, preset_names, presets, read_preset
from lowbit.comparison.over import accuracy_change, over_seeds
from lowbit.comparison.presets import Preset

from comparing import HERE, compare, texts
from helpers import random_ids, tiny_llama

TINY = """
title: "Tiny"
paper: arXiv:0000.00000
columns: [{model: Big, figure: perplexity}, {model: Big, figure: accuracy}]
note: made up.
tasks: [piqa]
original: [5.0, 60.0]
rows:
  - {label: "rtn, W8", method: rtn, bits: 8, group_size: 32, published: [5.5, 59.5]}
  - {label: "not here", published: [6.0, null]}
  - {label: "gptq, W3", method: gptq, bits: 3, group_size: 32}
  - {label: "no such layer", method: rtn, bits: 8, overrides: [{match: "re:no_such_layer", bits: 4}]}
"""


@pytest.fixture
def tiny_table(monkeypatch, tmp_path) -> Preset:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(presets, "_FOLDER", tmp_path / "tables")
    return read_preset("tiny")


# The files


def test_every_recipe_of_every_table_has_a_plan(tmp_path):
    """On a model whose widths are whole numbers of groups, with heads of 128."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
    place = tiny_llama(tmp_path / "wide", blocks=1, **wide)
    rows = {
        repr(row.recipe): Row(f"{name}: {row.label}", row.recipe)
        for name in preset_names()
        for row in read_preset(name).rows
    }
    assert len(rows) > 100
    refused = [
        (cost.row.label, cost.refused)
        for cost in costs(place, rows.values(), samples=4, seq_len=16)
        if cost.plan is None
    ]
    assert refused == []


@pytest.mark.parametrize("name", preset_names())
def test_a_table_has_a_figure_or_none_for_each_of_its_columns(name):
    preset = read_preset(name)
    assert preset.title and preset.paper and preset.note and preset.rows
    assert len(set(preset.labels)) == len(preset.labels)
    assert all(len(values) == len(preset.columns) for values in preset.published.values())
    assert any(value is not None for label in preset.labels for value in preset.published.get(label, ()))
    recipes = [repr(row.recipe) for row in preset.rows]
    assert len(set(recipes)) == len(recipes)


def test_the_tables_that_were_asked_for_are_there_and_shells_offer_them():
    asked = "omniquant-1 omniquant-2 omniquant-3 smoothquant-levels smoothquant-alpha qllm-1 qllm-2 qllm-4 llm-qat kivi survey"
    assert set(preset_names()) == set(asked.split()) == {name for name, _ in complete.tables("")}
    with pytest.raises(ValueError, match=r"no table 'omniquant1' \(did you mean 'omniquant-1'"):
        read_preset("omniquant1")


def test_options_change_the_rows_that_have_them_and_their_labels_say_so():
    preset, plain = read_preset("llm-qat", {"tokens": 4096}), read_preset("llm-qat")
    assert preset.labels[0] == "llm-qat, 8-8-16, tokens 4096" and "rtn, 8-8-8" in preset.labels
    trained, untrained = preset.rows[0].recipe, next(row for row in preset.rows if row.label == "rtn, 8-8-8").recipe
    assert trained.stages[-1].tokens == 4096 != plain.rows[0].recipe.stages[-1].tokens
    assert untrained in [row.recipe for row in plain.rows]
    assert preset.published[preset.labels[0]] == plain.published[plain.labels[0]]
    with pytest.raises(ValueError, match="no method of table kivi has an option 'tokens'"):
        read_preset("kivi", {"tokens": 4096})


# Running one


def test_a_table_prints_its_costs_runs_resumes_and_shows_published_figures(model, tmp_path, tiny_table, here):
    out = tmp_path / "r.jsonl"
    command = ("compare", model, "--table", "tiny", "--task-files", model.parent, *texts(model), "-o", out)
    first = CliRunner().invoke(app, [str(part) for part in command])
    assert first.exit_code == 0, first.stderr
    assert (
        "rtn, W8: " in first.stderr
        and "bits a weight" in first.stderr
        and "2 rows, 1 with calibration text" in first.stderr
    )
    assert "no such layer: left out, because this model cannot have it" in " ".join(first.stderr.split())
    page, lines = out.with_suffix(".md").read_text(), out.read_text()
    row = next(line for line in page.splitlines() if line.startswith("| rtn, W8 |"))
    assert row.endswith("| 5.5 (+0.095) | 59.5 |") and "| not here |" in page
    assert "on other models than ours" in page and "piqa (12 items)" in page
    here.clear()
    again = CliRunner().invoke(app, [str(part) for part in command])
    assert again.exit_code == 0 and not here and out.read_text() == lines


def test_tasks_of_a_row_stand_beside_the_originals_on_the_same_items(model, tmp_path, here):
    rows = [{"label": "two", "method": "rtn", "bits": 2, "group_size": None}]
    out, asked = tmp_path / "r.jsonl", {"tasks": ["piqa"], "task_files": model.parent}
    original, two = compare(model, rows, out, **asked)
    ours, theirs = (record["tasks"]["piqa"]["metrics"]["acc"] for record in (two, original))
    assert theirs["against"] is None and ours["against"]["original"] == theirs["value"]
    changed = [i for i, (a, b) in enumerate(zip(ours["values"], theirs["values"])) if a != b]
    assert sorted(ours["against"]["lost"] + ours["against"]["gained"]) == changed
    change = accuracy_change(two)
    assert change is not None and accuracy_change(original) is None
    here.clear()
    compare(model, rows, out, **asked)
    assert not here
    compare(model, rows, out)  # without tasks it is another comparison
    compare(model, rows, out, limit=5, **asked)
    assert len(here) == 4
    with pytest.raises(ValueError, match="give task_files"):
        compare(model, rows, out, tasks=["piqa"])


def test_speed_is_measured_where_it_is_asked_for(model, tmp_path, here, monkeypatch):
    monkeypatch.setattr("lowbit.comparison.work.PROMPT_TOKENS", 8)
    monkeypatch.setattr("lowbit.comparison.work.NEW_TOKENS", 2)
    records = compare(model, [{"method": "rtn", "bits": 8, "group_size": 32}], tmp_path / "r.jsonl", speed=True)
    assert all(record["speed"]["decode_tokens_per_s"] > 0 for record in records)


# Seeds


def test_a_row_that_is_random_is_measured_with_every_seed_and_one_that_is_not_with_two(model, tmp_path, here):
    rows = [
        {"label": "rtn", "method": "rtn", "bits": 3, "group_size": 32},
        {"label": "quip", "method": "quip", "bits": 3},
    ]
    out = tmp_path / "r.jsonl"
    records = compare(model, rows, out, seeds=[0, 1, 2])
    assert [record["label"] for record in records] == [
        ORIGINAL, "rtn, seed 0", "rtn, seed 1", "quip, seed 0", "quip, seed 1", "quip, seed 2",
    ]  # fmt: skip
    assert len({record["perplexity"] for record in records if record["label"].startswith("quip")}) == 3
    rtn, quip = over_seeds(records)
    assert rtn.endswith("(the same with every seed)") and quip.endswith("(3 seeds)") and "±" in quip
    assert quip in out.with_suffix(".md").read_text()
    here.clear()
    assert compare(model, rows, out, seeds=[0, 1, 2]) == records and not here
    with pytest.raises(ValueError, match="give each once"):
        compare(model, rows, out, seeds=[0, 0])


# Leakage


def test_a_calibration_text_that_is_evaluated_is_refused_unless_it_is_allowed(model, tmp_path, here):
    rows, out, text = ["gptq"], tmp_path / "r.jsonl", model.parent / "text.txt"
    short = {key: value for key, value in HERE.items() if key != "threads"}
    with pytest.raises(ValueError, match=r"calibration text \(text\.txt\) is in the evaluated text: .*--allow-leakage"):
        lowbit.compare(model, rows, str(text), str(text), out, **short)
    assert not here and not out.exists()
    lowbit.compare(model, ["rtn"], str(text), str(text), out, **short)  # it reads no calibration text
    [_, gptq] = lowbit.compare(model, rows, str(text), str(text), out, allow_leakage=True, **short)
    assert gptq["calibration"]["leakage"]["share"] > 0.2
    assert "are in the calibration text" in out.with_suffix(".md").read_text()


def test_a_calibration_text_that_is_in_a_task_is_refused(model, tmp_path, here):
    query = " ".join((model.parent / "calibration.txt").read_text().split()[:60])
    (tmp_path / "leaking.jsonl").write_text(json.dumps({"query": query, "choices": ["w1", "w2"], "gold": 0}) + "\n")
    asked = {"tasks": ["leaking"], "task_files": tmp_path, **HERE}
    with pytest.raises(ValueError, match="is in task leaking"):
        lowbit.compare(
            model, ["gptq"], str(model.parent / "calibration.txt"), random_ids(5, 32), tmp_path / "r.jsonl", **asked
        )


def test_ids_without_a_tokenizer_are_compared_too(tmp_path, here):
    place = tiny_llama(tmp_path / "model")
    with pytest.raises(ValueError, match="is in the evaluated text"):
        lowbit.compare(
            place,
            ["gptq"],
            random_ids(4, 16),
            random_ids(4, 16),
            tmp_path / "r.jsonl",
            samples=4,
            eval_seq_len=16,
            windows=4,
        )


def test_the_page_of_a_comparison_of_another_model_keeps_its_own_figures(model, tmp_path, tiny_table, here):
    records = compare(model, list(tiny_table.rows[:1]), tmp_path / "r.jsonl", preset=tiny_table)
    beside = tiny_table.beside(records)
    assert beside.columns[-2:] == ("published: Big, perplexity (ln ratio)", "published: Big, accuracy")
    assert [row[0] for row in beside.rows] == [ORIGINAL, *tiny_table.labels]
    assert beside.rows[0][-2:] == ("5", "60") and beside.rows[2][1:4] == ("", "", "")


def test_without_ray_its_option_is_refused_with_what_to_do(model, tmp_path, monkeypatch, here):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lowbit\[ray\]'"):
        compare(model, ["rtn"], tmp_path / "r.jsonl", ray="local")
    assert not here
