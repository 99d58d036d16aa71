"""Arguments for the GPU code, from a layer. Imports triton.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import native
from lowbit.kernels.activation import dynamic_params, fake_quantize_activation
from lowbit.kernels.ops import PackedLinear, add_side
from lowbit.kernels.triton import device
from lowbit.kernels.triton.shares import shared_by
from lowbit.layouts import packed_width, unpack_params
from lowbit.numerics import Affine, Int, PerChannel, PerTensor, Spec
from lowbit.numerics.grids.base import OF_NOTHING

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# |a - za| and |b - zb| are at most 255, and the sum over I must stay below 2**31.
_MAX_CHANNELS = 2**31 // 255**2
_TOKEN_BLOCK = 1024  # channels at a time when tokens are quantized


@dataclass(frozen=True)
class Tile:
    """``m`` tokens by ``n`` output channels, ``k`` input channels at a time, on ``warps`` of 32 threads (64 on some AMD).

    Tiles of both sides fit the 64 KB of shared memory that every supported GPU has. They are not tuned on any GPU.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int = 2


def tile_of(tokens: int, itemsize: int) -> Tile:
    """The tile for ``tokens`` of a dtype of ``itemsize`` bytes.

    Memory limits few tokens: many small programs read long rows of codes. Arithmetic limits many tokens.
    """
    if tokens == 1:
        return Tile(1, 16, 256, 4)
    if itemsize == 4:  # float32 has no exact matrix instructions and takes twice the bytes
        return Tile(16, 32, 64, 4) if tokens <= 16 else Tile(32, 64, 32, 4)
    if tokens <= 16:
        return Tile(16, 32, 128, 4, 3)
    return Tile(32, 64, 64, 4, 3) if tokens <= 32 else Tile(64, 128, 64, 8)


def linear(x: Tensor, layer: PackedLinear) -> Tensor:
    """``Q_act(x) @ W.T + x @ (sum of side terms).T``, ``[..., O]`` in the dtype of x; x ``[..., I]`` floating, with any strides."""
    x_TI = x.reshape(-1, x.shape[-1])
    if x.dtype not in _DTYPES:
        x_TI = x_TI.float()
    narrow = (
        device.INTERPRETED and x_TI.dtype == torch.bfloat16
    )  # numpy has no bfloat16; the interpreter truncates to it
    y_TO = x_TI.new_empty(len(x_TI), layer.shape[0], dtype=torch.float32 if narrow else x_TI.dtype)
    with torch.cuda.device_of(x_TI):  # triton launches on the current device
        if len(x_TI) == 0:
            pass
        elif _integers(layer):
            _linear_int8(x_TI, y_TO, layer)
        else:
            if layer.act is not None:
                x_TI = fake_quantize_activation(x_TI, layer.act, layer.act_params).to(x_TI.dtype)
            _linear(x_TI, y_TO, layer)
    return add_side(y_TO.to(x.dtype).view(*x.shape[:-1], layer.shape[0]), x, layer)


def _integers(layer: PackedLinear) -> bool:
    """Whether one integer sum over I gives the product: both sides are integers with one scale for each row."""
    grid = layer.spec.grid
    return (
        native.integer_input(layer)
        and layer.act is not None
        and layer.act.stats is None
        and isinstance(grid, Int)
        and grid.bits > 1
        and not grid.real_zero
        and isinstance(layer.spec.granularity, PerChannel | PerTensor)
        and layer.shape[1] <= _MAX_CHANNELS
    )


def _linear(x_TI: Tensor, y_TO: Tensor, layer: PackedLinear) -> None:
    spec, (rows, inputs), tokens = layer.spec, layer.shape, len(x_TI)
    shared, kind = shared_by(spec, layer.shape), native.kind_of(spec)
    assert shared is not None and kind is not None
    _, columns = spec.granularity.param_shape(layer.shape)
    if spec.granularity.param_shape(layer.shape)[0] == 1:  # Flat puts the groups of all rows into one
        columns = -(-inputs // shared[1])
    tile = tile_of(tokens, x_TI.element_size())
    first, second = _stored(layer)
    _launch(
        device.linear, (_blocks(tokens, tile.m), _blocks(rows, tile.n)), tile,
        x_TI, y_TO, layer.tensors["codes"], first, second, _table(spec, x_TI.device),
        tokens, rows, inputs, *x_TI.stride(), packed_width(inputs, spec.grid.bits), *shared, columns, _constant(spec),
        KIND=kind, ZERO=_zero_form(spec), **_word(spec.grid.bits),
        SPAN=tile.k if columns == 1 else gcd(shared[1], tile.k), M=tile.m, N=tile.n, K=tile.k,
        WIDEN=y_TO.dtype != x_TI.dtype,
    )  # fmt: skip


def _linear_int8(x_TI: Tensor, y_TO: Tensor, layer: PackedLinear) -> None:
    spec, act, (rows, inputs), tokens = layer.spec, layer.act, layer.shape, len(x_TI)
    shared = shared_by(spec, layer.shape)
    assert act is not None and isinstance(act.grid, Int) and shared is not None
    quantized = quantize(x_TI, act, layer.act_params)
    tile = tile_of(max(2, tokens), 1)
    _launch(
        device.linear_int8, (_blocks(tokens, tile.m), _blocks(rows, tile.n)), tile,
        *quantized, y_TO, layer.tensors["codes"], *_stored(layer),
        tokens, rows, inputs, packed_width(inputs, spec.grid.bits), shared[0],
        A_ZERO=not act.grid.symmetric, ZERO=_zero_form(spec), **_word(spec.grid.bits), M=tile.m, N=tile.n, K=tile.k,
    )  # fmt: skip


def quantize(x_TI: Tensor, act: Spec, given: Affine | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes ``x_TI`` to integers without a copy in float32.

    Args:
        x_TI: floating.
        act: an :class:`Int` with one range for each token, or one for all.
        given: static parameters; None: fitted to x.

    Returns:
        Codes int8 ``[T, I]``, minus the middle of the grid.
        Scales float32 ``[T]``, NaN for tokens with NaN or infinity.
        Zero points int32 ``[T]``, minus the middle of the grid.
        Sums of the codes int32 ``[T]``.
    """
    assert isinstance(act.grid, Int)
    if given is None and isinstance(act.granularity, PerTensor):
        given = dynamic_params(x_TI.float(), act)
    codes_TI = torch.empty(x_TI.shape, dtype=torch.int8, device=x_TI.device)
    scale_T = torch.empty(len(x_TI), dtype=torch.float32, device=x_TI.device)
    zero_T, sum_T = torch.empty(2, len(x_TI), dtype=torch.int32, device=x_TI.device)
    _launch(
        device.quantize, (len(x_TI), 1), Tile(1, 1, _TOKEN_BLOCK, 4),
        x_TI, codes_TI, scale_T, zero_T, sum_T, *(given or (None, None)), x_TI.shape[1], *x_TI.stride(),
        BITS=act.grid.bits, SYMMETRIC=act.grid.symmetric, REACH=act.grid.reach, GIVEN=given is not None, NOTHING=OF_NOTHING,
        K=_TOKEN_BLOCK,
    )  # fmt: skip
    return codes_TI, scale_T, zero_T, sum_T


def _launch(kernel: Any, grid: tuple[int, int], tile: Tile, *args: Any, **constants: Any) -> None:
    kernel[grid](*args, **constants, num_warps=tile.warps, num_stages=tile.stages)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _word(bits: int) -> dict[str, int]:
    """Number of codes and bytes in a word of the bit stream."""
    per = 8 // gcd(bits, 8)
    return {"BITS": bits, "PER": per, "USED": per * bits // 8}


def _zero_form(spec: Spec) -> int:
    """The storage of the grid's second field."""
    fields = spec.grid.fields
    if len(fields) == 1:
        return device.CONSTANT.value
    return device.CODES.value if fields[1].bits is not None else device.FLOATING.value


def _constant(spec: Spec) -> float:
    """The zero point of a uniform grid that does not store one."""
    if not isinstance(spec.grid, Int) or not spec.grid.symmetric:
        return 0.0
    return float(spec.grid.zero_point(Affine(torch.empty(0))))


def _stored(layer: PackedLinear) -> tuple[Tensor, Tensor | None]:
    """The two fields of the grid's parameters for the kernels: as stored, or decoded if they are quantized."""
    decoded = {} if layer.spec.stats is None else unpack_params(layer.tensors, layer.spec, layer.shape)._asdict()
    tensors = []
    for field in layer.spec.grid.fields:
        tensor = layer.tensors[field.name] if field.bits is not None or not decoded else decoded[field.name]
        if field.bits is None and tensor.dtype not in _DTYPES:
            tensor = tensor.float()
        tensors.append(tensor.contiguous())
    first, *second = tensors
    return first, second[0] if second else None


@functools.lru_cache(64)
def _table(spec: Spec, device: torch.device) -> Tensor | None:
    """Values of the codes of a grid that is a table, float32 ``[2**bits]``, on ``device``."""
    table = native.table_of(spec)
    return None if table is None else table.to(device)
