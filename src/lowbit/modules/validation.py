"""What the description and the tensors of a packed linear must be. Compiled code runs nothing that has not passed this.

A file can hold anything. Compiled code takes sizes and indices on trust, torch broadcasts shapes that do not fit, and a NaN
scale makes a model silent. So every field is compared once with the shape of its own layer: :func:`check_parts` needs the
description only and runs whenever one is made, :func:`check_tensors` reads the values and runs before a layer does.

Shapes: O output channel, I input channel behind the transforms of the input, W width that a transform gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.layouts import unpack, unpack_params
from lowbit.modules.activation import unpack_static
from lowbit.numerics import Int, KeptColumns, LowRank, Sparse, Spec, Table, TwoSided, all_finite
from lowbit.transforms import Kronecker, Normalize, Permute, RandomHadamard, Reassembly, Rotate, Scale, Shift, Split

if TYPE_CHECKING:
    from lowbit.modules.description import LinearDescription
    from lowbit.modules.serialize_transforms import PartDescription, Place

_LARGEST_SIZE = 2**24
"""Channels that no linear has; what is computed from a shape stays small below it."""
ORTHOGONAL = 1e-3
"""How far a rotation times its transpose may be from the identity."""
_UNIT = 1e-2
"""How far the length of a row of a rotation may be from one; bfloat16 rounds by a quarter of it."""


# Shapes


def check_shape(shape: Any) -> None:
    """Checks that ``shape`` is two sizes of a linear. Raises ValueError."""
    two = isinstance(shape, tuple) and len(shape) == 2
    if not two or not all(type(size) is int and 0 < size <= _LARGEST_SIZE for size in shape):
        raise ValueError(f"the shape of a packed linear is two sizes of 1 to {_LARGEST_SIZE}, found {shape!r:.100}")


def check_parts(description: LinearDescription) -> None:
    """Checks rank, shape and dtype of every tensor of transforms and side terms, and their other fields.

    Raises:
        ValueError: a field that does not fit the shape of the layer; the message starts with its name.
    """
    rows, columns = description.shape
    width = columns
    for i, part in reversed([*enumerate(description.pre)]):
        width = _check_part("pre", i, part, width, columns)
    for i, part in enumerate(description.post):
        _check_part("post", i, part, rows, columns)
    for i, part in enumerate(description.side_terms):
        _check_part("side", i, part, rows, columns)


def _check_part(place: Place, i: int, part: PartDescription, width: int, columns: int) -> int:
    """Checks one part, whose output is ``width``; the width of its input."""
    infos = part.tensors()
    for name, shapes in _shapes(part, width, columns).items():
        info = infos.get(name)
        kind = "integer" if name in _INTEGERS else "floating"
        if info is None or info.shape not in shapes or (kind == "floating") != info.dtype.is_floating_point:
            found = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{place}{i}_{name} of a {part.type} is {found}, expected {kind} {expected}")
    for name, value in part.fields:
        right = {"size": int, "inverted": bool, "eps": float}.get(name)
        if right is not None and type(value) is not right:
            raise ValueError(f"{place}{i}_{name} of a {part.type} is {value!r:.100}, expected {right.__name__}")
        if name == "eps" and not 0 < value < math.inf:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"{place}{i}_{name} of a {part.type} is {value!r:.100}, expected a positive number")
        if name == "size" and isinstance(value, int):
            _check_size(place, i, part, value, width)
    return infos["counts"].shape[0] if part.type == Split.__name__ else width


_INTEGERS = frozenset({"index", "counts", "slot", "into", "copied", "row_start", "column", "seed"})


def _shapes(part: PartDescription, width: int, columns: int) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each tensor of ``part`` may have; of those of free length, the one that another field says."""
    infos = part.tensors()

    def size(name: str, axis: int, most: int) -> int:
        shape = infos[name].shape if name in infos else ()
        return min(shape[axis], most) if len(shape) > axis else 0

    match part.type:
        case Scale.__name__:
            return {"s": [(width,)]}
        case Shift.__name__:
            return {"d": [(width,)]}
        case Permute.__name__:
            return {"index": [(width,)]}
        case Rotate.__name__:
            run = max(1, size("q", -1, width))
            runs = width // run if width % run == 0 else 0
            return {"q": [(run, run), (runs, run, run)] if runs else [(width, width)]}
        case Kronecker.__name__ | RandomHadamard.__name__:
            return {"seed": [(1,)]}
        case Normalize.__name__:
            return {}
        case Split.__name__:
            return {"counts": [(size("counts", 0, width),)]}
        case Reassembly.__name__:
            return {name: [(size("slot", 0, width),)] for name in ("slot", "into", "copied")}
        case Sparse.__name__:
            count = size("value", 0, width * columns)
            return {"row_start": [(width + 1,)], "column": [(count,)], "value": [(count,)]}
        case KeptColumns.__name__:
            count = size("index", 0, columns)
            return {"index": [(count,)], "value": [(width, count)]}
        case LowRank.__name__:
            rank = size("a", 0, width * columns)
            return {"a": [(rank, columns)], "b": [(width, rank)]}
    raise AssertionError(f"{part.type} has no shapes here")


def _check_size(place: Place, i: int, part: PartDescription, size: int, width: int) -> None:
    whole = part.type == Reassembly.__name__
    if size < 1 or (size != width if whole else width % size):
        expected = f"{width}" if whole else f"a divisor of {width}"
        raise ValueError(f"{place}{i}_size of a {part.type} is {size}, expected {expected}, the channels that it turns")


# Values


def check_tensors(description: LinearDescription, tensors: Mapping[str, Tensor]) -> None:
    """Checks the values of a layer's tensors, whose shapes and dtypes are those of ``description``.

    Every number is finite, scales are positive, codes are in their table, and indices are in order and in range.

    Raises:
        ValueError: a tensor that is not so; the message starts with its name.
    """
    _check_quantized(tensors, description.spec, description.shape, "")
    _check_static(description, tensors)
    for place in ("pre", "post", "side"):
        for i, part in enumerate(description.parts(place)):
            fields = {name: tensors[f"{place}{i}_{name}"] for name in part.tensors()}
            for name, tensor in fields.items():
                check_finite(f"{place}{i}_{name}", tensor)
            problem = _problem(part, fields, description)
            if problem is not None:
                raise ValueError(f"{place}{i}_{problem}")
    if description.bias is not None:
        check_finite("bias", tensors["bias"])


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError where a floating ``tensor`` holds NaN or Inf; one pass, no copy."""
    if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor):
        raise ValueError(f"{name} holds NaN or Inf")


def _check_quantized(tensors: Mapping[str, Tensor], spec: Spec, shape: tuple[int, ...], prefix: str) -> None:
    """A weight, or statistics that are quantized again."""
    rows, columns = spec.granularity.param_shape(shape)
    grid = spec.grid
    if isinstance(grid, Table | TwoSided) and len(grid.values) < 2**grid.bits:
        highest = int(unpack(tensors[f"{prefix}codes"], grid.bits, shape[-1]).max())
        if highest >= len(grid.values):
            raise ValueError(f"{prefix}codes holds code {highest} of a table of {len(grid.values)} values")
    for field in grid.fields:
        name = f"{prefix}{field.name}"
        if field.bits is not None:
            continue
        if spec.stats is None:
            check_finite(name, tensors[name])
            if field.floored and not field.signed:
                check_positive(name, tensors[name])
            continue
        _check_quantized(tensors, spec.stats, (columns * field.width, rows), f"{name}_")
        if spec.stats_centred:
            check_finite(f"{name}_mean", tensors[f"{name}_mean"])
    if spec.stats is not None:
        for name, value in unpack_params(tensors, spec, shape, prefix)._asdict().items():
            if value is not None:
                check_finite(f"{prefix}{name}", value)


def check_orthogonal(name: str, q: Tensor) -> None:
    """Raises ValueError unless ``q`` ``[..., D, D]`` times its transpose is the identity, but for :data:`ORTHOGONAL`."""
    product = q.double() @ q.double().mT
    error = (product - torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)).abs().max()
    if not error < ORTHOGONAL:
        raise ValueError(
            f"{name} is no rotation: times its transpose it differs from the identity by {error:.3g}, expected less than "
            f"{ORTHOGONAL}"
        )


def check_positive(name: str, tensor: Tensor) -> None:
    """Raises ValueError where ``tensor`` holds a number that is not above zero."""
    lowest = tensor.float().min()
    if not lowest > 0:
        raise ValueError(f"{name} holds {float(lowest):g}, expected scales above zero")


def _check_static(description: LinearDescription, tensors: Mapping[str, Tensor]) -> None:
    act = description.act
    if act is None or not act.static:
        return
    if act.spec.stats is not None:
        high, wide = act.spec.granularity.param_shape((1, description.shape[1]))
        _check_quantized(tensors, act.spec.stats, (wide, high), "act_scale_")
    params = unpack_static(act, tensors, description.shape[1])
    assert params is not None
    check_finite("act_scale", params.scale)
    check_positive("act_scale", params.scale)
    if params.zero is None:
        return
    check_finite("act_zero", params.zero)
    grid, zero = act.spec.grid, params.zero
    if isinstance(grid, Int) and not grid.real_zero:
        if not ((zero >= 0) & (zero <= grid.max_code) & (zero == zero.round())).all():
            raise ValueError(f"act_zero holds a zero point that is no code of {grid.bits} bits")


def _problem(part: PartDescription, fields: Mapping[str, Tensor], description: LinearDescription) -> str | None:
    """What is wrong with the values of a transform or side term, and with which field of it; None: nothing."""
    columns = description.shape[1]
    match part.type:
        case Scale.__name__:
            if not (fields["s"].abs() >= torch.finfo(torch.float32).smallest_normal).all():
                return "s holds zero, by which it would divide"
        case Permute.__name__:
            index = fields["index"].long()
            if not torch.equal(index.sort().values, torch.arange(len(index), device=index.device)):
                return f"index is no order of {len(index)} channels"
        case Rotate.__name__:
            if not ((fields["q"].float().square().sum(-1) - 1).abs() <= _UNIT).all():
                return "q is no rotation: its rows do not have length one"
        case Kronecker.__name__ | RandomHadamard.__name__:
            if int(fields["seed"]) < 0:
                return f"seed is {int(fields['seed'])}, expected 0 to 2^63 - 1"
        case Split.__name__:
            counts = fields["counts"].long()
            if not (counts >= 1).all() or not (counts <= _LARGEST_SIZE).all():
                return "counts holds a number of copies that no channel has"
            width = _width_after(description, part)
            if int(counts.sum()) != width:
                return f"counts makes {int(counts.sum())} channels, expected {width}"
        case Reassembly.__name__:
            return _reassembly_problem(fields, dict(part.fields)["size"])
        case Sparse.__name__:
            start, column = fields["row_start"].long(), fields["column"].long()
            whole = int(start[0]) == 0 and int(start[-1]) == len(column)
            if not whole or not (start.diff() >= 0).all():
                return f"row_start does not count the {len(column)} weights of {len(start) - 1} rows"
            if out := _outside(column, columns):
                return f"column {out}"
            row = torch.arange(len(start) - 1, device=start.device).repeat_interleave(start.diff())
            if not ((row * columns + column).diff() > 0).all():
                return "column does not rise within its rows"
        case KeptColumns.__name__:
            index = fields["index"].long()
            if out := _outside(index, columns):
                return f"index {out}"
            if not (index.diff() > 0).all():
                return "index does not rise"
    return None


def _outside(index: Tensor, count: int) -> str | None:
    if index.numel() and not 0 <= int(index.amin()) <= int(index.amax()) < count:
        return f"names channels {int(index.amin())} to {int(index.amax())} of {count}"
    return None


def _width_after(description: LinearDescription, part: PartDescription) -> int:
    """The width that the transform ``part`` of the input gives."""
    place = next(i for i, each in enumerate(description.pre) if each is part)
    for later in description.pre[place + 1 :]:
        if later.type == Split.__name__:
            return later.tensors()["counts"].shape[0]
    return description.shape[1]


def _reassembly_problem(fields: Mapping[str, Tensor], size: Any) -> str | None:
    slot, into, copied = (fields[name].long() for name in ("slot", "into", "copied"))
    for name, index in (("slot", slot), ("into", into), ("copied", copied)):
        if out := _outside(index, size):
            return f"{name} {out}"
    if len(slot.unique()) != len(slot):
        return "slot names a channel twice"
    leaving, merged = set(slot.tolist()), set(into[into != slot].tolist())
    if leaving & merged or leaving & set(copied.tolist()) or merged & set(copied.tolist()):
        return "copied, into and slot give a channel two roles"
    return None
