"""The canonical layout: a quantized tensor as the named machine tensors of the native checkpoint.

    codes   uint8 [O, ceil(I * bits / 8)]            a bit stream a row
    scale   scale_dtype [rows, columns]              of the granularity's parameters
    zero    uint8 [ceil(rows * columns * zero_bits / 8)], one bit stream; scale_dtype [rows, columns] where zero points
            are real numbers; absent where the grid has none

With second-level statistics ``scale`` (and a real ``zero``) is itself a quantized tensor ``[columns, rows]``, and its
tensors take its name as a prefix: ``scale_codes``, ``scale_scale``, ``scale_zero``.

Laws: what is unpacked dequantizes to the same bits; the bytes of the tensors times 8 are ``stored_bits(spec, shape)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.layouts.bitstream import pack, packed_width, unpack
from lowbit.layouts.second_level import requantize
from lowbit.numerics import Affine, QTensor, Spec

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def packed_layout(spec: Spec, shape: tuple[int, ...], prefix: str = "") -> Layout:
    """Shape and dtype of each tensor that a ``[O, I]`` weight is stored as. Needs no data."""
    rows, columns = spec.granularity.param_shape(shape)
    layout: Layout = {f"{prefix}codes": ((*shape[:-1], packed_width(shape[-1], spec.grid.bits)), torch.uint8)}

    def real(name: str) -> Layout:
        if spec.stats is None:
            return {f"{prefix}{name}": ((rows, columns), spec.torch_scale_dtype)}
        return packed_layout(spec.stats, (columns, rows), f"{prefix}{name}_")

    layout |= real("scale")
    if spec.grid.zero_bits is None:
        layout |= real("zero")
    elif spec.grid.zero_bits:
        layout[f"{prefix}zero"] = (packed_width(rows * columns, spec.grid.zero_bits),), torch.uint8
    return layout


def pack_qtensor(q: QTensor) -> dict[str, Tensor]:
    """The tensors of ``q``, contiguous, as :func:`packed_layout` describes them.

    Raises:
        ValueError: parameters that are not what the spec stores (they were not passed through ``Spec.as_stored``).
    """
    return _pack(q, "")


def _pack(q: QTensor, prefix: str) -> dict[str, Tensor]:
    spec, params = q.spec, q.params
    rows, columns = spec.granularity.param_shape(q.shape)
    tensors = {f"{prefix}codes": pack(q.codes, spec.grid.bits)}
    tensors |= _pack_real(params.scale, spec, (rows, columns), f"{prefix}scale", floored=True)
    if params.zero is not None:
        if spec.grid.zero_bits is None:
            tensors |= _pack_real(params.zero, spec, (rows, columns), f"{prefix}zero", floored=False)
        elif spec.grid.zero_bits:
            tensors[f"{prefix}zero"] = pack(params.zero.to(torch.uint8).reshape(-1), spec.grid.zero_bits)
    return tensors


def _pack_real(x_G1: Tensor, spec: Spec, shape: tuple[int, int], name: str, *, floored: bool) -> dict[str, Tensor]:
    if spec.stats is None:
        stored = x_G1.to(spec.torch_scale_dtype)
        _same(stored, x_G1, name)
        return {name: stored.reshape(shape).contiguous()}
    # A second level may decode a scale to zero, which `Spec.as_stored` lifts; zero is what finds the code again.
    sought = x_G1.masked_fill(x_G1 == _smallest(spec), 0) if floored else x_G1
    second = requantize(sought.reshape(shape).T.contiguous(), spec.stats)
    restored = second.dequantize().T.reshape(-1, 1)
    _same(_lift(restored, spec) if floored else restored, x_G1, name)
    return _pack(second, f"{name}_")


def _same(stored: Tensor, x: Tensor, name: str) -> None:
    if not torch.equal(stored.to(x.dtype), x):
        off = (stored.to(x.dtype) - x).abs().max().item()
        raise ValueError(
            f"{name} is not as the format stores it (off by up to {off:.3g}); pass parameters through Spec.as_stored "
            "first. Where statistics are quantized this also happens if they do not survive a second quantization "
            "unchanged: use an integer grid with an integer zero point or none for them"
        )


@lru_cache
def _smallest(spec: Spec) -> float:
    """The floor under scales, asked of the one place that sets it."""
    return replace(spec, stats=None).as_stored(Affine(torch.zeros(1, 1))).scale.item()


def _lift(scale: Tensor, spec: Spec) -> Tensor:
    """The floor under scales, as `Spec.as_stored` has it."""
    return torch.where(scale.abs() < _smallest(spec), torch.full_like(scale, _smallest(spec)), scale)


def unpack_qtensor(tensors: Mapping[str, Tensor], spec: Spec, shape: tuple[int, ...], prefix: str = "") -> QTensor:
    """The quantized tensor of ``shape`` stored as ``tensors`` (others among them are ignored); parameters in float32.

    Raises:
        ValueError: a tensor that is missing or has another shape or dtype than the format's.
    """
    for name, (expected, dtype) in packed_layout(spec, shape, prefix).items():
        if name not in tensors:
            raise ValueError(f"the packed weight has no tensor {name!r}; found {', '.join(sorted(tensors))}")
        found = tensors[name]
        if tuple(found.shape) != expected or found.dtype != dtype:
            raise ValueError(
                f"{name} should be {dtype} {list(expected)}, found {found.dtype} {list(found.shape)}: "
                "the description and the tensors are of different layers"
            )
    codes = unpack(tensors[f"{prefix}codes"], spec.grid.bits, shape[-1])
    return QTensor(codes, unpack_params(tensors, spec, shape, prefix), spec)


def unpack_params(tensors: Mapping[str, Tensor], spec: Spec, shape: tuple[int, ...], prefix: str = "") -> Affine:
    """Scales and zero points in float32, ``[G, 1]``, without a look at the codes."""
    rows, columns = spec.granularity.param_shape(shape)

    def real(name: str) -> Tensor:
        if spec.stats is None:
            return tensors[f"{prefix}{name}"].float().reshape(-1, 1)
        second = unpack_qtensor(tensors, spec.stats, (columns, rows), f"{prefix}{name}_")
        return second.dequantize().T.reshape(-1, 1)

    scale, zero = real("scale"), None
    if spec.stats is not None:
        scale = _lift(scale, spec)
    if spec.grid.zero_bits is None:
        zero = real("zero")
    elif spec.grid.zero_bits:
        zero = unpack(tensors[f"{prefix}zero"], spec.grid.zero_bits, rows * columns).float().reshape(-1, 1)
    return Affine(scale, zero)
