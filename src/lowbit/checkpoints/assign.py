"""Tensors of a model by name: given, checked and taken away."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.checkpoints.origins import Origin
from lowbit.checkpoints.shards import ModelError
from lowbit.numerics import all_finite


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def empty(module: nn.Module, leaf: str) -> None:
    """Puts a parameter on the meta device, where it takes no memory."""
    parameter = module._parameters[leaf]
    if parameter is not None:
        without = torch.empty_like(parameter, device="meta")
        module._parameters[leaf] = nn.Parameter(without, requires_grad=parameter.requires_grad)


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Gives a parameter or buffer its value. Raises ModelError for another shape."""
    module, leaf = owner_of(model, name)
    old = module._parameters.get(leaf) if leaf in module._parameters else module._buffers[leaf]
    if old is not None and old.shape != value.shape:
        raise ModelError(f"{name}: the checkpoint gives shape {list(value.shape)}, the model has {list(old.shape)}.")
    if leaf in module._parameters:
        learnable = old.requires_grad and value.is_floating_point() if old is not None else False
        module._parameters[leaf] = nn.Parameter(value, requires_grad=learnable)
    else:
        module._buffers[leaf] = value


def check_finite(name: str, value: Tensor, origin: Origin) -> None:
    """Raises ModelError for NaN and Inf, and says where they were read."""
    if not value.is_floating_point() or all_finite(value):
        return
    pieces = value.flatten().split(2**24)  # so that the masks stay small beside the tensor
    nan = sum(int(piece.isnan().sum()) for piece in pieces)
    inf = sum(int(piece.isinf().sum()) for piece in pieces)
    header = origin.headers[origin.first_source]
    raise ModelError(
        f"{name}: {nan} NaN and {inf} Inf among {value.numel()} weights (read from {origin.first_source} in "
        f"{header.file.name}, stored as {header.dtype}). A model with such weights cannot be quantized; the file is "
        "damaged, or the model was saved broken."
    )
