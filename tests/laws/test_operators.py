"""Laws of torch's operators around compiled products: torch may trace, compile and differentiate through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit.kernels import native, product
from lowbit.modules import prepare

if not native.instruction_sets():
    pytest.skip("lowbit was installed without its compiled kernels", allow_module_level=True)

RECIPES = {
    "uniform": ("rtn", {"bits": 4, "group_size": 32}),
    "table": ("nf4", {}),
    "pairs": ("olive", {"bits": 4, "activation_bits": None}),
    "binary": ("lut-gemm", {"bits": 2, "group_size": 64}),
    "integer input": ("smoothquant", {}),
    "static integer input": ("smoothquant", {"level": "O3"}),
    "clipped integer input": ("quarot", {}),
    "outlier channels": ("llm-int8", {"threshold": 2.0}),
    "rotated": ("quip", {"bits": 4}),
    "outliers kept": ("spqr", {"bits": 3, "group_size": 16}),
    "columns kept": ("owq", {"bits": 3, "target_bits": 4.0}),
}


def packed(name: str):
    """A linear [128 -> 80] quantized and prepared."""
    method, options = RECIPES[name]
    torch.manual_seed(0)
    linear = nn.Linear(128, 80).requires_grad_(False)
    layer = lowbit.quantize_linear(linear, torch.randn(2, 64, 128), lowbit.recipe(method, **options))
    assert layer.prepare() is None
    return layer


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_torch_accepts_the_operator(name, rows):
    layer = packed(name)
    made = product.product_of(layer.packed())
    scale, zero = (None, None) if made.params is None or not made.bits else made.params
    x = torch.randn(rows, layer.shape[1], requires_grad=not made.bits)
    about = (made.kind, made.rows, made.bits, made.symmetric, made.reach, made.whole, made.threshold, "")
    for operator, arguments in (
        (torch.ops.lowbit.packed_linear.default, (x, layer.tiles, made.table, scale, zero, *about)),
        (torch.ops.lowbit.packed_weight.default, (layer.tiles, made.table, *layer.shape, "")),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_prepared_layer_is_traced_whole_and_gives_the_same(name):
    torch.compiler.reset()  # what was traced for other layers counts against a limit
    layer, x = packed(name), torch.randn(3, 128)
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(traced(x), layer(x))


def test_a_quantized_model_is_traced_whole():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    for block in model.model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                layer = lowbit.quantize_linear(linear, None, lowbit.recipe("rtn", bits=4, group_size=32))
                block.set_submodule(name, layer)
    prepare(model)
    ids = torch.arange(12)[None]
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(traced(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_integer_products_refuse_gradients_in_the_operator_and_take_the_reference_in_the_layer():
    layer, x = packed("integer input"), torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.any()
    made = product.product_of(layer.packed())
    assert layer.tiles is not None
    with pytest.raises(NotImplementedError, match="restore"):
        made(x, layer.tiles).sum().backward()


# Tables of levels are cached functions of constants, which tracing may well look through.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@torch.no_grad()
def test_a_layer_with_floating_inputs_is_traced_whole():
    torch.compiler.reset()
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    x = torch.randn(3, 64)
    for method in ("llm-fp4", "mxfp4"):
        layer = lowbit.quantize_linear(linear, torch.randn(256, 64), lowbit.recipe(method))
        prepare(layer)
        traced = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(traced(x), layer(x))
