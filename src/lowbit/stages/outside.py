"""Packing the token embedding and the output head: every weight takes the nearest code of its group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lowbit.modules import LinearDescription, QuantEmbedding, QuantLinear, scale_of
from lowbit.numerics import ClipSearch, MinMax, quantize
from lowbit.plan.outside import OutsidePlan

_WIDE = 8
"""Bits from which on a group's range covers its extremes; narrower codes search for the range of least error."""


@torch.no_grad()
def packed(module: nn.Module, description: LinearDescription) -> QuantEmbedding | QuantLinear:
    """``module``, an embedding or a linear with its weights, as ``description`` stores it."""
    weight = module.get_parameter("weight").float()
    q = quantize(weight, description.spec, MinMax() if description.spec.grid.bits >= _WIDE else ClipSearch())
    if isinstance(module, nn.Embedding):
        return QuantEmbedding.from_qtensor(q, factor=scale_of(module) or 1.0)
    bias = module._parameters.get("bias")
    return QuantLinear.from_qtensor(q, None if bias is None else bias.to(description.bias))


def pack_outside(model: nn.Module, plan: OutsidePlan) -> dict[str, nn.Module]:
    """The packed modules of ``plan`` by name, heads that are tied included; ``model`` must have the weights loaded."""
    modules: dict[str, nn.Module] = {name: packed(model.get_submodule(name), d) for name, d in plan.stored.items()}
    for head, table in plan.tied_heads.items():
        embedding = modules[table]
        assert isinstance(embedding, QuantEmbedding)
        modules[head] = embedding.head()
    return modules


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, ``model`` has ``modules`` in place of its own."""
    own = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
