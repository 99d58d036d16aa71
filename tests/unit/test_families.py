"""Families of models that are not like llama: quantized as docs/families.md says, or refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lowbit
from families import FAMILIES, PAGE, error_of, ids, save_model
from lowbit.report import BrokenModel

CASES = {  # a method each, of all three
    "jamba": "gptq",
    "nemotron_h": "rtn",
    "zamba2": "rtn",
    "rwkv": "awq",
    "gemma4": "awq",
    "gpt_oss": "rtn",
}
RTN = lowbit.recipe("rtn", bits=8, group_size=16)


@pytest.mark.parametrize("family", CASES)
def test_a_family_that_works_gives_the_logits_of_the_original(tmp_path, family):
    original = save_model(family, tmp_path / "model")
    assert error_of(CASES[family], original, tmp_path / "model", tmp_path / "q") < 0.05


def test_the_page_has_a_line_for_every_family_and_none_failed():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("* ")]
    assert [line.split(": ")[0] for line in lines] == [f"* {family}" for family in FAMILIES]
    outcomes = (": works (", ": weights only (", ": refused: ", ": transformers ")
    assert all(any(outcome in line for outcome in outcomes) for line in lines)
    assert all(f"* {family}: works" in PAGE.read_text() for family in CASES)


@pytest.mark.parametrize(
    "family", ["gemma3 (images)", "qwen3_vl (images)"]
)  # with and without a table of the text model
def test_the_text_of_a_model_with_images_is_quantized_and_the_rest_kept(tmp_path, family):
    model, out = tmp_path / "model", tmp_path / "q"
    original = save_model(family, model)
    companions = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
    for name in (*companions, "chat_template.jinja", "pytorch_model.bin", "modeling.py"):
        (model / name).write_text(json.dumps({"of": name}))
    report = lowbit.quantize(model, RTN, ids(2, 16, 1), out=out)
    assert report.coverage == 1.0 and {layer.name.split(".layers")[0] for layer in report.layers} == {
        "model.language_model"
    }
    assert {p.name for p in out.iterdir()} & {"pytorch_model.bin", "modeling.py"} == set()
    assert all((out / name).read_text() == (model / name).read_text() for name in (*companions, "chat_template.jinja"))
    kept = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items() if "vis" in k}
    assert kept and all(torch.equal(value, original.state_dict()[name]) for name, value in kept.items())
    x = ids(1, 8, 2)
    loaded: Any
    for loaded in (lowbit.load(out), AutoModelForImageTextToText.from_pretrained(out).eval()):
        assert isinstance(loaded, type(original))
        assert loaded.generate(input_ids=x, max_new_tokens=3, do_sample=False).shape == (1, 11)
    if "pixel_values" in original.forward.__code__.co_varnames and family.startswith("gemma3"):
        seen = {
            "input_ids": torch.tensor([[2, 126, 127, 127, 127, 127, 125, 9]]),
            "pixel_values": torch.randn(1, 3, 28, 28),
        }
        with torch.no_grad():
            wanted, found = original(**seen).logits, lowbit.load(out)(**seen).logits
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_text_model_named_by_its_checkpoint_is_loaded_as_that(tmp_path):
    save_model("llama4 (text)", tmp_path / "model")
    lowbit.quantize(tmp_path / "model", RTN, None, out=tmp_path / "q")
    assert type(lowbit.load(tmp_path / "q")).__name__ == "Llama4ForCausalLM"


def test_matrices_that_no_linear_holds_are_counted_and_few_linears_refused(tmp_path):
    save_model("jetmoe", tmp_path / "model")
    with pytest.raises(
        BrokenModel, match=r"only \d% of the blocks' weights .* the largest of them mlp.input_linear.weight"
    ):
        lowbit.quantize(tmp_path / "model", RTN, None, out=tmp_path / "q")
    assert not Path(tmp_path / "q.partial").exists()
    report = lowbit.quantize(tmp_path / "model", RTN, None, out=tmp_path / "q", allow_broken=True)
    assert report.coverage < 0.1 and any("only" in problem for problem in report.problems)


def test_blocks_that_need_keys_of_earlier_blocks_are_refused_with_text_only(tmp_path):
    save_model("gemma4 (shared keys)", tmp_path / "model")
    with pytest.raises(ValueError, match="blocks 2 to 3 attend to keys and values of earlier blocks"):
        lowbit.quantize(tmp_path / "model", RTN, ids(2, 16, 1), out=tmp_path / "q")
    assert lowbit.quantize(tmp_path / "model", RTN, None, out=tmp_path / "q").coverage > 0.9
