"""bitsandbytes on the CPU: what is exported decodes to the same bits there, and what it quantizes comes in as it decodes it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowbit
from lowbit.modules import QuantLinear

from helpers import random_ids, tiny_llama

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the package

KINDS = [(levels, double) for levels in ("nf4", "fp4") for double in (False, True)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


def model_in(place):
    return tiny_llama(place / "model", intermediate_size=128, dtype=torch.float16)  # its CPU products need whole blocks


def decoded(linear) -> torch.Tensor:
    state = linear.weight.quant_state
    state.dtype = torch.float32  # of what is decoded
    return bitsandbytes.functional.dequantize_4bit(linear.weight.data, state)


def layers_of(model) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize(("levels", "double"), KINDS)
def test_4_bits_decode_to_the_same_bits_there(tmp_path, levels, double):
    recipe = lowbit.recipe("nf4", levels=levels, double_quant=double)
    lowbit.quantize(model_in(tmp_path), recipe, None, out=tmp_path / "q", format="bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ours = layers_of(lowbit.load(tmp_path / "q"))
    assert len(ours) == 14
    for name, layer in ours.items():
        assert torch.equal(decoded(theirs.get_submodule(name)), layer.dequantize()), name


@pytest.mark.parametrize(("levels", "double"), KINDS)
def test_4_bits_that_it_quantizes_are_read_as_it_decodes_them(tmp_path, levels, double):
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=levels, bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(model_in(tmp_path), dtype=torch.float16, quantization_config=asked)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = layers_of(lowbit.load(tmp_path / "theirs"))
    assert len(ours) == 14
    for name, layer in ours.items():
        assert torch.equal(decoded(theirs.get_submodule(name)), layer.dequantize()), name


@torch.no_grad()
def test_8_bits_go_both_ways(tmp_path):
    place, ids = model_in(tmp_path), random_ids(2, 16)
    asked = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float16, quantization_config=asked)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowbit.load(tmp_path / "theirs", dtype=torch.float32)
    for name, layer in layers_of(ours).items():
        state = theirs.get_submodule(name).weight
        weight = bitsandbytes.functional.int8_vectorwise_dequant(state.data, state.SCB)
        # It multiplies by the rounded reciprocal of 127, and divides by 127 here.
        torch.testing.assert_close(layer.dequantize(), weight.float(), rtol=2**-22, atol=0)
    lowbit.export(tmp_path / "theirs", "bitsandbytes", out=tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float16)
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 0.05
