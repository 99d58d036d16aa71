"""What is outside of the blocks, as a result stores it.

A packed token embedding or output head: every weight takes the nearest code of its group. Other tensors may be kept in a
narrower dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbit.modules import LinearDescription, QuantEmbedding, QuantLinear, scale_of
from lowbit.numerics import ClipSearch, MinMax, narrowed, quantize
from lowbit.plan.kept import Kept
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


def narrowed_outside(model: nn.Module, names: Iterable[str], kept: Kept) -> dict[str, Tensor]:
    """The parameters and buffers ``names`` that are loaded and that ``kept`` casts, rounded; tied ones are one tensor.

    Raises:
        ValueError: a value is too large for the dtype, with the tensor's name.
    """
    state, made = model.state_dict(), dict[int, Tensor]()
    changed: dict[str, Tensor] = {}
    for name in names if kept.narrows else ():
        value = state[name]
        if not value.is_meta and kept.dtype_of(name) != kept.source.dtype_of(name):
            if value.data_ptr() not in made:
                made[value.data_ptr()] = narrowed(name, value, kept.dtype_of(name)).to(value.dtype)
            changed[name] = made[value.data_ptr()]
    return changed


@contextmanager
def replaced(
    model: nn.Module, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """While open, ``model`` has ``modules`` in place of its own, and its other parameters and buffers the values ``tensors``."""
    own = {name: model.get_submodule(name) for name in modules}
    state = model.state_dict(keep_vars=True)
    values = {name: state[name].data for name in tensors or ()}
    try:
        for name, value in (tensors or {}).items():
            state[name].data = value
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, value in values.items():
            state[name].data = value
        for name, module in own.items():
            model.set_submodule(name, module)
