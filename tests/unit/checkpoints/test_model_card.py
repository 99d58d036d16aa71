"""A checkpoint's directory is what a hub takes: files, front matter, and how the model is run in each engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

import lowbit
from lowbit.checkpoints.model_card import write_card

from helpers import tiny_writer

RECIPE = lowbit.recipe("rtn", bits=4, group_size=32)
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "lowbit-report.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model with a card and a chat template, and its checkpoint in ``q``."""
    place = tmp_path_factory.mktemp("card")
    tiny_writer(place / "model")
    (place / "model" / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: some/where\ntags: [theirs]\n---\n# A model\n"
    )
    (place / "model" / "chat_template.jinja").write_text("{{ messages }}")
    lowbit.quantize(place / "model", RECIPE, None, out=place / "q", max_kl=50)
    return place


def card(directory: Path) -> str:
    return (directory / "README.md").read_text()


def test_the_directory_holds_what_a_hub_shows_and_nothing_of_this_machine(place):
    assert {file.name for file in (place / "q").iterdir()} == FILES | {"chat_template.jinja"}
    for file in (place / "q").glob("*[nd]"):  # .json and .md
        assert str(place) not in file.read_text()


def test_the_front_matter_is_what_a_hub_reads(place):
    data = ModelCard(card(place / "q")).data
    assert (data.library_name, data.pipeline_tag, data.license, data.language) == (
        "transformers",
        "text-generation",
        "apache-2.0",
        ["en"],
    )
    assert data.base_model == "some/where" and data.to_dict()["base_model_relation"] == "quantized"
    validate_repo_id(data.base_model)
    assert data.tags == ["lowbit", "quantized", "4-bit", "conversational"]


def test_an_origin_without_an_id_on_a_hub_is_left_out(place, tmp_path):
    (tmp_path / "original").mkdir()
    told = json.loads((place / "q" / "lowbit-report.json").read_text())
    write_card(tmp_path, told, told["header"], "my-model", tmp_path / "original")
    front = yaml.safe_load(card(tmp_path).split("---\n")[1])
    assert "base_model" not in front and "base_model_relation" not in front and "license" not in front


def test_the_card_says_how_each_engine_runs_it_and_what_it_costs(place):
    told = json.loads((place / "q" / "lowbit-report.json").read_text())
    for word in (
        "from_pretrained",
        "lowbit serve",
        "vllm serve",
        "--format gguf",
        f"{told['bytes']:,}",
        f"{told['kl']:.4f}",
    ):
        assert word in card(place / "q"), word


def test_an_exported_checkpoint_says_how_its_own_files_are_run(place, tmp_path):
    lowbit.export(place / "q", "compressed-tensors", out=tmp_path / "out")
    before, after = card(place / "q"), card(tmp_path / "out")
    assert "pip install compressed-tensors" in after and "import lowbit" not in after
    assert "compressed-tensors" in ModelCard(after).data.tags
    assert before.partition("## What it costs")[2] == after.partition("## What it costs")[2] != ""


def test_transformers_alone_refuses_the_checkpoint_as_the_card_says(place):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(place / 'q')!r})"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "mismatched" in done.stderr
