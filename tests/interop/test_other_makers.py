"""Whole models that llm-compressor and GPTQModel quantize: loaded here, their weights are what their own readers decode, and they compute the same.

Each tool has an environment of its own: LOWBIT_LLM_COMPRESSOR_PYTHON and LOWBIT_GPTQMODEL_PYTHON are interpreters that have it
(``pip install llmcompressor``, ``pip install gptqmodel``). The model is the first blocks of the demo's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import lowbit
from lowbit.checkpoints.locate import locate
from lowbit.data import tokenize, windows
from lowbit.modules import QuantLinear
from lowbit.texts import load_text

pytestmark = pytest.mark.slow
BLOCKS = 4
PYTHONS = {"llm-compressor": "LOWBIT_LLM_COMPRESSOR_PYTHON", "gptqmodel": "LOWBIT_GPTQMODEL_PYTHON"}
KINDS = [
    *(f"llm-compressor:{kind}" for kind in ("w4-sym", "w4-zero", "w8-sym", "awq", "fp8")),
    *(f"gptqmodel:{kind}" for kind in ("w4", "w4-act", "w8", "w4-awq")),
]
SETTINGS = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}  # GPTQModel compiles its layers, which takes minutes
PERPLEXITY = 2e-3  # of the two readers, relative


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The first blocks of the demo's model."""
    try:
        whole = locate("smollm2-135m")[1]
    except ValueError as error:
        pytest.skip(f"the demo's model is not here: {error}")
    place = tmp_path_factory.mktemp("cut")
    for file in whole.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, place)
    config = json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": BLOCKS}
    config.pop("layer_types", None)
    (place / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor for file in whole.glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = {name: t for name, t in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < BLOCKS}
    save_file(kept, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(scope="module")
def ids(model, tmp_path_factory) -> Path:
    tokens = tokenize(load_text("python-docs").text, lowbit.load_tokenizer(model))
    cut = windows(tokens, 128, 20)
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"calibration": cut[:16].clone(), "evaluation": cut[16:].clone()}, file)
    return file


@torch.no_grad()
@pytest.mark.parametrize("maker", KINDS)
def test_a_model_of_another_maker_has_the_weights_and_the_perplexity_that_its_own_reader_gives(
    tmp_path, model, ids, maker
):
    variable = PYTHONS[maker.split(":")[0]]
    if variable not in os.environ:
        pytest.skip(f"{variable} names no interpreter with {maker.split(':')[0]}")
    side = Path(__file__).with_name("makers_side.py")
    command = [os.environ[variable], str(side), maker, str(model), str(ids), str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | SETTINGS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    theirs = load_file(tmp_path / "read.safetensors")
    ours = lowbit.load(tmp_path / "model", dtype=torch.float32)
    packed = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QuantLinear)}
    expected = {name.removeprefix("weight."): weight for name, weight in theirs.items() if name.startswith("weight.")}
    assert len(packed) == 7 * BLOCKS and packed.keys() == expected.keys()
    for name, layer in packed.items():
        assert torch.equal(layer.dequantize().to(expected[name].dtype), expected[name]), name
    evaluation = load_file(ids)["evaluation"]
    here, there = (_loss(logits, evaluation) for logits in (ours(evaluation).logits, theirs["logits"]))
    assert abs(math.expm1(here - there)) < PERPLEXITY, (math.exp(here), math.exp(there))


def _loss(logits_NTV: torch.Tensor, ids_NT: torch.Tensor) -> float:
    return cross_entropy(logits_NTV[:, :-1].flatten(0, 1).float(), ids_NT[:, 1:].flatten()).item()
