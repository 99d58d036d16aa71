"""Folds a transform into a block's weights: one pure, differentiable function for search, training and commit.

Each transform has its rules in `fold_in` and `fold_out`; this file only moves a port's rows or columns into the order of
the free channels and back. Repeated key-value heads, rotary pairs and slices of a fused weight are all indices. Law: after
the fold the model computes the same function (`check_architecture` proves it for every edge and kind of a table).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lowbit.architectures.resolved import Port, ResolvedEdge
from lowbit.architectures.table import Kind
from lowbit.transforms import ChannelTransform, Permute, Rotate, Scale, Shift

_KINDS: dict[type, Kind] = {Scale: Kind.SCALE, Shift: Kind.SHIFT, Permute: Kind.PERMUTE, Rotate: Kind.ROTATE}


def fold(edge: ResolvedEdge, transform: ChannelTransform, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a block's state_dict that change when `transform` acts on the edge's activation.

    Differentiable in the weights and in the transform's parameters. Computed in the wider of their dtypes, so the caller
    rounds once, when it stores the result.

    Args:
        edge: the edge.
        transform: acts on the edge's free channels.
        weights: the block's state_dict, or at least its entries at the edge's ports; not changed. Matrices are `[O, I]`, as
            in drafts (`lowbit.modules.make_drafts`). A shift needs the bias of every module that `needs_bias` names, zero if
            the linear had none.

    Raises:
        ValueError: a kind that the edge does not carry, a parameter of the wrong length, a scale of the wrong sign, a
            permutation or rotation that leaves its head, or a missing entry.
    """
    kind = _kind_of(transform)
    _check(edge, kind, transform)
    changed: dict[str, Tensor] = {}
    for port in edge.ports:
        if kind in port.kinds:
            weight = _take(edge, port.weight, changed, weights)
            bias = changed.get(port.bias, weights.get(port.bias))
            if bias is None and kind is Kind.SHIFT:
                raise ValueError(f"A shift across {edge.name!r} needs {port.bias!r} in weights; see needs_bias.")
            changed.update(_fold_port(port, edge.channels, transform, weight, bias))
    return changed


def needs_bias(edge: ResolvedEdge, kind: Kind) -> tuple[str, ...]:
    """Paths of the linears that need a new zero bias before `kind` is folded across the edge."""
    if kind is not Kind.SHIFT:
        return ()
    return tuple(dict.fromkeys(port.module for port in edge.ports if kind in port.kinds and not port.has_bias))


def add_bias(block: nn.Module, paths: Iterable[str]) -> None:
    """Gives each named linear without a bias a zero one, in place; the block computes the same function."""
    for path in paths:
        linear = block.get_submodule(path)
        if linear.bias is None:
            weight = linear.get_parameter("weight")
            linear.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)


def _kind_of(transform: ChannelTransform) -> Kind:
    kind = _KINDS.get(type(transform))
    if kind is None:
        raise ValueError(
            f"{type(transform).__name__} changes the width or is not exact, so it does not fold in place; "
            f"expected one of {[t.__name__ for t in _KINDS]}."
        )
    return kind


def _check(edge: ResolvedEdge, kind: Kind, transform: ChannelTransform) -> None:
    if kind not in edge.carries:
        legal = sorted(k.value for k in edge.carries)
        raise ValueError(f"Edge {edge.name!r} does not carry a {kind.value}; it carries {legal}.")
    if isinstance(transform, Rotate):
        size, run = transform.q.shape[-1], edge.within or edge.channels
        runs = edge.channels // size
        if run % size or (transform.q.dim() == 3 and len(transform.q) != runs):
            raise ValueError(
                f"Edge {edge.name!r} mixes within runs of {run} of {edge.channels} channels; "
                f"found a rotation of shape {tuple(transform.q.shape)}."
            )
        return
    values = _parameter(transform)
    if values.shape != (edge.channels,):
        raise ValueError(f"Edge {edge.name!r} has {edge.channels} free channels; found {tuple(values.shape)}.")
    if kind is Kind.SCALE and bool((values <= 0).any() if edge.positive else (values == 0).any()):
        raise ValueError(f"Scales across {edge.name!r} must be {'positive' if edge.positive else 'nonzero'}.")
    if kind is Kind.PERMUTE:
        here = torch.arange(edge.channels, device=values.device)
        if not torch.equal(values.sort().values, here):
            raise ValueError(f"The index across {edge.name!r} is not a permutation of {edge.channels} channels.")
        if edge.within and not torch.equal(values // edge.within, here // edge.within):
            raise ValueError(f"A permutation across {edge.name!r} must stay inside runs of {edge.within} channels.")


def _parameter(transform: ChannelTransform) -> Tensor:
    (parameter,) = vars(transform).values()  # every transform here is one tensor
    return parameter


def _as_dtype(transform: ChannelTransform, dtype: torch.dtype) -> ChannelTransform:
    parameter, make = _parameter(transform), cast("Callable[[Tensor], ChannelTransform]", type(transform))
    return make(parameter.to(dtype)) if parameter.is_floating_point() else transform


def _take(edge: ResolvedEdge, name: str, changed: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    if name not in weights:
        raise ValueError(f"Edge {edge.name!r} folds into {name!r}, which is not in weights.")
    return changed.get(name, weights[name])


def _fold_port(
    port: Port, channels: int, transform: ChannelTransform, weight: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """The entries that change at one port, by name. A norm counts as a linear with one input: its gain is one column."""
    weight = weight.to(torch.promote_types(weight.dtype, _parameter(transform).dtype))
    bias = None if bias is None else bias.to(weight.dtype)
    local = _as_dtype(transform.dual() if port.inverse else transform, weight.dtype).tile(port.copies(channels))
    w_OI = (weight + port.gain_offset)[:, None] if port.norm else weight
    dim = 1 if port.side == "in" else 0
    picked = _pick(w_OI, port.order, dim)
    if port.side == "in":
        new, new_bias = local.fold_in(picked, bias)
    else:
        new, part = local.fold_out(picked, None if bias is None else _pick(bias, port.order, 0))
        new_bias = None if bias is None or part is None else _put(bias, port.order, part, 0)
    changed = {}
    if new is not picked:
        w_OI = _put(w_OI, port.order, new, dim)
        changed[port.weight] = w_OI[:, 0] - port.gain_offset if port.norm else w_OI
    if new_bias is not None and new_bias is not bias:
        changed[port.bias] = new_bias
    return changed


def _pick(tensor: Tensor, order: Tensor | None, dim: int) -> Tensor:
    return tensor if order is None else tensor.index_select(dim, order.to(tensor.device))


def _put(tensor: Tensor, order: Tensor | None, values: Tensor, dim: int) -> Tensor:
    return values if order is None else tensor.index_copy(dim, order.to(tensor.device), values)
