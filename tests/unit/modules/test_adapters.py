"""Adapters of peft on packed models: packed layers are refused by name, layers that are not packed take them."""

from __future__ import annotations

import pytest
import torch

import lowbit

from helpers import random_ids, tiny_llama

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for what peft calls


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    lowbit.quantize(tiny_llama(place / "model"), "rtn", None, out=place / "q")
    return place / "q"


@pytest.mark.parametrize("kind", ["LoraConfig", "OFTConfig", "LoHaConfig"])
def test_adapters_of_packed_layers_are_refused_with_the_name_of_their_class(quantized, kind):
    with pytest.raises((ValueError, TypeError), match=r"QuantLinear.* (is|are)? ?not supported"):
        peft.get_peft_model(lowbit.load(quantized), getattr(peft, kind)(target_modules=["q_proj"]))


def test_an_adapter_of_a_head_that_is_not_packed_is_part_of_every_new_token(quantized):
    model = peft.get_peft_model(lowbit.load(quantized, torch.float32), peft.LoraConfig(target_modules=["lm_head"]))
    ids = random_ids(1, 6)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        assert not torch.allclose(model(input_ids=ids).logits, plain)
        slow = ids
        for _ in range(6):
            slow = torch.cat([slow, model(input_ids=slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), slow)
