"""The canonical layout: a quantized tensor as the named tensors of the native checkpoint.

    codes   uint8 [O, ceil(I * bits / 8)]            one bit stream for each row
    and for each field of the grid's parameters, by its name (scale, zero, values, alpha, ...):
            scale_dtype [rows, columns * width]      if it is floating; rows and columns are the granularity's
            uint8 [ceil(rows * columns * width * bits / 8)], one bit stream, if it holds codes

With second-level statistics a floating field is itself a quantized tensor ``[columns * width, rows]``, and the names of
its tensors start with its name: ``scale_codes``, ``scale_scale``, ``scale_zero``; if it is centred, ``scale_mean`` float32.

Laws: unpacked tensors dequantize to the same bits; the bytes of the tensors times 8 are ``stored_bits(spec, shape)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.layouts.bitstream import pack, packed_width, unpack
from lowbit.numerics import Params, QTensor, Spec

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def packed_layout(spec: Spec, shape: tuple[int, ...], prefix: str = "") -> Layout:
    """Shape and dtype of each stored tensor of a weight of ``shape`` (O, I), by name. It needs no data."""
    rows, columns = spec.granularity.param_shape(shape)
    layout: Layout = {f"{prefix}codes": ((*shape[:-1], packed_width(shape[-1], spec.grid.bits)), torch.uint8)}
    for field in spec.grid.fields:
        name, wide = f"{prefix}{field.name}", columns * field.width
        if field.bits is not None:
            layout[name] = (packed_width(rows * wide, field.bits),), torch.uint8
        elif spec.stats is None:
            layout[name] = (rows, wide), spec.torch_scale_dtype
        else:
            layout |= packed_layout(spec.stats, (wide, rows), f"{name}_")
            if spec.stats_centred:
                layout[f"{name}_mean"] = (), torch.float32
    return layout


def pack_qtensor(q: QTensor, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of ``q``, contiguous, as :func:`packed_layout` describes them.

    Raises:
        ValueError: parameters that storage would change (they did not pass ``Spec.as_stored``).
    """
    spec, params = q.spec, q.params._asdict()
    rows, columns = spec.granularity.param_shape(q.shape)
    tensors = {f"{prefix}codes": pack(q.codes, spec.grid.bits)}
    for field in spec.grid.fields:
        name, value = f"{prefix}{field.name}", params[field.name]
        if field.bits is not None:
            tensors[name] = pack(value.to(torch.uint8).reshape(-1), field.bits)
        elif spec.stats is None:
            stored = value.to(spec.torch_scale_dtype)
            _same(stored, value, name)
            tensors[name] = stored.reshape(rows, columns * field.width).contiguous()
        else:
            second = q.second[field.name]
            _same(spec.from_second(second, field), value, name)
            tensors |= pack_qtensor(second, f"{name}_")
    if q.mean is not None:
        tensors[f"{prefix}mean"] = q.mean.float()
    return tensors


def _same(stored: Tensor, x: Tensor, name: str) -> None:
    if not torch.equal(stored.to(x.dtype), x):
        off = (stored.to(x.dtype) - x).abs().max().item()
        raise ValueError(
            f"{name} is not as the format stores it (off by up to {off:.3g}); pass parameters through Spec.as_stored "
            "first, or build the tensor with QTensor.fitted"
        )


def unpack_qtensor(tensors: Mapping[str, Tensor], spec: Spec, shape: tuple[int, ...], prefix: str = "") -> QTensor:
    """The quantized tensor of ``shape`` that ``tensors`` stores, with parameters in float32; further tensors are ignored.

    Raises:
        ValueError: a tensor that is missing, or whose shape or dtype is not that of the format.
    """
    for name, (expected, dtype) in packed_layout(spec, shape, prefix).items():
        if name not in tensors:
            raise ValueError(f"the packed weight has no tensor {name!r}; found {', '.join(sorted(tensors))}")
        tensor = tensors[name]
        if tuple(tensor.shape) != expected or tensor.dtype != dtype:
            raise ValueError(
                f"{name} should be {dtype} {list(expected)}, found {tensor.dtype} {list(tensor.shape)}: "
                "the description and the tensors are of different layers"
            )
    codes = unpack(tensors[f"{prefix}codes"], spec.grid.bits, shape[-1])
    params, second = _unpack_params(tensors, spec, shape, prefix)
    return QTensor(codes, params, spec, second, tensors.get(f"{prefix}mean") if prefix else None)


def unpack_params(tensors: Mapping[str, Tensor], spec: Spec, shape: tuple[int, ...], prefix: str = "") -> Params:
    """Parameters in float32, leading axis G; the codes are not read."""
    return _unpack_params(tensors, spec, shape, prefix)[0]


def _unpack_params(
    tensors: Mapping[str, Tensor], spec: Spec, shape: tuple[int, ...], prefix: str
) -> tuple[Params, dict[str, QTensor]]:
    rows, columns = spec.granularity.param_shape(shape)
    params, second = {}, {}
    for field in spec.grid.fields:
        name, count = f"{prefix}{field.name}", rows * columns * field.width
        if field.bits is not None:
            params[field.name] = unpack(tensors[name], field.bits, count).float().reshape(-1, field.width)
        elif spec.stats is None:
            params[field.name] = tensors[name].float().reshape(-1, field.width)
        else:
            second[field.name] = unpack_qtensor(tensors, spec.stats, (columns * field.width, rows), f"{name}_")
            params[field.name] = spec.from_second(second[field.name], field)
    return spec.grid.kind(**params), second
