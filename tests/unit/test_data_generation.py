"""``lowbit generate-data`` from a model to calibration: what is stored, how a stopped run continues, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import data_generation
from lowbit.checkpoints.source import open_model
from lowbit.checkpoints.tokenizer import load_tokenizer
from lowbit.data import calibration_of
from lowbit.data_generation import prepare_data
from lowbit.generation import read_generated
from lowbit.generation.files import shards_of
from lowbit.stages import journal as journals
from lowbit.stages.journal import Journal
from lowbit.texts import TextError, load_text

from helpers import CONTROLS, tiny_llama, tiny_writer

ASKED = {"tokens": 150, "seq_len": 24, "batch": 3, "seed": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_writer(tmp_path_factory.mktemp("data") / "model")


@pytest.fixture(scope="module")
def written(place):
    """A directory of texts that nobody disturbed."""
    out = place.parent / "written"
    lowbit.generate_data(place, out, **ASKED)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rows(directory: Path) -> list[dict]:
    return [row for file in sorted(directory.glob("*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()]


# What is stored


def test_texts_are_stored_with_their_ids_and_what_made_them(written, place):
    provenance = json.loads((written / "provenance.json").read_text())
    assert sorted(contents(written)) == sorted([*provenance["files"], "provenance.json", "report.json"])
    assert provenance["model"]["sha256"] == open_model(place).fingerprint
    assert provenance["sampling"] == {"strategy": "hybrid", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 2}
    assert (
        provenance["asked"] == {"tokens": 150, "seq_len": 24} and provenance["versions"]["torch"] == torch.__version__
    )
    [shard] = written.glob("*.parquet")
    inside = json.loads(pyarrow.parquet.read_schema(shard).metadata[b"lowbit"])
    assert inside.items() <= provenance.items() and inside["model"] == provenance["model"]
    tokenizer, texts = load_tokenizer(place), rows(written)
    assert [row["number"] for row in texts] == list(range(len(texts)))
    assert sum(len(row["ids"]) for row in texts) == provenance["tokens"] >= 150 and len(texts) == provenance["texts"]
    for row in texts:
        assert row["text"] == tokenizer.decode(row["ids"], skip_special_tokens=True)
        assert row["prompt"] is None and row["prompt_tokens"] == 1
        assert row["ended"] == (row["ids"][-1] == 1) and (row["ended"] or len(row["ids"]) == 24)
        assert len(CONTROLS) <= row["ids"][0] < 120


def test_the_report_is_beside_the_texts_and_says_what_they_are(written):
    report = json.loads((written / "report.json").read_text())
    made = read_generated(written)
    assert report["texts"] == len(made.lengths) and report["tokens"] == len(made.ids)
    ids = set(made.ids.tolist())
    assert (
        report["vocabulary"] == len({id for id in ids if id < 120}) / 120 < len(ids) / 120
    )  # the model has 8 ids more
    assert report["problems"] == list(made.quality(range(120)).problems)
    assert any("the texts are noise" in problem for problem in report["problems"])  # of a model that was never trained


def test_greedy_texts_of_equal_settings_do_not_depend_on_the_seed_of_draws(place, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        lowbit.generate_data(place, tmp_path / name, tokens=60, seq_len=12, strategy="greedy", seed=seed)
    one, two = ({row["ids"][0]: row["ids"] for row in rows(tmp_path / name)} for name in ("one", "two"))
    both = one.keys() & two.keys()
    assert one.keys() != two.keys() and all(one[first] == two[first] for first in both)


def test_many_tokens_are_in_several_shards_in_the_order_of_their_numbers(place, tmp_path, monkeypatch):
    monkeypatch.setattr(data_generation, "shards_of", lambda table: shards_of(table, 50))
    lowbit.generate_data(place, tmp_path / "out", **ASKED)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert len(names) > 2 and names[0] == f"data-00001-of-{len(names):05d}.parquet"
    assert [row["number"] for row in rows(tmp_path / "out")] == list(range(len(rows(tmp_path / "out"))))
    assert read_generated(tmp_path / "out").ids.tolist() == [id for row in rows(tmp_path / "out") for id in row["ids"]]


def test_a_model_without_a_tokenizer_gives_ids_alone_and_says_so(place, tmp_path):
    made = lowbit.generate_data(tiny_llama(tmp_path / "model"), tmp_path / "out", tokens=40, seq_len=10)
    assert made.quality.vocabulary == len({id for row in rows(tmp_path / "out") for id in row["ids"]}) / 128
    assert "no tokenizer" in made.warnings[0] and {row["text"] for row in rows(tmp_path / "out")} == {None}


# Prompts


def test_prompts_are_completed_each_once_in_their_order(place, tmp_path):
    (tmp_path / "prompts.txt").write_text("w10 w11 w12\nw20\n\nw30 w31 w32\nw40 w41\nw50\n")
    made = lowbit.generate_data(place, tmp_path / "out", prompts=tmp_path / "prompts.txt", seq_len=12, batch=2)
    texts = rows(tmp_path / "out")
    assert [row["prompt"] for row in texts] == ["w10 w11 w12", "w20", "w30 w31 w32", "w40 w41", "w50"]
    assert [row["prompt_tokens"] for row in texts] == [3, 1, 3, 2, 1]
    for row in texts:
        assert row["text"].split() == [*row["prompt"].split(), *row["completion"].split()]
    assert made.new_tokens == sum(len(row["ids"]) - row["prompt_tokens"] for row in texts)
    sampling = json.loads((tmp_path / "out" / "provenance.json").read_text())["sampling"]
    assert (sampling["strategy"], sampling["temperature"]) == ("sampled", 0.7)


def test_prompts_are_lines_rows_or_messages_and_samples_limits_them(place, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w10 w11"}\n{"question": "w9", "text": "w12"}\n')
    rest = {"seq_len": 20, "batch": 1}
    assert prepare_data(place, tmp_path / "o", prompts=tmp_path / "rows.jsonl", **rest).prompts == ((10, 11), (12,))
    assert prepare_data(place, tmp_path / "o", prompts=["w7", "w8 w9"], samples=1, **rest).prompts == ((7,),)
    chat = [[{"role": "user", "content": "w10"}]]
    with pytest.raises(ValueError, match="prompt 1: the tokenizer has no chat template"):
        prepare_data(place, tmp_path / "o", prompts=chat, **rest)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompts": ["w9"], "tokens": 9}, "tokens is for texts without prompts"),
        ({"prompts": ["w9"], "strategy": "hybrid"}, "strategy hybrid is for texts without prompts"),
        ({"tokens": 9, "samples": 9}, "give one of them"),
        ({"tokens": 0}, "tokens is 0"),
        ({"samples": -1}, "samples is -1"),
        *(({"seq_len": length}, f"in texts of {length}, .* were asked") for length in (-1, 0, 1)),
        ({"seq_len": 10**6}, "texts of 1000000 tokens were asked; the model's context is"),
        ({"prompts": []}, "no prompt was found"),
        ({"prompts": "absent.txt"}, "absent.txt: no such file"),
        ({"prompts": ["w9 w9 w9"], "seq_len": 3}, "prompt 1 has 3 tokens"),
        ({"temperature": 0.0}, "strategy greedy"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(place, tmp_path, values, words):
    with pytest.raises(ValueError, match=words):
        prepare_data(place, tmp_path / "out", **values)


# Stopped and continued


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("point", ["add 2", "add 3", "rename 3", "rename -1", "move 1", "finish 1"])
def test_a_stopped_run_ends_in_the_bytes_of_one_that_nobody_stopped(
    place, written, tmp_path, monkeypatch, point, prompted
):
    asked = {"prompts": [f"w{i}" for i in range(20, 28)], "seq_len": 12, "batch": 3} if prompted else ASKED
    whole = tmp_path / "whole" if prompted else written
    if prompted:
        lowbit.generate_data(place, whole, **asked)
    what, count = point.split()
    calls, places = 0, {"add": Journal, "move": Journal, "finish": Journal, "rename": journals.os}
    name = {"rename": "replace"}.get(what, what)
    real = getattr(places[what], name)
    last = len(list(whole.iterdir())) + 3  # -1: among the files at the end

    def stopping(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == (int(count) if int(count) > 0 else last):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(places[what], name, stopping)
        with pytest.raises(KeyboardInterrupt):
            lowbit.generate_data(place, out, **asked)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    continued = lowbit.generate_data(place, out, **asked)
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "whole"] if prompted else ["out"])
    assert continued.new_tokens < continued.quality.tokens


def test_a_run_of_something_else_is_not_continued_unless_it_is_discarded(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lowbit.generate_data(place, out, **ASKED)
    with pytest.raises(ValueError, match=r"unfinished run of something else \(sampling differ\)"):
        lowbit.generate_data(place, out, **ASKED | {"seed": 3})
    lowbit.generate_data(place, out, **ASKED | {"seed": 3}, restart=True)
    assert json.loads((out / "provenance.json").read_text())["sampling"]["seed"] == 3
    with pytest.raises(ValueError, match="exists and is not empty"):
        lowbit.generate_data(place, out, **ASKED)


def test_a_model_that_cannot_write_leaves_nothing_behind(tmp_path):
    place = tiny_llama(tmp_path / "model")
    weights = load_file(place / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * torch.nan}, place / "model.safetensors")
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        lowbit.generate_data(place, tmp_path / "out", tokens=40, seq_len=10)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Calibration


def test_calibration_reads_the_very_ids_of_a_directory_and_of_a_shard(place, written):
    source, flat = open_model(place), [id for row in rows(written) for id in row["ids"]]
    [shard] = written.glob("*.parquet")
    for spec in (written, shard):
        made = calibration_of(source, str(spec), 4, 16)
        assert torch.cat([made.ids, made.held_out]).flatten().tolist() == flat[: 5 * 16]
        assert made.name == f"{spec.name} ({len(rows(written))} generated texts)"
        assert any("is bad data: the mean probability of the tokens is below 0.05" in each for each in made.warnings)
    assert load_text(f"{shard}:text").text == "\n\n".join(row["text"] for row in rows(written) if row["text"])
    with pytest.raises(TextError, match="generated token ids, for calibration"):
        load_text(str(written), "evaluation")
    with pytest.raises(TextError, match="too short"):
        calibration_of(source, str(written), 400, 16)


def test_windows_of_generated_text_begin_with_bos_where_the_model_was_trained_so(tmp_path):
    place = tiny_writer(tmp_path / "model", bos=True)
    lowbit.generate_data(place, tmp_path / "out", tokens=90, seq_len=20)
    flat = [id for row in rows(tmp_path / "out") for id in row["ids"]]
    assert all(row["ids"][0] == 119 for row in rows(tmp_path / "out"))
    made = calibration_of(open_model(place), str(tmp_path / "out"), 3, 16)
    assert made.ids[:, 0].tolist() == [119] * 3
    assert made.ids[:, 1:].flatten().tolist() == flat[1 : 1 + 3 * 15]


def test_a_quantized_model_is_made_from_generated_text_and_writes_more(place, written, tmp_path):
    report = lowbit.quantize(
        place,
        lowbit.recipe("gptq", bits=8, group_size=32),
        str(written),
        out=tmp_path / "packed",
        samples=4,
        seq_len=16,
    )
    assert "generated texts" in report.calibration and any("bad data" in each for each in report.warnings)
    again = lowbit.generate_data(tmp_path / "packed", tmp_path / "more", tokens=40, seq_len=12, batch=1)
    assert again.quality.tokens >= 40


def test_ids_of_another_tokenizer_are_refused(written, tmp_path):
    other = tiny_writer(tmp_path / "other", bos=True)
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    with pytest.raises(TextError, match="its token ids are of another tokenizer"):
        calibration_of(open_model(other), str(written), 2, 16)


@pytest.mark.parametrize("damage", ["lost", "changed", "cut"])
def test_a_damaged_directory_is_refused(place, written, tmp_path, damage):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(written).items():
        (copy / name).write_bytes(content)
    [shard] = copy.glob("*.parquet")
    if damage == "lost":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2 if damage == "cut" else shard.stat().st_size - 1)
    with pytest.raises(TextError, match="missing or changed since"):
        calibration_of(open_model(place), str(copy), 2, 16)


@pytest.mark.parametrize(("seq_len", "words"), [(1, "texts of 2 tokens or more"), (1000, "the model's context is 256")])
def test_lengths_that_cannot_be_are_refused_before_anything_is_made(tmp_path, seq_len, words):
    model = tiny_writer(tmp_path / "model")
    with pytest.raises(ValueError, match=words):
        lowbit.generate_data(model, tmp_path / "out", tokens=8, seq_len=seq_len)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
