"""export: a checkpoint written again in a file format, streamed, whole or not at all; formats are classes in a list."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoints import formats, native
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.native import file_format
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel, UsualAnswers
from lowbit.cli import app
from lowbit.modules import QuantLinear
from lowbit.plan import plan

from helpers import random_ids, tiny_llama
from matrix import save_model

RECIPES = {
    "plain": ("rtn", {"group_size": 16}),
    "rotated": ("quarot", {}),
    "outliers": ("spqr", {}),
    "attention": ("smoothquant", {"level": "O3", "attention_bits": 8}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint by each recipe, with files as a tokenizer leaves them."""
    place = tmp_path_factory.mktemp("export")
    tiny_llama(place / "model")
    for kind, (name, options) in RECIPES.items():
        lowbit.quantize(place / "model", lowbit.recipe(name, **options), random_ids(4, 32), out=place / kind)
        (place / kind / "tokenizer.json").write_text("{}")
        (place / kind / "additional_chat_templates").mkdir()
        (place / kind / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    return place


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def all_files(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.suffix != ".safetensors"}


@pytest.mark.parametrize("kind", RECIPES)
@torch.no_grad()
def test_a_native_export_holds_the_same_bits_and_gives_the_same_logits(made, kind, tmp_path):
    report = lowbit.export(made / kind, "native", out=tmp_path / "out")
    before, after = tensors_of(made / kind), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert (tmp_path / "out/config.json").read_bytes() == (made / kind / "config.json").read_bytes()
    assert all_files(tmp_path / "out") == all_files(made / kind)
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "{{ x }}"
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert (report.layers, report.format, report.out) == (14, "native", tmp_path / "out")
    ids = random_ids(1, 16, seed=3)
    assert torch.equal(lowbit.load(made / kind)(ids).logits, lowbit.load(tmp_path / "out")(ids).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_experts_taken_apart_are_exported_too(tmp_path):
    save_model("mixtral", tmp_path / "model")
    lowbit.quantize(tmp_path / "model", lowbit.recipe("rtn", group_size=16), None, out=tmp_path / "q")
    lowbit.export(tmp_path / "q", out=tmp_path / "again")
    assert (tmp_path / "q/config.json").read_bytes() == (tmp_path / "again/config.json").read_bytes()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(lowbit.load(tmp_path / "q")(ids).logits, lowbit.load(tmp_path / "again")(ids).logits)


def test_an_export_holds_one_layer_and_one_shard_at_a_time(tmp_path, monkeypatch):
    tiny_llama(tmp_path / "model", blocks=8, vocab_size=32)
    lowbit.quantize(tmp_path / "model", lowbit.recipe("rtn", group_size=16), None, out=tmp_path / "q")
    tensors, real = tensors_of(tmp_path / "q"), file_format.read_tensor
    layers = native.read_checkpoint(tmp_path / "q").description.layers.values()
    largest = max(*(layer.nbytes for layer in layers), *(t.nbytes for t in tensors.values()))
    limit, live, most, read = 12_000, 0, 0, []

    def counted(header):
        nonlocal live, most
        tensor = real(header)
        live += header.nbytes
        most = max(most, live)
        read.append(header)
        weakref.finalize(tensor, freed, header.nbytes)
        return tensor

    def freed(count):
        nonlocal live
        live -= count

    monkeypatch.setattr(file_format, "read_tensor", counted)
    (tmp_path / "out").mkdir()
    native.Native(shard_bytes=limit).write(native.Native().read(tmp_path / "q"), tmp_path / "out")
    # A full shard, the layer that was read last, and the one that is being read.
    assert most <= limit + 2 * largest < sum(t.nbytes for t in tensors.values()) / 3
    assert (
        len(read) == sum(t.numel() > 0 for t in tensors.values())
        and len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    )
    native.load(tmp_path / "out")


def test_the_stream_gives_each_layer_whole_before_the_next_is_read(made, monkeypatch):
    read = []
    real = file_format.read_tensor
    monkeypatch.setattr(file_format, "read_tensor", lambda header: (read.append(header), real(header))[1])
    model = native.Native().read(made / "outliers")
    count = 0
    for part in model.parts():
        count += len(part.named_tensors())
        assert len(read) == count
        if isinstance(part, PackedLayer):
            layout = part.description.layout()
            assert {n: (tuple(t.shape), t.dtype) for n, t in part.tensors.items()} == layout
    assert sum(isinstance(part, PackedLayer) for part in model.parts()) == 14


# Refusals


def test_what_cannot_be_exported_is_refused_before_anything_is_written(made, tmp_path):
    with pytest.raises(ValueError, match=r"unknown format 'natve' \(did you mean 'native'\?\)"):
        lowbit.export(made / "plain", "natve", out=tmp_path / "out")
    with pytest.raises(ValueError, match="model: nothing is packed in it, and native format holds packed models only"):
        lowbit.export(made / "model", out=tmp_path / "out")
    with pytest.raises(ValueError, match="no such directory"):
        lowbit.export(tmp_path / "nowhere", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"cannot be written as GPTQ format: .*outliers in half precision"):
        lowbit.export(made / "outliers", "gptq", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"layers keep rotations of inputs, .* no other rotation folds all of them"):
        lowbit.export(made / "rotated", "gguf", out=tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty; nothing is overwritten"):
        lowbit.export(made / "plain", out=made / "rotated")
    (tmp_path / "taken.partial").mkdir()
    with pytest.raises(ValueError, match=r"taken.partial exists: a run or an export did not finish there"):
        lowbit.export(made / "plain", out=tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.partial"]


def test_an_export_that_fails_leaves_nothing(made, tmp_path, monkeypatch):
    def fail(header):
        seen.append(header)
        if len(seen) > 20:
            raise KeyboardInterrupt
        return real(header)

    real, seen = file_format.read_tensor, []
    monkeypatch.setattr(file_format, "read_tensor", fail)
    with pytest.raises(KeyboardInterrupt):
        lowbit.export(made / "plain", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused(made, tmp_path):
    damaged = Path(shutil.copytree(made / "plain", tmp_path / "damaged"))
    shard = sorted(damaged.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(".codes"))
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} is torch.uint8"):
        lowbit.export(damaged, out=tmp_path / "out")


# Plans and exports agree


@pytest.mark.parametrize("kind", RECIPES)
def test_a_plan_answers_what_an_export_of_the_result_answers(made, kind, tmp_path):
    name, options = RECIPES[kind]
    answers = plan(made / "model", lowbit.recipe(name, **options)).compatibility
    for each in formats.FORMATS:
        if answers[each.title].startswith("yes: "):
            lowbit.export(made / kind, each.name, out=tmp_path / each.name)
            continue
        with pytest.raises(ValueError, match="cannot be written as") as refusal:
            lowbit.export(made / kind, each.name, out=tmp_path / each.name)
        assert answers[each.title].removeprefix("no: ") in str(refusal.value)


def test_biases_that_the_class_does_not_have_are_a_reason(tmp_path):
    model = tiny_llama(tmp_path / "model")
    recipe = lowbit.recipe("omniquant", activation_bits=8, epochs=1)
    lowbit.quantize(model, recipe, random_ids(4, 32), out=tmp_path / "q")
    with pytest.raises(ValueError, match="layers have biases that the model's class does not have"):
        lowbit.export(tmp_path / "q", "compressed-tensors", out=tmp_path / "out")


# A format of one's own: a class, and a line in the list


class Listing(UsualAnswers):
    """A file for each packed layer with its decoded weight, and one for everything else."""

    name = "listing"
    title = "listing of decoded weights"

    def why_not(self, description: ModelDescription, new_biases: Collection[str] = (), config=None) -> str | None:
        acts = any(layer.act is not None for layer in description.layers.values())
        return "it is for weights only" if acts else None

    def write(self, model: PackedModel, directory: Path) -> None:
        rest = {}
        for part in model.parts():
            if isinstance(part, PackedLayer):
                layer = QuantLinear(part.description, part.tensors)
                save_file({"weight": layer.effective_weight()}, directory / f"{part.name}.safetensors")
            else:
                rest |= part.named_tensors()
        save_file(rest, directory / "rest.safetensors")

    def read(self, directory: Path) -> PackedModel:
        raise NotImplementedError


def test_a_new_format_is_a_class_and_a_line(made, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS, Listing()])
    lowbit.export(made / "outliers", "listing", out=tmp_path / "out")
    model = lowbit.load(made / "outliers")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert {file.stem for file in (tmp_path / "out").iterdir()} == {*layers, "rest"}
    for name, layer in layers.items():
        assert torch.equal(load_file(tmp_path / f"out/{name}.safetensors")["weight"], layer.effective_weight())
    with pytest.raises(ValueError, match="cannot be written as listing of decoded weights: it is for weights only"):
        lowbit.export(made / "rotated", "listing", out=tmp_path / "other")
    assert plan(made / "model", "rtn").compatibility[Listing.title] == "yes: lowbit export DIR --format listing"


# The command


def run(*arguments: str):
    return CliRunner().invoke(app, ["export", *arguments])


def test_the_command_writes_and_reports(made, tmp_path):
    result = run(str(made / "plain"), "--format", "native", "-o", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report == {
        "out": str(tmp_path / "out"),
        "format": "native",
        "layers": 14,
        "note": None,
        "bytes": sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file()),
    }
    result = run(str(made / "plain"), "-o", str(tmp_path / "other"))
    assert result.exit_code == 0 and "14 packed layers in format native" in result.stdout


def test_the_command_says_in_a_line_what_is_wrong(made, tmp_path):
    result = run(str(made / "plain"), "--format", "natve", "-o", str(tmp_path / "out"))
    assert result.exit_code == 1 and "error: unknown format 'natve' (did you mean 'native'?)" in result.stderr
    result = run(str(made / "plain"), "-o", str(made / "rotated"))
    assert result.exit_code == 1 and "nothing is overwritten" in result.stderr
    assert run("--help").stdout.count("lowbit export smollm2-w4 --format native") == 1


# Descriptions of whole models


def test_the_version_is_the_oldest_that_says_everything(made):
    versions = {}
    for kind in RECIPES:
        data = json.loads((made / kind / "config.json").read_text())["quantization_config"]
        description = ModelDescription.from_json(data)
        assert description.to_json() == data
        versions[kind] = description.version
    assert versions == {"plain": 1, "rotated": 3, "outliers": 2, "attention": 3}


def test_a_model_without_packed_layers_has_no_description():
    with pytest.raises(ValueError, match="no layer is quantized"):
        ModelDescription.of(nn.Linear(2, 2)).to_json()
    assert native.Native().why_not(ModelDescription.of(nn.Linear(2, 2))) == "nothing is quantized"
