"""Packed models of random weights: speed and memory of a model's size without its weights.

The cost of a product depends on shapes and widths, not on values. Nothing is quantized: codes and scales are random.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit import decoding
from lowbit.architectures import for_config, model_blocks
from lowbit.layouts import packed_layout
from lowbit.modules import LinearDescription, QuantLinear
from lowbit.numerics import Int, PerGroup, Spec
from lowbit.progress import Progress


def linear_shapes(config: Any) -> tuple[tuple[int, int], ...]:
    """``(out, in)`` of the linears of a block of the model that ``config`` describes, in order, without repeats."""
    model = _empty(config)
    block = model_blocks(model, for_config(config), config)[0]
    shapes = (block.module.get_parameter(f"{path}.weight").shape for path in block.resolved.linears)
    return tuple(dict.fromkeys((shape[0], shape[1]) for shape in shapes))


def random_tensors(spec: Spec, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Random tensors of a packed weight ``[O, I]``: codes of every value, scales around 0.015."""
    return {
        name: torch.randint(256, size, dtype=dtype)
        if dtype == torch.uint8
        else (torch.rand(size) * 0.01 + 0.01).to(dtype)
        for name, (size, dtype) in packed_layout(spec, shape).items()
    }


def random_model(
    config: Any,
    bits: int,
    group_size: int = 128,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A model of the sizes of ``config`` whose block linears have ``bits`` bits, prepared for this machine's kernels.

    Args:
        config: a transformers configuration of a causal language model.
        bits: 1 to 8, or 16 to keep everything in ``dtype``.
        group_size: weights that share a scale and a zero point.
        dtype: dtype of everything that is not packed.
        progress: called as progress(done, total, description) around blocks.

    Raises:
        ValueError: another number of bits.
    """
    if bits != 16 and not 1 <= bits <= 8:
        raise ValueError(f"block linears have 1 to 8 bits, or 16 for none packed; found {bits}")
    model = _empty(config, dtype)
    blocks = model_blocks(model, for_config(config), config)
    for done, block in enumerate(blocks):
        if progress:
            progress(done, len(blocks), "building a random model")
        if bits != 16:
            for path in block.resolved.linears:
                linear = block.module.get_submodule(path)
                block.module.set_submodule(path, _random_layer(linear, bits, group_size))
        _fill(block.module)
    _fill(model)
    model.tie_weights()  # filling made new parameters
    decoding.install(model)
    return model.eval().requires_grad_(False)


def _empty(config: Any, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype
        )  # from_config writes the dtype into the config
    model.tie_weights()
    return model


def _random_layer(linear: nn.Module, bits: int, group_size: int) -> QuantLinear:
    assert isinstance(linear, nn.Linear), "tables of named sizes hold linears only"
    shape = (linear.out_features, linear.in_features)
    spec = Spec(Int(bits, symmetric=False), PerGroup(group_size))
    layer = QuantLinear(LinearDescription(spec, shape), random_tensors(spec, shape))
    layer.prepare()
    return layer


def _fill(module: nn.Module) -> None:
    """Gives every meta parameter small random numbers."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = torch.empty(parameter.shape, dtype=parameter.dtype).uniform_(-0.02, 0.02)
                owner.register_parameter(name, nn.Parameter(drawn, requires_grad=False))
