"""transformers with the package compressed-tensors loads what is exported, with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import lowbit
from lowbit.modules import QuantLinear

from helpers import random_ids, tiny_llama

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the package

SYMMETRIC = [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": None}, {"bits": 3, "group_size": 16}]
ASYMMETRIC = [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": None}]


def exported(place: Path, **options) -> dict[str, QuantLinear]:
    """The packed layers of a tiny model that lies in ``place / "out"`` as compressed-tensors."""
    tiny_llama(place / "model", dtype=torch.float16)
    lowbit.quantize(place / "model", lowbit.recipe("rtn", **options), None, out=place / "q", max_kl=50)
    lowbit.export(place / "q", "compressed-tensors", out=place / "out")
    model = lowbit.load(place / "q", dtype=torch.float32)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@torch.no_grad()
@pytest.mark.parametrize("options", SYMMETRIC, ids=str)
def test_symmetric_weights_are_decoded_to_the_same_bits(tmp_path, options):
    layers = exported(tmp_path, symmetric=True, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = random_ids(2, 16)
    logits = model(ids).logits  # which decodes the weights
    for name, layer in layers.items():
        assert torch.equal(model.get_submodule(name).weight, layer.dequantize()), name
    torch.testing.assert_close(logits, lowbit.load(tmp_path / "q", dtype=torch.float32)(ids).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", ASYMMETRIC, ids=str)
def test_weights_with_zero_points_are_decoded_to_the_same_numbers_when_transformers_is_asked_to_decode(
    tmp_path, options
):
    # compressed-tensors 0.20 does not load packed zero points without this: its module expects them unpacked.
    layers = exported(tmp_path, **options)
    decoded = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16, quantization_config=decoded)
    for name, layer in layers.items():
        assert torch.equal(model.get_submodule(name).weight, layer.dequantize().half()), name
