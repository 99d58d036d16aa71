"""Checkpoints of every version of the native format load for ever, and mean what they meant to the code that wrote them.

``tests/data`` holds small ones, most of them written by old commits, with what these commits made of them; its README.md says
how. What has no sums in it is compared bit for bit: decoded weights, side terms, transforms, quantized inputs. Logits have
sums, whose order is the processor's, so that they are compared within :data:`TOLERANCE`.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.native import save
from lowbit.layouts import pack_qtensor
from lowbit.modules import QuantLinear

from digests import model_digests

DATA = Path(__file__).parents[2] / "data"
VERSIONS = {
    "native-v1": 1,
    "native-v1-formats": 1,
    "native-v2": 2,
    "native-v2-low-rank": 2,
    "native-v3": 3,
    "native-v3-static": 3,
}
TOLERANCE = 1e-5
"""Of the largest logit. Float32 sums in another order are off by some 1e-7 of their terms, and two blocks add up to a few times
that. The ids are such that embeddings off by 1e-6 flip no rounding and move the logits by less than this (``steady_ids`` of
``make_native.py``). In almost every layer, one changed code moves them by more."""

every_checkpoint = pytest.mark.parametrize("name", VERSIONS)


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch):
    """Compiled kernels differ from processor to processor, and from the reference by the error of their sums."""
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")


@pytest.fixture(scope="module")
def loaded():
    """Each checkpoint as ``lowbit.load`` gives it, loaded once: in the dtype that it is stored in."""
    return functools.cache(lambda name: lowbit.load(DATA / name))


def stored_description(name: str) -> dict:
    return json.loads((DATA / name / "config.json").read_text())["quantization_config"]


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors but the one without values, which keeps others from reading a checkpoint as a plain model."""
    shards = (load_file(shard) for shard in sorted(directory.glob("*.safetensors")))
    return {key: tensor for shard in shards for key, tensor in shard.items() if tensor.numel()}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        # As bytes: a NaN is equal to itself, and -0.0 is not 0.0.
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[key], tensor))
        assert torch.equal(a, b), key


@every_checkpoint
def test_the_version_is_the_one_in_the_name(name):
    assert stored_description(name)["version"] == VERSIONS[name]


@every_checkpoint
def test_every_layer_decodes_to_the_bits_that_its_writer_recorded(name, loaded):
    expected = json.loads((DATA / f"{name}.expected.json").read_text())
    assert expected.keys() == stored_description(name)["layers"].keys()
    assert model_digests(loaded(name)) == expected


@every_checkpoint
@torch.no_grad()
def test_both_loaders_give_the_same_logits_which_are_those_that_the_writer_recorded(name):
    expected = load_file(DATA / f"{name}.expected.safetensors")
    logits = lowbit.load(DATA / name, torch.float32)(expected["ids"]).logits
    by_transformers = AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.float32)(expected["ids"]).logits
    assert logits.dtype == torch.float32 and torch.equal(logits, by_transformers)
    largest = expected["logits"].abs().max().item()
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=TOLERANCE * largest)


@every_checkpoint
def test_the_description_is_written_as_it_was_read(name, loaded):
    stored = stored_description(name)
    assert json.loads(json.dumps(ModelDescription.of(loaded(name)).to_json())) == stored
    assert ModelDescription.from_json(stored) == ModelDescription.of(loaded(name))


@every_checkpoint
def test_a_loaded_model_is_saved_as_the_same_tensors_and_description(name, loaded, tmp_path):
    save(loaded(name), tmp_path / "again")
    assert_same_tensors(stored_tensors(tmp_path / "again"), stored_tensors(DATA / name))
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written == stored_description(name)


@every_checkpoint
def test_unpacked_weights_are_packed_as_the_same_tensors(name, loaded):
    stored = stored_tensors(DATA / name)
    for path, layer in loaded(name).named_modules():
        if isinstance(layer, QuantLinear):
            packed = {f"{path}.{key}": t for key, t in pack_qtensor(layer.qtensor()).items()}
            assert_same_tensors(packed, {key: stored[key] for key in packed})


@pytest.mark.parametrize("load", [lowbit.load, AutoModelForCausalLM.from_pretrained])
def test_an_unknown_version_is_refused_and_the_known_ones_are_named(load, tmp_path):
    shutil.copytree(DATA / "native-v1", tmp_path / "newer")
    config = json.loads((tmp_path / "newer" / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (tmp_path / "newer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 99 of the native format, this lowbit reads versions 1 to 8"):
        load(tmp_path / "newer")


def test_the_first_version_has_entries_that_are_a_shape_alone():
    entries = [entry for scheme in stored_description("native-v1")["schemes"] for entry in scheme["pre"]]
    assert {entry["type"] for entry in entries} == {"Permute", "Scale", "Shift"}
    shapes = [value for entry in entries for field, value in entry.items() if field != "type"]
    assert all(shape in ([32], [48]) for shape in shapes), shapes


def test_the_checkpoints_hold_every_kind_of_value_that_a_recipe_can_store():
    kinds = {kind for name in VERSIONS for kind in re.findall(r'"type": "(\w+)"', json.dumps(stored_description(name)))}
    grids = {"BinaryCoded", "Codebook", "Float", "Int", "OutlierVictim", "Table"}
    granularities = {
        "Block",
        "Flat",
        "PerChannel",
        "PerCluster",
        "PerGroup",
        "PerInput",
        "PerTensor",
        "PerToken",
        "RowBands",
    }
    transforms = {"Kronecker", "Permute", "RandomHadamard", "Reassembly", "Scale", "Shift"}
    sides = {"KeptColumns", "LowRank", "Sparse"}
    assert kinds == grids | granularities | transforms | sides | {"ActSpec", "AttentionSpec", "Spec"}


@every_checkpoint
def test_a_checkpoint_is_small(name):
    files = [*(DATA / name).iterdir(), *DATA.glob(f"{name}.expected.*")]
    assert sum(file.stat().st_size for file in files) < 200_000
