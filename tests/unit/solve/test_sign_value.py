"""Signs between scales: what the solver stores, what the plan foresees of it, and with what it does not go together."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit.linear_api import quantize_linear
from lowbit.modules import QuantLinear
from lowbit.numerics import Int, PerChannel, PerTensor, Sign, Spec, sign_value_factors
from lowbit.plan import explain, plan
from lowbit.recipes import Recipe
from lowbit.scheme import activation, linears
from lowbit.solve import Nearest, SignValue
from lowbit.steps import (
    Incoherence,
    Learn,
    MeanAbsPower,
    NormsAndBiases,
    Search,
    SearchClip,
    Set,
    SetActivationRange,
    Smooth,
    Solve,
)
from lowbit.transforms import Normalize, Scale

from helpers import random_ids, sqnr_db, tiny_llama

SIGNS = Spec(Sign(), PerTensor())
O, I = 48, 80


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(I, O, bias=bias)
    with torch.no_grad():
        made.weight.mul_(torch.rand(O, 1).mul(3).exp() * torch.rand(I).exp())
    return made


def one_bit(*steps: Any, normalize: bool = False, act: Any = None, spec: Spec = SIGNS) -> Recipe:
    return Recipe.blockwise("one-bit", linears(spec, act), (*steps, Solve(SignValue(normalize))))


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_signs_between_the_factors_of_the_magnitudes(bias):
    original, x = linear(bias), torch.randn(9, I, generator=torch.Generator().manual_seed(1))
    layer = quantize_linear(original, None, one_bit())
    h, g = sign_value_factors(original.weight)
    w = original.weight.detach()
    torch.testing.assert_close(layer.effective_weight(), w.sign() * h[:, None] * g, rtol=2e-3, atol=0)
    assert torch.equal(layer.dequantize(), w.sign())
    torch.testing.assert_close(
        layer(x), x @ layer.effective_weight().T + (original.bias if bias else 0), rtol=1e-3, atol=1e-3
    )


def test_normalized_it_computes_what_the_paper_says():
    original, x = linear(), torch.randn(9, I, generator=torch.Generator().manual_seed(1))
    layer = quantize_linear(original.requires_grad_(False), None, one_bit(normalize=True))
    h, g = sign_value_factors(original.weight)
    signs = torch.where(original.weight >= 0, 1.0, -1.0)
    wanted = nn.functional.layer_norm(((x * g) @ signs.T) * h, (O,)) + original.bias
    assert sqnr_db(wanted, layer(x)) > 55
    torch.testing.assert_close(layer(17 * x) - layer.bias, layer(x) - layer.bias, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("normalize", [True, False])
def test_one_bit_a_weight_and_16_for_each_row_and_column_are_stored(normalize):
    layer = quantize_linear(linear(), None, one_bit(normalize=normalize))
    assert layer.stored_bits == O * I + 16 * (O + I)
    assert layer.bits_per_weight == pytest.approx(1 + 16 * (O + I) / (O * I))
    assert {name: (str(b.dtype), list(b.shape)) for name, b in layer.state_dict().items() if name != "bias"} == {
        "codes": ("torch.uint8", [O, I // 8]),
        "pre0_s": ("torch.float16", [I]),
        "post0_s": ("torch.float16", [O]),
    }
    kinds = [type(t) for t in layer.post]
    assert kinds == ([Scale, Normalize] if normalize else [Scale])


def test_rows_and_columns_of_zeros_and_weights_of_any_size_are_stored():
    original = linear(bias=False)
    with torch.no_grad():
        original.weight[3] = 0
        original.weight[:, 5] = 0
        for size in (1.0, 1e-4, 1e4):
            scaled = nn.Linear(I, O, bias=False)
            scaled.weight.copy_(original.weight * size)
            layer = quantize_linear(scaled, None, one_bit())
            lost = (layer.effective_weight() - scaled.weight).square().sum() / scaled.weight.square().sum()
            assert lost < 0.45
            assert layer.effective_weight()[3].abs().max() < 1e-3 * scaled.weight.abs().max()


@pytest.mark.parametrize("normalize", [True, False])
def test_the_plan_foresees_every_byte_and_says_what_linears_run(normalize, tmp_path):
    model, recipe = tiny_llama(tmp_path / "model"), one_bit(normalize=normalize)
    planned, told = plan(model, recipe, samples=0), explain(recipe, model)
    block = [layer for layer in planned.layers if layer.role == "q"]
    assert block[0].weight == "signs" and block[0].bits_per_weight == 1 + 16 * 128 / 64**2
    quantized = [layer for layer in planned.layers if not layer.reason and layer.role not in ("embedding", "head")]
    bits = sum(prod(layer.shape) + 16 * sum(layer.shape) for layer in quantized)
    assert planned.bits_per_weight == pytest.approx(bits / sum(prod(layer.shape) for layer in quantized))
    assert ("SignValue(normalize=True)" if normalize else "SignValue.") in told.steps[0]
    words = "scales of inputs, scales of outputs" + (", normalizations of outputs" if normalize else "")
    assert any(words in note for note in told.notes)
    assert any("must be trained" in warning for warning in planned.warnings) == normalize
    assert all(answer.startswith("no: ") for name, answer in planned.compatibility.items() if "GGUF" in name)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another grid": (lambda: one_bit(spec=Spec(Int(1, symmetric=True), PerChannel())), "stores signs"),
    "a clip": (lambda: one_bit(SearchClip()), "not placed by a range|no range places"),
    "a search": (lambda: one_bit(Search(MeanAbsPower(), ("norm_*",))), "Search tries formats out"),
    "learning": (
        lambda: one_bit(Learn((NormsAndBiases(),))),
        "Learn tries formats out",
    ),
    "static ranges": (
        lambda: one_bit(SetActivationRange(), act=activation(8, per="tensor", static=True)),
        "static activation ranges are fixed by then",
    ),
    "another solver": (
        lambda: Recipe.blockwise("x", linears(SIGNS), (Solve(Nearest()),)),
        "not placed by one; choose another fit",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_it_is_refused_before_any_work(what):
    make, why = REFUSED[what]
    with pytest.raises(ValueError, match=why):
        make()


def test_outputs_that_are_rotated_are_not_normalized(tmp_path):
    model = tiny_llama(tmp_path / "model")
    with pytest.raises(ValueError, match="normalized before that is undone"):
        plan(model, one_bit(Incoherence(), normalize=True))
    assert plan(model, one_bit(Incoherence())).bits_per_weight > 1


def test_a_scale_folded_before_changes_what_is_factored(tmp_path):
    model, ids = tiny_llama(tmp_path / "model"), random_ids(4, 32)
    recipe = one_bit(Set(Smooth(0.5), ("norm_*",)), act=activation(8))
    lowbit.quantize(model, recipe, ids, out=tmp_path / "q", max_kl=50)
    layer = lowbit.load(tmp_path / "q", torch.float32).model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantLinear) and layer.act is not None and len(layer.pre) == 1
