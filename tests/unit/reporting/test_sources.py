"""Files are told apart by what is in them, and what is not understood is refused."""

from __future__ import annotations

import json

import pytest

from lowbit.reporting import SourceError, read_sources

from measurements import CACHES, CURVE, RECORDS, SAMPLES, TABLE, record, write_lines


def test_every_kind_of_json_is_told_apart_by_its_content(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CACHES))
    (tmp_path / "b.json").write_text(json.dumps(TABLE))
    (tmp_path / "mine.json").write_text(json.dumps({"prompt": "The sky\nis", "text": "grey"}))
    for name, rows in (("c", CURVE), ("r", RECORDS), ("s", SAMPLES), ("t", [{"method": "rtn", "seconds": [1, 2]}])):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    sources = read_sources([tmp_path])
    assert [each["label"] for each in sources.records] == [each["label"] for each in RECORDS]
    assert sources.curves == {"c.jsonl": CURVE} and list(sources.caches) == ["a.json"]
    assert [sample.answers["mine"] for sample in sources.samples] == ["grey"]  # beside the others' of the same prompt
    assert set(sources.samples[0].answers) == {"original", "packed", "mine"}
    assert [table.columns for table in sources.tables["b.json"]] == [("model", "bits", "ms"), ("", "value")]
    assert sources.tables["t.jsonl"][0].rows == (("rtn", "1, 2"),)
    assert len(sources.files) == 7 and all(len(sha256) == 64 for _, sha256, _ in sources.files)


def test_trainings_have_a_table_of_their_figures_and_a_course_each(tmp_path):
    rows = [
        {"label": "a", "recipe": {"name": "x"}, "bits": 2.3, "curve": CURVE},
        {"label": "b", "bits": 4.0, "curve": []},
    ]
    sources = read_sources([write_lines(tmp_path / "t.jsonl", rows)])
    assert sources.curves == {"t.jsonl: a": CURVE}
    [table] = sources.tables["t.jsonl"]
    assert (table.columns, table.rows) == (("label", "bits"), (("a", "2.3"), ("b", "4")))
    write_lines(tmp_path / "t.jsonl", [{"label": "a", "curve": [{"step": 0}]}])
    with pytest.raises(SourceError, match=r"curve\[0\]: expected an object with step, tokens, loss"):
        read_sources([tmp_path / "t.jsonl"])


def test_rows_with_tasks_and_without_are_other_rows(tmp_path):
    asked = record("a", perplexity=2.0)
    asked["protocol"] = asked["protocol"] | {"tasks": {"piqa": {"items": 10, "sha256": "e" * 64}}}
    assert len(read_sources([write_lines(tmp_path / "r.jsonl", [record("a", perplexity=1.0), asked])]).records) == 2


def test_answers_of_an_evaluation_stand_beside_the_originals_and_its_figures_stay(tmp_path):
    answers = [{"prompt": "a?", "original": "yes", "model": "no", "diverges_at": 0}]
    (tmp_path / "w2.json").write_text(json.dumps({"chat": {"kl": 0.5, "answers": answers}}))
    sources = read_sources([tmp_path / "w2.json"])
    assert sources.samples[0].answers == {"original": "yes", "w2": "no"}
    assert sources.tables["w2.json"][0].rows == (("chat: kl", "0.5"),)
    (tmp_path / "w2.json").write_text(json.dumps({"chat": {"answers": [{"prompt": "a?"}]}}))
    with pytest.raises(SourceError, match=r"chat.answers\[0\]: expected an object with prompt, original, model"):
        read_sources([tmp_path / "w2.json"])


def test_the_last_record_with_figures_counts_and_a_torn_line_does_not(tmp_path):
    rows = [
        record("a", perplexity=1.0),
        record("b", error="no memory"),
        record("a", error="later"),
        record("b", perplexity=2.0),
    ]
    file = write_lines(tmp_path / "r.jsonl", rows)
    file.write_text(file.read_text() + '{"label": "torn')
    assert [(each["label"], each["perplexity"]) for each in read_sources([file]).records] == [("a", 1.0), ("b", 2.0)]
    assert file.read_text().endswith("torn")  # reading changes no file


def test_a_last_record_without_an_end_of_line_is_a_record(tmp_path):
    file = write_lines(tmp_path / "r.jsonl", [record("a", perplexity=1.0), record("b", perplexity=2.0)])
    file.write_text(file.read_text().rstrip("\n"))
    assert [each["label"] for each in read_sources([file]).records] == ["a", "b"]


def test_rows_that_were_calibrated_on_other_text_are_other_rows(tmp_path):
    other = record("a", perplexity=2.0)
    other["calibration"] = other["calibration"] | {"sha256": "d" * 64}
    file = write_lines(tmp_path / "r.jsonl", [record("a", perplexity=1.0), other])
    assert len(read_sources([file]).records) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "found a JSON list"),
        ("a.json", "{}", "an empty object"),
        (
            "a.jsonl",
            '{"label": "a", "ms": 1}\n{"text": "once", "id": 3}\n',
            "line 2: found text, id; expected results of",
        ),
        (
            "a.jsonl",
            '{"method": "rtn", "good": true}\n',
            "line 1: found method, good; expected results of `lowbit compare`",
        ),
        ("a.jsonl", "{}\n", "line 1: found an empty object"),
        ("a.jsonl", '{"a": 1}\n[2]\n', "line 2: found a list"),
        ("a.jsonl", '{"a": 1}\n{oops\n', "line 2: not JSON"),
        ("a.jsonl", '{"a": 1', "no whole line"),
        ("a.jsonl", '{"prompt": "a", "answers": "b"}\n', "line 1: expected"),
        (
            "a.jsonl",
            json.dumps(record("a") | {"model": "tiny"}) + "\n",
            "record 1: model: expected an object with name and sha256",
        ),
        ("a.jsonl", json.dumps(record("a") | {"kl": "0.5"}) + "\n", "record 1: kl: expected a number"),
        ("a.jsonl", json.dumps(record("a") | {"perplexity": -3.0}) + "\n", "perplexity: expected at least 1"),
        ("a.jsonl", json.dumps(record("a") | {"bytes": -1}) + "\n", "bytes: expected at least 0"),
        ("a.jsonl", json.dumps(record("a") | {"kl_interval": [1]}) + "\n", "kl_interval: expected two numbers"),
        ("a.jsonl", json.dumps(record("a") | {"recipe": [1]}) + "\n", "recipe: expected an object or null"),
        ("a.jsonl", json.dumps(record("a") | {"tasks": 3}) + "\n", "tasks: expected an object"),
        ("a.jsonl", json.dumps(record("a") | {"versions": [1]}) + "\n", "versions: expected an object"),
        ("a.jsonl", json.dumps(record("a") | {"warnings": 5}) + "\n", "warnings: expected a list of texts"),
        ("a.jsonl", json.dumps(record("a") | {"problems": "bad"}) + "\n", "problems: expected a list of texts"),
        ("a.jsonl", json.dumps(record("a") | {"error": 1}) + "\n", "error: expected a text"),
        (
            "a.jsonl",
            json.dumps(record("a") | {"calibration": {"sha256": "0"}}) + "\n",
            "calibration: expected an object with text, windows, tokens, sha256",
        ),
        (
            "a.json",
            json.dumps({"recipe": {}, "layers": [{"name": 1}], "block_errors": [], "bits_per_weight": 4}),
            "layers[0]",
        ),
        ("a.json", json.dumps({"quality": 1, "speed": []}), "quality: expected a list, found '1'"),
        ("inspection.json", json.dumps({"inputs": [], "layers": [], "rules": {}}), "expected an object with model"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_name(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError) as error:
        read_sources([tmp_path / name])
    assert words in str(error.value) and name in str(error.value)


def test_what_is_missing_empty_or_binary_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no such file or directory"):
        read_sources([tmp_path / "missing"])
    with pytest.raises(SourceError, match=r"no \.json and no \.jsonl"):
        read_sources([tmp_path])
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="byte 0"):
        read_sources([tmp_path / "a.json"])
