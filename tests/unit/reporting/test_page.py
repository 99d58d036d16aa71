"""The page: what is on it, that it harms nobody, and that it needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.numerics import to_dict
from lowbit.recipes.files import from_plain
from lowbit.reporting import Page, make_page, page, read_sources, write_report
from lowbit.reporting.comparisons import comparison_sections, front
from lowbit.reporting.runs import error_map, run_section

from measurements import CURVE, GPTQ, HOSTILE, RECORDS, record, write_all, write_lines


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    return write_all(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def made(files) -> Page:
    return make_page(read_sources(files), HOSTILE)


@pytest.fixture(scope="module")
def html(made) -> str:
    return made.html()


class Elements(HTMLParser):
    """Tags with their attributes, and the texts of tables' cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


# What is on it


def test_every_kind_of_file_has_its_section_and_its_figures(made):
    titles = {section.title: [picture.title for picture in section.pictures] for section in made.sections}
    landscape = ["Largest magnitude of each channel", "Largest magnitude of a token", "Error by layer and block"]
    assert list(titles.values()) == [
        ["Size against quality"],
        ["Error by layer and block", "Error behind each block"],
        ["Loss"],
        landscape,
        landscape,
        ["Largest channel over the median channel"],
        ["Bits against divergence", "Time for a token"],
        [],
        [],
    ]
    assert len(made.files.rows) == 8


def test_the_front_has_the_best_of_every_size_and_no_other():
    assert front([(4, 3.0), (2, 9.0), (3, 3.5), (4, 2.9), (5, 2.9), (3, 4.0)]) == [1, 2, 3]


def test_size_against_quality_counts_everything_stored_and_leaves_out_only_what_is_broken():
    [section] = comparison_sections([{"file": "r", **each} for each in RECORDS])
    [picture] = section.pictures
    rows = {row[0]: row[1:] for row in picture.table.rows}
    assert picture.table.columns[1] == "bits a weight of the whole model"
    assert set(rows) == {"large", "small", "worse and larger", HOSTILE}
    assert [name for name, row in rows.items() if row[2]] == ["large", "small", HOSTILE]
    assert "1 broken rows are not shown" in picture.summary
    assert {row[0] for row in section.tables[0].rows} == {each["label"] for each in RECORDS}


def test_without_bits_of_the_whole_model_weight_files_are_the_size():
    rows = [{"file": "r", **record("a", perplexity=3.0, bytes=2 * 10**6)}]
    [section] = comparison_sections(rows)
    assert section.pictures[0].table.rows == (("a", "2", "3", "yes"),)


def test_models_and_texts_that_differ_are_compared_in_sections_of_their_own():
    other = record("a", perplexity=1.0)
    other["protocol"] = other["protocol"] | {"sha256": "e" * 64}
    sections = comparison_sections([{"file": "r", **each} for each in (record("a", perplexity=1.0), other)])
    assert [len(section.tables[0].rows) for section in sections] == [1, 1]


def test_the_recipe_of_a_row_is_a_recipe_file_and_its_commands_name_what_it_was_made_of():
    [section] = comparison_sections([{"file": "r", **record("a", perplexity=1.0)}])
    [entry] = section.entries
    assert to_dict(from_plain(yaml.safe_load(entry.recipe))) == GPTQ
    assert entry.commands == (
        "lowbit quantize tiny --recipe recipe.yaml --calibration cal.txt --samples 32 --seq-len 512 -o DIR",
        "lowbit evaluate DIR --text text.txt --protocol gptq --windows 20 --seq-len 1024 --against tiny",
    )
    assert section.tables[0].links == (entry.link,)


def test_commands_on_the_page_are_commands():
    [section] = comparison_sections([{"file": "r", **each} for each in RECORDS[:2]])
    for words in (command.split() for entry in section.entries for command in entry.commands):
        options = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "300"}).stdout
        assert all(f" {word} " in options for word in words if word.startswith("--")), words


def test_the_error_map_shows_the_worst_layer_of_a_role_in_a_block():
    layers = [
        {"name": f"model.layers.{block}.mlp.experts.{i}.up", "role": "up", "error": error}
        for block, i, error in ((0, 0, 0.1), (0, 1, 0.3), (1, 0, 0.0), (1, 1, None), (2, 0, float("nan")))
    ]
    picture = error_map("x", [*layers, {"name": "lm_head", "role": "head", "error": 0.5}])
    assert picture is not None
    assert picture.table.rows == (("up", "0", "0.3"), ("up", "1", "0"))
    assert "model.layers.0.mlp.experts.1.up: 0.3" in picture.svg


def test_layers_of_a_checkpoint_are_those_of_its_report(made, files):
    section = made.sections[1]
    assert len(section.tables[1].rows) == 14 and section.title == "Checkpoint packed"
    [entry] = section.entries
    assert from_plain(yaml.safe_load(entry.recipe)).name == "rtn"
    assert {"model", "lowbit", "torch"} <= {name for name, _ in entry.facts}
    assert entry.commands == (
        "lowbit quantize MODEL --recipe recipe.yaml --calibration 'token ids' --samples 4 --seq-len 16 -o DIR",
    )


# That it harms nobody


def test_a_checkpoint_without_quantized_layers_has_no_table_of_layers(files):
    (report,) = read_sources([files[1]]).runs.values()
    assert len(run_section(1, "a", report).tables) == 2
    bare = run_section(1, "a", report | {"layers": [], "block_errors": []})
    assert [table.title for table in bare.tables] == ["a: what was measured"]


def test_nothing_that_a_file_says_becomes_markup(html):
    elements = Elements(html)
    assert [tag for tag, _ in elements.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert "onerror" not in {name for _, attributes in elements.tags for name in attributes}
    assert "<img" not in html and HOSTILE in elements.texts


def test_figures_show_names_as_they_are_and_read_no_formulas(made):
    [cache] = [section for section in made.sections if section.title.startswith("Caches")]
    assert "$a_b$" in cache.pictures[0].svg


def test_the_page_loads_nothing_and_runs_only_its_own_script(html):
    elements = Elements(html)
    assert not [tag for tag, _ in elements.tags if tag in ("link", "iframe", "object")]
    sources = [attributes.get(key) or "" for _, attributes in elements.tags for key in ("src", "href", "xlink:href")]
    assert all(each == "" or each.startswith(("#", "data:image/png")) for each in sources)
    [policy] = [a["content"] for tag, a in elements.tags if tag == "meta" and a.get("http-equiv")]
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_every_id_is_there_once_and_every_link_leads_to_one(html):
    elements = Elements(html)
    ids = [attributes["id"] for tag, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] or "" for tag, attributes in elements.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', html))
    assert used <= set(ids)


# The file


def test_the_same_files_give_the_same_bytes(files, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(files[:1] + files[2:3], tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_page_that_is_too_large_is_refused_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"over the limit of 1,000: .*\(r.jsonl\)"):
        write_report([write_lines(tmp_path / "r.jsonl", CURVE)], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(("form", "words"), [("--latex", r"\begin{tabular}"), ("--markdown", "| 512 |")])
def test_the_command_prints_every_table(tmp_path, form, words):
    file = write_lines(tmp_path / "r.jsonl", CURVE)
    result = CliRunner().invoke(app, ["report", str(file), form])
    assert result.exit_code == 0 and words in result.stdout


def test_the_command_writes_the_page_and_refuses_what_it_cannot_write(tmp_path):
    file = write_lines(tmp_path / "r.jsonl", RECORDS)
    written = CliRunner().invoke(app, ["report", str(file), "-o", str(tmp_path / "r.html"), "--title", "Mine"])
    assert written.exit_code == 0 and "<h1>Mine</h1>" in (tmp_path / "r.html").read_text()
    for arguments, words in (
        ([str(file)], "give -o FILE.html"),
        ([str(file), "-o", str(tmp_path / "r.pdf")], "ends in .html"),
        ([str(file), "-o", str(tmp_path / "no" / "r.html")], "is not a directory"),
    ):
        refused = CliRunner().invoke(app, ["report", *arguments])
        assert refused.exit_code != 0 and words in " ".join(refused.stderr.split())
