"""One linear by itself, quantized by every method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.modules import QuantLinear

from helpers import sqnr_db


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    return nn.Linear(96, 48)


@pytest.fixture(scope="module")
def inputs():
    """Correlated tokens with two loud channels, as a language model's are."""
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(1))
    x = x @ (torch.eye(96) + 0.3 * torch.randn(96, 96, generator=torch.Generator().manual_seed(2)) / 5)
    x[:, [3, 50]] *= 30
    return x


RECIPES = {
    "rtn": ({"bits": 4, "group_size": 32}, 20),
    "gptq": ({"bits": 4, "group_size": 32}, 22),
    "gptq ordered": ({"bits": 4, "group_size": 32, "act_order": True}, 22),
    "awq": ({"bits": 4, "group_size": 32}, 22),
    "awq+gptq": ({"bits": 4, "group_size": 32, "clip": False}, 22),
    "smoothquant": ({"bits": 8, "activation_bits": 8}, 35),
    "smoothquant static": ({"bits": 8, "activation_bits": 8, "level": "O3"}, 25),
    "smoothquant+gptq": ({"bits": 8, "activation_bits": 8, "group_size": None}, 35),
    "omniquant": ({"bits": 4, "group_size": 32, "epochs": 3}, 20),
    "omniquant transform": ({"bits": 4, "activation_bits": 8, "epochs": 3}, 20),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_quantizes_a_lone_linear_that_runs(name, linear, inputs):
    options, floor_db = RECIPES[name]
    before = linear.weight.clone()
    q = lowbit.quantize_linear(linear, inputs, lowbit.recipe(name.split()[0], **options))
    assert isinstance(q, QuantLinear) and torch.equal(linear.weight, before)
    with torch.no_grad():
        assert sqnr_db(linear(inputs), q(inputs)) > floor_db
    assert q.dequantize().shape == (48, 96) and options["bits"] < q.bits_per_weight < options["bits"] + 1.7


def test_a_transform_that_nothing_absorbs_runs_in_the_layer_and_counts_in_its_bits(linear, inputs):
    plain = lowbit.quantize_linear(linear, inputs, lowbit.recipe("rtn", bits=8, group_size=None, symmetric=True))
    smooth = lowbit.quantize_linear(linear, inputs, lowbit.recipe("smoothquant", activation_bits=16))
    assert smooth.bits_per_weight - plain.bits_per_weight == pytest.approx(32 * 96 / (96 * 48))
    (scale,) = smooth.pre
    assert scale.s[3] > 3 * scale.s.median()  # a loud channel is made quieter
    torch.testing.assert_close(smooth.effective_weight(), smooth.dequantize() / scale.s)


def test_windows_and_tokens_of_the_same_inputs_give_the_same_codes(linear, inputs):
    recipe = lowbit.recipe("gptq", bits=4, group_size=32)
    flat = lowbit.quantize_linear(linear, inputs, recipe)
    cut = lowbit.quantize_linear(linear, inputs.view(8, 50, 96), recipe)
    assert (flat.qtensor().codes != cut.qtensor().codes).float().mean() < 0.01  # sums in another order


def test_second_order_rounding_beats_nearest_on_a_lone_linear(linear, inputs):
    errors = {}
    for name in ("rtn", "gptq"):
        q = lowbit.quantize_linear(linear, inputs, lowbit.recipe(name, bits=3, group_size=32))
        with torch.no_grad():
            errors[name] = (linear(inputs) - q(inputs)).square().sum().item()
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_what_cannot_be_is_refused_with_what_was_found(linear, inputs):
    recipe = lowbit.recipe("gptq", bits=4, group_size=32)
    with pytest.raises(ValueError, match=r"\[tokens, 96\].*found \[400, 95\]"):
        lowbit.quantize_linear(linear, inputs[:, :95], recipe)
    with pytest.raises(ValueError, match="a token at least, found a ndarray"):
        lowbit.quantize_linear(linear, inputs.numpy(), recipe)
    with pytest.raises(ValueError, match=r"a token at least, found \[0, 96\]"):
        lowbit.quantize_linear(linear, inputs[:0], recipe)
    with pytest.raises(ValueError, match="NaN or Inf"):
        lowbit.quantize_linear(linear, inputs * float("nan"), recipe)
    with pytest.raises(ValueError, match="Fisher"):
        lowbit.quantize_linear(linear, inputs, recipe, fisher=torch.ones(48, 96))
    with pytest.raises(ValueError, match=r"no method and no recipe 'gtpq' \(did you mean 'gptq'"):
        lowbit.quantize_linear(linear, inputs, "gtpq")
    with pytest.raises(ValueError, match=r"^recipe 'gptq' calibrates on inputs; pass a tensor \[tokens, 96\]$"):
        lowbit.quantize_linear(linear, None, recipe)
    for wrong in (linear.weight, torch.nn.Conv1d(3, 3, 1)):
        with pytest.raises(ValueError, match=rf"expected a torch.nn.Linear, found a {type(wrong).__name__}"):
            lowbit.quantize_linear(wrong, inputs, recipe)
