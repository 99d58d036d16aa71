"""Comparisons: what is measured, what is kept, what is not run again, and what is refused before the first row."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoints.source import open_model
from lowbit.cli import app
from lowbit.comparison import as_rows, child, read_grid, work
from lowbit.comparison.results import Results
from lowbit.comparison.table import COLUMNS
from lowbit.evaluation import KeptOriginal, evaluate_model, keep_states
from lowbit.evaluation.forward import logits_of
from lowbit.numerics import to_dict

from comparing import HERE, compare, texts, without_times
from helpers import VOCABULARY, assert_same, random_ids, tiny_llama
from killed import Killed

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RTN = {"label": "rtn", "method": "rtn", "bits": 8, "group_size": 32}
GPTQ = {"label": "gptq", "method": "gptq", "bits": 3, "group_size": 32}
TWO_BITS = {"label": "two bits", "method": "rtn", "bits": 2, "group_size": None}


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


# The original's kept states

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": {"intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "bloom": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma2": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_states_give_the_originals_logits_bit_for_bit(kind, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **({} if kind == "gpt2" else SMALL) | KINDS[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    source, ids = open_model(tmp_path / "model"), random_ids(3, 12)
    original = source.load_full()
    with torch.no_grad(), keep_states(original, tmp_path / "states"):
        wanted = [logits_of(original, ids_T) for ids_T in ids]
    kept = KeptOriginal(source, tmp_path / "states")
    for ids_T, logits_TV in reversed(list(zip(ids, wanted))):
        assert_same(kept.logits(ids_T), logits_TV)
    with pytest.raises(ValueError, match="keeps no hidden states"):
        kept.logits(ids[0].flip(0))


def test_the_original_against_what_was_kept_of_it_has_no_divergence(model, tmp_path):
    source, ids = open_model(model), random_ids(3, 32)
    original = source.load_full()
    with keep_states(original, tmp_path):
        alone = evaluate_model(original, ids, None, "gptq", 32)
    assert not original._forward_pre_hooks and not original.model.layers[-1]._forward_hooks
    found = evaluate_model(original, ids, None, "gptq", 32, against=KeptOriginal(source, tmp_path))
    assert (found.kl, found.top1_agreement) == (0.0, 1.0)
    assert found.perplexity == found.reference_perplexity == alone.perplexity


# Measuring


def test_a_row_holds_what_quantize_and_evaluate_give_one_after_the_other(model, tmp_path, here):
    original, rtn, gptq = compare(model, [RTN, GPTQ], tmp_path / "r.jsonl")
    calibration, ids = random_ids(4, 16), random_ids(5, 32, seed=2)
    for record, row, given in ((rtn, RTN, None), (gptq, GPTQ, calibration)):
        options = {key: row[key] for key in ("bits", "group_size")}
        recipe = lowbit.recipe(row["method"], **options)
        report = lowbit.quantize(model, recipe, given, out=tmp_path / row["label"], max_kl=1e9, allow_broken=True)
        found = lowbit.evaluate(tmp_path / row["label"], ids, seq_len=32, windows=5, against=model)
        for name in ("perplexity", "kl", "top1_agreement", "bits_per_weight", "bytes"):
            assert record[name] == getattr(found, name), name
        for name in ("perplexity_interval", "kl_interval", "top1_interval"):
            assert tuple(record[name]) == getattr(found, name)
        assert record["recipe"] == to_dict(recipe) == to_dict(report.recipe)
        assert (record["coverage"], record["protocol"]["sha256"]) == (report.coverage, found.ids_sha256)
        assert original["perplexity"] == found.reference_perplexity
    assert (rtn["calibration"], gptq["calibration"]["windows"], gptq["calibration"]["tokens"]) == (None, 4, 16)
    assert gptq["machine"]["threads"] == 1 and gptq["machine"]["cpu"]
    assert gptq["versions"].keys() == {"lowbit", "python", "torch", "transformers"}
    assert min(gptq["quantize_seconds"], gptq["evaluate_seconds"]) >= 0 < gptq["peak_rss_bytes"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("r-")]  # scratch is gone


def test_a_row_that_trains_reads_further_text_as_quantize_does(model, tmp_path, here):
    text, ids = str(model.parent / "calibration.txt"), random_ids(5, 32, seed=2)
    read = {"samples": 2, "seq_len": 16}
    training = {"method": "bitdistiller", "bits": 2, "tokens": 64, "seq_len": 16, "group_size": 32}
    rows = [{"label": "trained", **training}, {"label": "less", **training, "tokens": 32}, GPTQ]
    _, trained, less, gptq = lowbit.compare(model, rows, text, ids, tmp_path / "r.jsonl", **{**HERE, **read})
    for record, row in ((trained, rows[0]), (less, rows[1]), (gptq, GPTQ)):
        options = {key: value for key, value in row.items() if key not in ("label", "method")}
        made = lowbit.recipe(row["method"], **options)
        lowbit.quantize(model, made, text, out=tmp_path / row["label"], max_kl=1e9, allow_broken=True, **read)
        assert record["kl"] == lowbit.evaluate(tmp_path / row["label"], ids, seq_len=32, windows=5, against=model).kl
    assert trained["calibration"]["training"].items() >= {"windows": 4, "tokens": 16}.items()
    assert less["calibration"]["training"]["windows"] == 2 and "training" not in gptq["calibration"]
    given = lowbit.compare(model, rows[:1], random_ids(2, 16), ids, tmp_path / "r.jsonl", **HERE)[1]
    assert "training" not in given["calibration"] and given["kl"] != trained["kl"]
    assert any("behind the calibration text there are 0" in warning for warning in given["warnings"])
    done = len(here)
    lowbit.compare(model, rows[:1], text, ids, tmp_path / "r.jsonl", **{**HERE, **read})
    assert len(here) == done


apart = child.run_in_child


def test_a_process_of_its_own_gives_the_same_figures_and_its_own_memory(model, tmp_path, monkeypatch, here):
    expected = compare(model, [GPTQ], tmp_path / "here.jsonl")[1]

    def rows_apart(work, threads, log, progress):
        return (apart if hasattr(work, "recipe") else run_here)(work, threads, log, progress)

    run_here, seen = child.run_in_child, []
    monkeypatch.setattr(child, "run_in_child", rows_apart)
    big = torch.zeros(2**28)  # 1 GiB of this process does not count for the row
    found = compare(model, [GPTQ], tmp_path / "r.jsonl", progress=lambda *call: seen.append(call))[1]
    assert without_times(found) == without_times(expected)
    assert 5e7 < found["quantize_peak_rss_bytes"] <= found["peak_rss_bytes"] < 1e9 < big.nbytes
    assert [call[0] for call in seen] == sorted(call[0] for call in seen)
    assert seen[0][:2] == (0, 2) and seen[-1][:2] == (2, 2)
    assert any(1 < done < 2 and what.startswith("gptq: ") for done, _, what in seen)


def test_a_broken_model_is_measured_and_marked(model, tmp_path, monkeypatch, here):
    monkeypatch.setattr(work, "MAX_KL", 0.1)  # a random model at two bits is not far from the original
    [_, good, broken] = compare(model, [RTN, TWO_BITS], tmp_path / "r.jsonl")
    assert good["kl"] < 0.1 < broken["kl"] and (good["problems"], broken["problems"]) == ([], ["KL over 0.1"])
    row = next(line for line in (tmp_path / "r.md").read_text().splitlines() if line.startswith("| two bits"))
    assert "broken: " in row and f"{broken['perplexity']:.5g}" in row


# Crashes


def test_a_process_that_dies_is_an_error_of_its_row(tmp_path):
    seen = []
    killed = child.run_in_child(Killed(signal.SIGKILL), 1, tmp_path / "log", lambda *call: seen.append(call))
    assert killed == {"error": "the process was ended by SIGKILL, as the system does when memory runs out"}
    assert seen == [(0.5, "half way")]
    assert "no answer" not in str(killed)


def test_a_defect_is_recorded_with_its_traceback():
    found = child.attempt(Killed(None), lambda *call: None)
    assert found["error"] == "ZeroDivisionError: a defect" and "in run" in found["traceback"]


def test_a_row_that_fails_is_recorded_the_others_go_on_and_it_is_tried_again(model, tmp_path, monkeypatch, here):
    def failing(work, threads, log, progress):
        here.append(work)
        fails = getattr(work, "recipe", None) is not None and work.recipe.name == "gptq"
        return {"error": "no | memory\nat all"} if fails else child.attempt(work, progress)

    with monkeypatch.context() as patch:
        patch.setattr(child, "run_in_child", failing)
        records = compare(model, [GPTQ, RTN], tmp_path / "r.jsonl")
    assert ["error" in record for record in records] == [False, True, False]
    assert r"failed: no \| memory at all |" in (tmp_path / "r.md").read_text()
    here.clear()
    records = compare(model, [GPTQ, RTN], tmp_path / "r.jsonl")
    assert [type(work).__name__ for work in here] == ["MeasureOriginal", "MeasureRow"]
    assert not any("error" in record for record in records)
    assert "failed" not in (tmp_path / "r.md").read_text()
    assert [line["label"] for line in lines(tmp_path / "r.jsonl")] == ["original", "gptq", "rtn", "gptq"]


# Resuming


def test_only_rows_that_something_decisive_changed_run_again(model, tmp_path, here):
    out = tmp_path / "r.jsonl"
    first = compare(model, [RTN, GPTQ], out)
    here.clear()
    assert compare(model, [RTN, GPTQ], out) == first and not here

    def ran(rows, calibration=None, **changes):
        here.clear()
        ids = random_ids(4, 16) if calibration is None else calibration
        lowbit.compare(model, rows, ids, random_ids(5, 32, seed=2), out, **{**HERE, **changes})
        return [work.recipe.name for work in here[1:]]

    assert ran([RTN, GPTQ | {"damp": 0.1}]) == ["gptq"]
    assert ran([RTN | {"label": "another"}]) == ["rtn"]
    assert ran([RTN, GPTQ], calibration=random_ids(4, 16, seed=9)) == ["gptq"]  # rtn reads none
    assert ran([RTN, GPTQ], windows=4) == ["rtn", "gptq"]
    assert ran([RTN, GPTQ], protocol="llama.cpp") == ["rtn", "gptq"]
    assert ran([RTN, GPTQ]) == []
    page = (tmp_path / "r.md").read_text()
    assert page.count("\n# ") + page.startswith("# ") == 3  # a section for each protocol and text
    assert page.count("| original |") == 3


def test_rows_that_an_earlier_comparison_measured_are_taken_over_under_their_new_labels(model, tmp_path, here):
    first = compare(model, [RTN, GPTQ], tmp_path / "first.jsonl")
    here.clear()
    rows, known = [RTN | {"label": "another"}, GPTQ, TWO_BITS], {"known": [tmp_path / "first.jsonl"]}
    again = compare(model, rows, tmp_path / "again.jsonl", only=["another", "gptq"], **known)
    assert not here and [record["label"] for record in again] == ["original", "another", "gptq"]
    assert again[1] == first[1] | {"label": "another", "taken_from": {"file": "first.jsonl", "label": "rtn"}}
    assert "from first.jsonl" in (tmp_path / "again.md").read_text()
    compare(model, rows, tmp_path / "again.jsonl", **known)
    assert [getattr(each, "recipe", None) and each.recipe.scheme.rules[0].weight.grid.bits for each in here] == [
        None,
        2,
    ]
    here.clear()
    compare(model, [RTN], tmp_path / "shorter.jsonl", windows=4, **known)  # other windows are another text
    assert len(here) == 2
    with pytest.raises(ValueError, match="no file of results"):
        compare(model, [RTN], tmp_path / "r.jsonl", known=[tmp_path / "absent.jsonl"])


def test_another_model_is_another_comparison(model, tmp_path, here):
    compare(model, [RTN], tmp_path / "r.jsonl")
    here.clear()
    other = tiny_llama(tmp_path / "model", seed=1)
    compare(other, [RTN], tmp_path / "r.jsonl")
    assert len(here) == 2


def test_ctrl_c_loses_only_the_row_at_hand(model, tmp_path, monkeypatch, here):
    rows, out = [RTN, GPTQ, TWO_BITS], tmp_path / "r.jsonl"
    asked = {"tasks": ["piqa"], "task_files": model.parent}
    whole = compare(model, rows, tmp_path / "whole.jsonl", **asked)

    def interrupted(work, threads, log, progress):
        if getattr(work, "recipe", None) is not None and work.recipe.name == "gptq":
            raise KeyboardInterrupt
        return child.attempt(work, progress)

    with monkeypatch.context() as patch:
        patch.setattr(child, "run_in_child", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(model, rows, out, **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.jsonl", "r.md", "whole.jsonl", "whole.md"]
    with out.open("a") as file:
        file.write('{"label": "torn by a ki')
    here.clear()
    repeated = compare(model, rows, out, **asked)
    assert list(map(without_times, repeated)) == list(map(without_times, whole))
    assert [work.recipe.name for work in here[1:]] == ["gptq", "rtn"]
    assert [line["label"] for line in lines(out)] == ["original", "rtn", "gptq", "two bits"]


def test_results_of_another_form_are_refused_and_a_last_line_without_its_end_is_kept(model, tmp_path, here):
    out = tmp_path / "r.jsonl"
    compare(model, [RTN], out)
    edited = out.read_text()
    out.write_text(edited.rstrip("\n"))
    here.clear()
    compare(model, [RTN], out)
    assert not here and out.read_text() == edited
    for changed in ({"kl": "0.5"}, {"model": "m"}, {"tasks": 3}):
        out.write_text(json.dumps(lines(out)[0] | changed) + "\n")
        with pytest.raises(ValueError, match=rf"r.jsonl, line 1: {next(iter(changed))}: expected"):
            compare(model, [RTN], out)
        out.write_text(edited)


def test_a_file_that_another_comparison_writes_is_refused_and_let_go_afterwards(model, tmp_path, here):
    out = tmp_path / "r.jsonl"
    with Results(out).held(), pytest.raises(ValueError, match=r"r.jsonl is being written by another comparison"):
        compare(model, [RTN], out)
    assert not here
    compare(model, [RTN], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.jsonl", "r.md"]


def test_a_reader_leaves_a_line_that_is_being_written(tmp_path):
    out = tmp_path / "r.jsonl"
    out.write_text('{"label": "half a li')
    assert Results(out).records == [] and out.read_text() == '{"label": "half a li'


def test_options_in_a_grid_stand_beside_the_method_or_as_in_a_recipe_file():
    (apart,) = as_rows([{"method": "gptq", "options": {"bits": 3}}])
    (beside,) = as_rows([{"method": "gptq", "bits": 3}])
    assert apart.recipe == beside.recipe
    with pytest.raises(ValueError, match="options once"):
        as_rows([{"method": "gptq", "bits": 4, "options": {"bits": 3}}])


def test_only_measures_some_rows_and_the_table_keeps_the_order_of_all(model, tmp_path, here):
    out = tmp_path / "r.jsonl"
    rows = [RTN, GPTQ, TWO_BITS]
    assert [record["label"] for record in compare(model, rows, out, only=["bits"])] == ["original", "two bits"]
    records = compare(model, rows, out, only=["gptq", "rtn"])
    assert [record["label"] for record in records] == ["original", "rtn", "gptq", "two bits"]
    table = [line for line in (tmp_path / "r.md").read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[1:]] == ["| original", "| rtn", "| gptq", "| two bits"]
    assert len({line.replace(r"\|", "").count("|") for line in table}) == 1 and "tokens/s" not in table[0]


# Refusals


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([RTN, {"method": "gptk"}], {}, "row 2: no method 'gptk'.*gptq"),
        ([RTN, GPTQ | {"dump": 1}], {}, r"row 2 \(gptq\): .*'dump'.*'damp'"),
        ([RTN, RTN], {}, "two rows are called 'rtn'"),
        ([RTN | {"label": "original"}], {}, "cannot be called 'original'"),
        ([{"label": "x", "bits": 4}], {}, "either 'method' with its options or 'recipe'"),
        ([{"recipe": "w4-rtn", "bits": 4}], {}, "a recipe has its own options; found bits"),
        ([], {}, "has no rows"),
        ([RTN, GPTQ | {"overrides": [{"match": "dwn", "bits": 8}]}], {}, "row 'gptq': .*'dwn' matches no layer"),
        ([GPTQ | {"group_size": 7, "symmetric": "maybe"}], {}, "symmetric"),
        ([RTN], {"windows": 6}, "holds 5 windows"),
        ([RTN], {"eval_seq_len": 300}, "windows of 32 and seq_len is 300"),
        ([RTN], {"protocol": "gtpq"}, "unknown perplexity protocol"),
        ([RTN, GPTQ], {"only": ["awq"]}, "no row has 'awq'"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_row(model, tmp_path, here, rows, changes, words):
    with pytest.raises(ValueError, match=words):
        compare(model, rows, tmp_path / "r.jsonl", **changes)
    assert not here and not list(tmp_path.iterdir())


def test_a_missing_calibration_text_is_refused_only_where_it_is_needed(model, tmp_path, here):
    ids = random_ids(5, 32)
    with pytest.raises(ValueError, match="gptq: calibration text is needed"):
        lowbit.compare(model, [RTN, GPTQ], None, ids, tmp_path / "r.jsonl", **HERE)
    assert not here
    assert len(lowbit.compare(model, [RTN], None, ids, tmp_path / "r.jsonl", **HERE)) == 2


@pytest.mark.parametrize("line", ['{"setting": "of another tool"}', "[1]", "nothing"])
def test_results_of_something_else_are_refused_and_kept(tmp_path, line):
    (tmp_path / "r.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1: not a record"):
        Results(tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_text() == line + "\n"
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        Results(tmp_path / "table.md")
    with pytest.raises(ValueError, match="is not a directory"):
        Results(tmp_path / "absent" / "r.jsonl")


def test_an_original_that_fails_ends_the_comparison(model, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "run_in_child", lambda *_: {"error": "no memory"})
    with pytest.raises(ValueError, match="original model could not be evaluated: no memory"):
        compare(model, [RTN], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


# Rows


def test_a_grid_file_finds_recipes_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("method: rtn\noptions: {bits: 3, group_size: 32}\n")
    (tmp_path / "grid.yaml").write_text(
        "- {label: a, recipe: mine.yaml}\n- {method: gptq, bits: 4, group_size: null, damp: 1e-3}\n- {recipe: w4-rtn}\n"
    )
    rows = read_grid(tmp_path / "grid.yaml")
    assert [row.label for row in rows] == ["a", "gptq, W4 per channel", "rtn, W4 g64"]
    assert rows[0].recipe == lowbit.recipe("rtn", bits=3, group_size=32)
    assert rows[1].recipe == lowbit.recipe("gptq", bits=4, group_size=None, damp=1e-3)
    (tmp_path / "grid.yaml").write_text("method: rtn\n")
    with pytest.raises(ValueError, match=r"grid\.yaml: a grid is a list of rows"):
        read_grid(tmp_path / "grid.yaml")


def test_rows_in_python_are_recipes_names_or_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("method: rtn\n")
    recipe = lowbit.recipe("smoothquant", bits=8, activation_bits=8)
    rows = as_rows([recipe, "rtn", tmp_path / "mine.yaml"])
    assert [row.label for row in rows] == ["smoothquant, W8A8 per channel", "rtn, W4 g128", "mine"]


@pytest.mark.parametrize("name", ["weight_only.yaml", "weight_activation.yaml"])
def test_the_grids_of_the_benchmarks_are_grids(name):
    rows = read_grid(BENCHMARKS / name)
    assert len({str(to_dict(row.recipe)) for row in rows}) == len(rows) > 8


# The command line


def command(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in ("compare", *arguments)])


def test_the_command_makes_rows_of_methods_bits_and_files(model, tmp_path, here):
    grid, recipe, out = tmp_path / "grid.yaml", tmp_path / "mine.yaml", tmp_path / "r.jsonl"
    grid.write_text("- {label: first, method: rtn, bits: 8}\n")
    recipe.write_text("method: rtn\noptions: {bits: 5, group_size: 32}\n")
    rows = ("--method", "rtn", "--method", "gptq", "--bits", "4,3", "--group-size", 32, "--grid", grid)
    result = command(model, *rows, "--recipe", recipe, *texts(model), "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    labels = [record["label"] for record in json.loads(result.stdout)]
    named = ["rtn, W4 g32", "gptq, W4 g32", "rtn, W3 g32", "gptq, W3 g32"]
    assert labels == ["original", "first", "mine", *named]
    assert "gptq, W3 g32: perplexity " in result.stderr
    assert [(record["calibration"] or {}).get("bos") for record in json.loads(result.stdout)[-2:]] == [None, "auto"]
    shown = command(model, *rows, "--recipe", recipe, *texts(model), "-o", out)
    assert shown.exit_code == 0 and all(label in shown.stdout for label in labels)
    [header, first, *_] = csv.reader(
        command(model, *rows, *texts(model), "-o", out, "--format", "csv").stdout.splitlines()
    )
    assert tuple(header) == COLUMNS and first[0] == "original" and float(first[1]) > 1
    markdown = command(model, *rows, *texts(model), "-o", out, "--format", "markdown").stdout
    assert "\n".join(markdown.splitlines()[:3]) in out.with_suffix(".md").read_text()
    latex = command(model, *rows, *texts(model), "-o", out, "--format", "latex").stdout
    assert latex.startswith("\\begin{tabular}") and r"95 \% interval" in latex and latex.count(r"\\") == 1 + 6
    assert len(here) == 7  # nothing was measured for all these


def test_the_command_makes_rows_of_caches_alone_and_beside_methods(model, tmp_path, here):
    caches, out = ("--kv", "kv-int", "--kv-bits", "4,2", "--kv-set", "recent=4"), tmp_path / "r.jsonl"
    alone = command(model, *caches, *texts(model), "-o", out, "--json")
    assert alone.exit_code == 0, alone.stderr
    records = json.loads(alone.stdout)
    assert [record["label"] for record in records] == ["original", "kv-int:4", "kv-int:2"]
    assert [record.get("cache_bits") for record in records[1:]] == [5.0, 3.0] and records[0].get("cache_bits") is None
    assert 0 < records[1]["kl"] < records[2]["kl"]
    page = out.with_suffix(".md").read_text()
    assert "through the cache, chunks of 2" in page and "bits, cache" in page
    rows = ("--method", "rtn", "--bits", "8", "--kv", "none", "--kv", "kv-int:2")
    both = command(model, *rows, *texts(model), "-o", tmp_path / "both.jsonl", "--json")
    assert both.exit_code == 0, both.stderr
    labels = [record["label"] for record in json.loads(both.stdout)]
    assert labels[1:] == [labels[1], f"{labels[1]}, kv-int:2"]


def test_the_command_fails_where_a_row_failed(model, tmp_path, monkeypatch, here):
    def failing(work, threads, log, progress):
        return {"error": "gone"} if hasattr(work, "recipe") else child.attempt(work, progress)

    monkeypatch.setattr(child, "run_in_child", failing)
    result = command(model, "--method", "rtn", *texts(model), "-o", tmp_path / "r.jsonl")
    assert result.exit_code == 1 and "failed: gone" in result.stdout
    assert result.stderr.splitlines()[-1] == "error: 1 of 1 rows failed: rtn, W4 g128"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("m", "-o", "r.jsonl"), 2),
        (("m", "--method", "rtn"), 2),
        (("m", "--method", "rtn", "--bits", "4;3", "-o", "r.jsonl"), 2),
        (("m", "--grid", "g.yaml", "--bits", "4", "-o", "r.jsonl"), 2),
        (("m", "--grid", "absent.yaml", "-o", "r.jsonl"), 1),
        (("m", "--method", "gptk", "-o", "r.jsonl"), 1),
    ],
)
def test_a_command_that_cannot_be_is_refused(arguments, code):
    result = command(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")


def test_help_has_an_example():
    result = command("--help")
    assert result.exit_code == 0 and "Example: lowbit compare" in result.stdout
