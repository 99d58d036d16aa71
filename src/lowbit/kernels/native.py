"""The compiled CPU kernels (``cpu/*.cpp``): which layers they take, how these are packed for them, and how they are called.

A weight is packed once, after loading, from its canonical codes into tiles that the kernels read as one stream; the codes
are dropped, and made again from the tiles where something asks for them. One algorithm is compiled for each instruction
set, and each is a kernel of its own name: ``avx512``, ``avxvnni``, ``avx2``, ``neon``, ``portable``.

How the input is multiplied:

* integers as the recipe quantizes them (:class:`Int` of up to 8 bits, a scale a token or one for all): one integer product;
* floating point against uniform and binary-coded weights: as 24-bit fixed point with a scale for each 128 channels, three
  integer products. It costs less than converting weights, and errs less than a float32 sum does (over 110 dB);
* floating point against tables and codebooks: in float32;
* many tokens of floating point: the weight is decoded by panels that stay in cache, and torch multiplies, in float32 where it
  has no matrix instructions for the input's dtype.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.kernels.activation import fake_quantize_activation
from lowbit.kernels.decode import decode_packed
from lowbit.kernels.ops import Kernel, PackedLinear, add_side, reference, register
from lowbit.layouts import unpack_params
from lowbit.numerics import (
    Affine,
    Bases,
    BinaryCoded,
    Codebook,
    Flat,
    Float,
    Int,
    Lut,
    MinMax,
    Normal,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    RowBands,
    Spec,
    Table,
)

try:
    from lowbit.kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # installed where there was no compiler
    _cpu = None

UNIFORM, TABLE, CODEBOOK, BINARY = range(4)
_FLOATS, _INT8, _FIXED = 0, 1, 3
_TYPES = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 4}
_PANEL_BYTES = 1 << 20  # of decoded weight: half of a usual second-level cache
# Tokens up to which the packed product beats decoding the weight for torch to multiply (benchmarks/kernels.py), where torch
# has matrix instructions for the dtype; and where it has none.
_FEW = {UNIFORM: 32, TABLE: 12, CODEBOOK: 12, BINARY: 8}
_FEW_SLOW = 16
# Instruction sets with integer dot products: three of them cost less than one product of float32, however many tokens.
_DOTS = ("avx512", "avxvnni", "neon")


def instruction_sets() -> list[str]:
    """Names of the compiled kernels that this CPU runs, the widest first; none without compiled code."""
    return [] if _cpu is None else _cpu.instruction_sets()


def _kind(spec: Spec) -> int | None:
    match spec.grid:
        case Int():
            return UNIFORM
        case Float() | Normal() | Table():
            return TABLE
        case Codebook():
            return CODEBOOK
        case BinaryCoded():
            return BINARY
    return None


def _group(spec: Spec, columns: int) -> int | None:
    match spec.granularity:
        case PerChannel() | PerTensor() | RowBands():
            return columns
        case PerGroup(size):
            return min(size, columns)
        case Flat(size) if columns % size == 0:
            return size
    return None


def why_unpackable(layer: PackedLinear) -> str | None:
    """Why the weight cannot be packed for these kernels."""
    if _cpu is None:
        return "lowbit was installed without its compiled kernels (no C++ compiler was found)"
    kind, group = _kind(layer.spec), _group(layer.spec, layer.shape[1])
    if kind is None:
        return f"weights are {type(layer.spec.grid).__name__}, which has no compiled kernel"
    if group is None or (kind == CODEBOOK and layer.spec.granularity != PerChannel()):
        return f"parameters are {layer.spec.granularity}, compiled kernels take groups within a row"
    if layer.device.type != "cpu":
        return f"compiled for CPUs, the layer is on {layer.device.type}"
    return None


def pack(layer: PackedLinear) -> Tensor:
    """The weight of ``layer`` as one uint8 buffer of tiles; :func:`why_unpackable` has to be None."""
    spec, (rows, columns) = layer.spec, layer.shape
    params = unpack_params(layer.tensors, spec, layer.shape)
    kind, group = _kind(spec), _group(spec, columns)
    assert _cpu is not None and kind is not None and group is not None
    zero, constant = None, 0.0
    if isinstance(params, Affine):
        scale, zero = params
        if zero is None and isinstance(spec.grid, Int):
            constant = float(spec.grid.zero_point(params))
    elif isinstance(params, Bases):
        scale, zero = params
    else:
        assert isinstance(params, Lut)
        scale = params.values
    if isinstance(spec.granularity, PerTensor):
        scale, zero = scale.expand(rows, -1), None if zero is None else zero.expand(rows, -1)
    if isinstance(spec.granularity, RowBands):  # one set for several rows: the tiles have one for each
        height = spec.granularity.height(layer.shape)
        scale = scale.repeat_interleave(height, 0)[:rows]
        zero = None if zero is None else zero.repeat_interleave(height, 0)[:rows]
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    codes = layer.tensors["codes"].contiguous()
    assert kind != CODEBOOK or scale.shape == (rows, 2**spec.grid.bits)
    about = (kind, spec.grid.bits, rows, columns, group)
    tiles = torch.empty(_cpu.packed_bytes(*about, scale.data_ptr(), _address(zero)), dtype=torch.uint8)
    _cpu.pack(
        *about, codes.data_ptr(), scale.data_ptr(), _address(zero), constant,
        tiles.data_ptr(), tiles.numel(), torch.get_num_threads(),
    )  # fmt: skip
    return tiles


def unpack(tiles: Tensor, spec: Spec, shape: tuple[int, int]) -> Tensor:
    """The canonical codes that ``tiles`` were packed from: uint8 ``[O, ceil(I * bits / 8)]``."""
    assert _cpu is not None
    codes = torch.empty(shape[0], -(-shape[1] * spec.grid.bits // 8), dtype=torch.uint8)
    _cpu.unpack(tiles.data_ptr(), tiles.numel(), codes.data_ptr(), torch.get_num_threads())
    return codes


def read(isa: str, memory: Tensor) -> None:
    """Reads every byte, as fast as this machine can: what a product is compared with."""
    assert _cpu is not None
    _cpu.read(isa, memory.data_ptr(), memory.numel(), torch.get_num_threads())


def advise_large_pages(memory: Tensor) -> None:
    """Asks the system for large pages, before the memory is touched: reading at full speed needs them."""
    assert _cpu is not None
    _cpu.advise(memory.data_ptr(), memory.numel())


@functools.cache
def table_of(spec: Spec) -> Tensor | None:
    """Values of the codes of a grid that is a table, float32 ``[2**bits]``; codes that no value has are zero."""
    if _kind(spec) != TABLE:
        return None
    values = torch.tensor(spec.grid.table())  # pyright: ignore[reportAttributeAccessIssue]
    return F.pad(values, (0, 2**spec.grid.bits - len(values)))


def decode(isa: str, tiles: Tensor, table: Tensor | None, first: int, out_OI: Tensor) -> None:
    """Fills ``out_OI`` (contiguous, float32, bfloat16 or float16) with decoded rows from ``first`` on, a multiple of 16."""
    assert _cpu is not None
    _cpu.decode(
        isa, tiles.data_ptr(), tiles.numel(), _address(table), first, first + len(out_OI),
        out_OI.data_ptr(), _TYPES[out_OI.dtype], torch.get_num_threads(),
    )  # fmt: skip


def integer_input(layer: PackedLinear) -> bool:
    """Whether the input is quantized to integers that multiply the codes as they are."""
    act = layer.act
    return (
        act is not None
        and isinstance(act.grid, Int)
        and act.grid.bits > 1
        and not act.grid.real_zero
        and not act.grid.full
        and isinstance(act.granularity, PerToken | PerTensor)
        and (isinstance(layer.spec.grid, Int) or (isinstance(layer.spec.grid, BinaryCoded) and act.grid.symmetric))
    )


def _why_not(layer: PackedLinear, rows: int) -> str | None:
    reason = why_unpackable(layer)
    if reason is None and layer.tiles is None:
        return "the weight is not packed for it; lowbit.load does, and prepare() of the layer"
    return reason


def _run(isa: str, x: Tensor, layer: PackedLinear) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        if layer.act is not None:
            return reference(x, layer)
        y = _Differentiable.apply(x, isa, layer)
        assert isinstance(y, Tensor)
    else:
        y = _product(isa, x, layer)
    return add_side(y, x, layer)


class _Differentiable(torch.autograd.Function):
    """The product of a weight that is not learned: in the backward pass it is decoded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, isa: str, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return _product(isa, x, layer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,) = grads
        weight = decode_packed(ctx.layer.tensors, ctx.layer.spec, ctx.layer.shape)
        return g @ weight.to(g.dtype), None, None


def _product(isa: str, x: Tensor, layer: PackedLinear) -> Tensor:
    x_TI = x.reshape(-1, x.shape[-1])
    if x.dtype not in _TYPES:
        x_TI = x_TI.float()
    y_TO = _by_rows(isa, x_TI.contiguous(), layer)
    return y_TO.to(x.dtype).view(*x.shape[:-1], layer.shape[0])


def _by_rows(isa: str, x_TI: Tensor, layer: PackedLinear) -> Tensor:
    assert layer.tiles is not None
    act, params = layer.act, layer.act_params
    if act is not None and not integer_input(layer):
        x_TI = fake_quantize_activation(x_TI, act, params).to(x_TI.dtype)
        act = None
    if act is None:
        kind = _kind(layer.spec)
        assert kind is not None
        if len(x_TI) > _few(isa, kind, x_TI.dtype):
            return _by_panels(x_TI if _multiplies(x_TI.dtype) else x_TI.float(), isa, layer).to(x_TI.dtype)
        tabled = kind in (TABLE, CODEBOOK)
        return linear(isa, x_TI, layer.tiles, layer.shape[0], table_of(layer.spec), tabled=tabled)
    assert isinstance(act.grid, Int)
    if params is None and isinstance(act.granularity, PerTensor):
        params = MinMax()(act.granularity.split(x_TI.float()), act.grid)
    return linear(isa, x_TI, layer.tiles, layer.shape[0], None, act.grid.bits, act.grid.symmetric, params)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of ``dtype`` faster than it does float32, or they are float32."""
    has = torch.cpu.get_capabilities()
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "fp16")}
    return dtype == torch.float32 or any(has.get(name, False) for name in names[dtype])


def _few(isa: str, kind: int, dtype: torch.dtype) -> float:
    """Tokens up to which the packed product is the faster one."""
    if not _multiplies(dtype) or dtype == torch.float32:
        return math.inf if kind == UNIFORM and isa in _DOTS else _FEW_SLOW
    return _FEW[kind]


def _by_panels(x_TI: Tensor, isa: str, layer: PackedLinear) -> Tensor:
    assert layer.tiles is not None
    rows, columns = layer.shape
    step = max(16, _PANEL_BYTES // (columns * x_TI.element_size()) // 16 * 16) * torch.get_num_threads()
    table = table_of(layer.spec)
    panel = x_TI.new_empty(
        min(step, rows), columns
    )  # one for all: memory that is new each time costs more than decoding
    y_TO = x_TI.new_empty(len(x_TI), rows)
    for start in range(0, rows, step):
        weight = panel[: rows - start]
        decode(isa, layer.tiles, table, start, weight)
        torch.mm(x_TI, weight.T, out=y_TO[:, start : start + step])
    return y_TO


def linear(
    isa: str,
    x_TI: Tensor,
    tiles: Tensor,
    out_features: int,
    table: Tensor | None = None,
    act_bits: int = 0,
    act_symmetric: bool = True,
    act_params: Affine | None = None,
    tabled: bool = False,
    by_segment: bool = False,
) -> Tensor:
    """``x @ W.T``, x ``[T, I]`` contiguous in float32, bfloat16 or float16, ``[T, O]`` in its dtype.

    Args:
        isa: one of :func:`instruction_sets`.
        tiles: made by :func:`pack`.
        table: values of the codes where the grid is a table.
        act_bits: width to which x is quantized; 0: not at all.
        act_params: of all of x, where they are not fitted to each token.
        tabled: the weight is a table or a codebook.
        by_segment: x is rounded to 8 bits with a scale for each 128 channels: quicker than fixed point, an error of 1 %.
    """
    assert _cpu is not None
    y_TO = x_TI.new_empty(len(x_TI), out_features)
    scale = zero = None
    if act_params is not None:
        scale = act_params.scale.float().contiguous()
        zero = None if act_params.zero is None else act_params.zero.float().contiguous()
    mode = _FLOATS if tabled else _INT8 if act_bits or by_segment else _FIXED
    _cpu.linear(
        isa, tiles.data_ptr(), tiles.numel(), _address(table), x_TI.data_ptr(), _TYPES[x_TI.dtype], len(x_TI),
        y_TO.data_ptr(), _TYPES[y_TO.dtype], mode, act_bits, act_symmetric, scale is not None and scale.numel() == 1,
        _address(scale), _address(zero), torch.get_num_threads(),
    )  # fmt: skip
    return y_TO


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _torch_pool() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch runs on; 0 where it is not to be found.

    LLVM's and Intel's runtimes offer the same entry. Only a library that is loaded already is looked at.
    """
    candidates: list[str | None] = [None]
    candidates += [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))]
    candidates += [str(path) for path in sorted(Path(torch.__file__).parent.parent.glob("torch.libs/lib*omp*"))]
    for name in candidates:
        try:
            library = ctypes.CDLL(name, mode=getattr(ctypes, "RTLD_NOLOAD", 4) if name else ctypes.DEFAULT_MODE)
            entry = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value or 0
    return 0


def _register_all() -> None:
    for isa in reversed(instruction_sets()):
        register(Kernel(isa, _why_not, lambda x, layer, isa=isa: _run(isa, x, layer)))


if _cpu is not None:
    _cpu.use_pool(_torch_pool())
_register_all()
