"""The compiled CPU code (``cpu/*.cpp``): the layers it supports, their packing, and the calls.

After loading, a weight is packed once from its canonical codes into tiles that the kernels read as one stream. The codes
are dropped; they are made again from the tiles on request. One algorithm is compiled for each instruction set:
``avx512``, ``avxvnni``, ``avx2``, ``neon``, ``portable``. ``amx`` is a second algorithm, with matrix tiles, for inputs of
many tokens; ``avx512`` runs the products that it does not support. :mod:`lowbit.kernels.product` makes kernels of them.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit import layouts
from lowbit.compiled import address
from lowbit.compiled import instruction_sets as instruction_sets
from lowbit.compiled import library as _cpu
from lowbit.kernels.ops import PackedLinear
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
    Minimum,
    NoParams,
    Normal,
    Offset,
    OutlierVictim,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    RowBands,
    Sign,
    SignedScale,
    Spec,
    Table,
)

UNIFORM, TABLE, CODEBOOK, BINARY = range(4)
_FLOATS, _INT8, _HALVES, _FIXED = range(4)
MATRIX_TILES = {"amx": "avx512"}  # instruction sets with matrix tiles, and the one that runs their other products
TILE_ROWS = 16  # tokens that fill a tile
TILE_COLUMNS = 64  # bytes of a row of a tile
DTYPES = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 4}


def kind_of(spec: Spec) -> int | None:
    """The kind of tiles for ``spec``: UNIFORM, TABLE, CODEBOOK or BINARY; None if there is none."""
    match spec.grid:
        case Int() | Sign() | SignedScale() | Minimum():
            return UNIFORM
        case Float() | Normal() | Table():
            return TABLE
        case OutlierVictim(bits) if bits < 8:  # 8 bits have more values than a table
            return TABLE
        case Codebook():
            return CODEBOOK
        case BinaryCoded():
            return BINARY
    return None


def _tile_bits(spec: Spec) -> int:
    """Width of a code in the tiles. Kernels look up codes one at a time, which pairs do not allow; for pairs the tiles hold
    the rank of each value, which takes one more bit."""
    return spec.grid.bits + isinstance(spec.grid, OutlierVictim)


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
    """The reason why the weight cannot be packed for these kernels; None if it can."""
    if _cpu is None:
        return "lowbit was installed without its compiled kernels (no C++ compiler was found)"
    kind, group = kind_of(layer.spec), _group(layer.spec, layer.shape[1])
    if isinstance(layer.spec.grid, OutlierVictim) and kind is None:
        return "weights are pairs of 8 bits, whose 509 values are more than a table of the compiled kernels holds"
    if kind is None:
        return f"weights are {type(layer.spec.grid).__name__}, which has no compiled kernel"
    if group is None or (kind == CODEBOOK and layer.spec.granularity != PerChannel()):
        return f"parameters are {layer.spec.granularity}, compiled kernels take groups within a row"
    if layer.device.type != "cpu":
        return f"compiled for CPUs, the layer is on {layer.device.type}"
    return None


def why_no_matrix_tiles(layer: PackedLinear, rows: int) -> str | None:
    """The reason why :data:`MATRIX_TILES` cannot run ``rows`` tokens of a packable layer; None if they can."""
    if rows < TILE_ROWS:
        return f"a matrix tile holds {TILE_ROWS} rows, the input has {rows}"
    kind = kind_of(layer.spec)
    if kind == CODEBOOK or (kind == BINARY and integer_input(layer)):
        return f"{type(layer.spec.grid).__name__} weights are not multiplied by matrix tiles"
    return None


def pack(layer: PackedLinear) -> Tensor:
    """The weight of ``layer`` as one uint8 buffer of tiles; :func:`why_unpackable` must be None."""
    spec, (rows, columns) = layer.spec, layer.shape
    params = unpack_params(layer.tensors, spec, layer.shape)
    kind, group = kind_of(spec), _group(spec, columns)
    assert _cpu is not None and kind is not None and group is not None
    zero, constant = None, 0.0
    if isinstance(params, Affine):
        scale, zero = params
        if zero is None and isinstance(spec.grid, Int):
            constant = float(spec.grid.zero_point(params))
        if isinstance(spec.grid, SignedScale):
            constant = float(spec.grid.middle)
    elif isinstance(params, Offset):
        scale, zero = _of_minimum(params)
    elif isinstance(params, Bases):
        scale, zero = params
    elif isinstance(params, NoParams):  # -1 and 1 are steps of 2 around one half
        count = math.prod(spec.granularity.param_shape(layer.shape))
        scale, constant = torch.full((count, 1), 2.0, dtype=torch.float32, device="cpu"), 0.5
    else:
        assert isinstance(params, Lut)
        scale = params.values
    if isinstance(spec.granularity, PerTensor):
        scale, zero = scale.expand(rows, -1), None if zero is None else zero.expand(rows, -1)
    if isinstance(spec.granularity, RowBands):  # tiles have one set of parameters for each row
        height = spec.granularity.height(layer.shape)
        scale = scale.repeat_interleave(height, 0)[:rows]
        zero = None if zero is None else zero.repeat_interleave(height, 0)[:rows]
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    codes = layer.tensors["codes"].contiguous()
    if isinstance(spec.grid, OutlierVictim):
        codes = layouts.pack(spec.grid.ranks(layouts.unpack(codes, spec.grid.bits, columns)), _tile_bits(spec))
    assert kind != CODEBOOK or scale.shape == (rows, 2**spec.grid.bits)
    about = (kind, _tile_bits(spec), rows, columns, group)
    tiles = torch.empty(_cpu.packed_bytes(*about, scale.data_ptr(), address(zero)), dtype=torch.uint8, device="cpu")
    _cpu.pack(
        *about, codes.data_ptr(), scale.data_ptr(), address(zero), constant,
        tiles.data_ptr(), tiles.numel(), torch.get_num_threads(),
    )  # fmt: skip
    return tiles


def _of_minimum(params: Offset) -> Affine:
    """Scales and zero points with the values of scales and minima, up to the last bits of float32.

    A scale of zero, whose values are all the minimum, becomes one that is too small beside it to matter.
    """
    scale = torch.where(params.scale == 0, params.minimum.abs() * 2.0**-24, params.scale)
    none = scale == 0
    return Affine(scale, (params.minimum / torch.where(none, 1, scale)).masked_fill(none, 0))


def group_of(tiles: Tensor) -> int:
    """Columns that share parameters, from the tiles' header (``cpu/tiles.h``)."""
    return int(tiles[32:40].view(torch.int64))


def unpack(tiles: Tensor, spec: Spec, shape: tuple[int, int]) -> Tensor:
    """The canonical codes that ``tiles`` were packed from: uint8 ``[O, ceil(I * bits / 8)]``."""
    assert _cpu is not None
    codes = torch.empty(shape[0], layouts.packed_width(shape[1], _tile_bits(spec)), dtype=torch.uint8, device="cpu")
    _cpu.unpack(tiles.data_ptr(), tiles.numel(), codes.data_ptr(), *shape, _tile_bits(spec), torch.get_num_threads())
    if isinstance(spec.grid, OutlierVictim):
        codes = layouts.pack(spec.grid.codes(layouts.unpack(codes, _tile_bits(spec), shape[1])), spec.grid.bits)
    return codes


def read(isa: str, memory: Tensor) -> None:
    """Reads every byte as fast as this machine can: the bound for the speed of a product."""
    assert _cpu is not None
    _cpu.read(isa, memory.data_ptr(), memory.numel(), torch.get_num_threads())


def advise_large_pages(memory: Tensor) -> None:
    """Asks the system for large pages, which reading at full speed needs; call it before the memory is touched."""
    assert _cpu is not None
    _cpu.advise(memory.data_ptr(), memory.numel())


@functools.cache
def table_of(spec: Spec) -> Tensor | None:
    """Values of the tiles' codes for a grid that is a table, float32 ``[2**bits]``; unused codes are zero."""
    if kind_of(spec) != TABLE:
        return None
    grid = spec.grid
    levels = grid.levels() if isinstance(grid, OutlierVictim) else grid.table()  # pyright: ignore[reportAttributeAccessIssue]
    values = torch.tensor(levels, dtype=torch.float32, device="cpu")
    return F.pad(values, (0, 2 ** _tile_bits(spec) - len(values)))


def decode(isa: str, tiles: Tensor, table: Tensor | None, rows: int, first: int, out_OI: Tensor) -> None:
    """Decodes into ``out_OI`` (contiguous, float32, bfloat16 or float16) the rows from ``first``, a multiple of 16, of a weight
    of ``rows``."""
    assert _cpu is not None
    _cpu.decode(
        isa, tiles.data_ptr(), tiles.numel(), *table_arguments(table), rows, out_OI.shape[1], first, first + len(out_OI),
        out_OI.data_ptr(), DTYPES[out_OI.dtype], torch.get_num_threads(),
    )  # fmt: skip


def integer_input(layer: PackedLinear) -> bool:
    """Whether the input is quantized to integers that multiply the codes directly."""
    act = layer.act
    return (
        act is not None
        and isinstance(act.grid, Int)
        and act.grid.bits > 1
        and not act.grid.real_zero
        and not act.grid.full
        and isinstance(act.granularity, PerToken | PerTensor)
        and (
            isinstance(layer.spec.grid, Int | Sign) or (isinstance(layer.spec.grid, BinaryCoded) and act.grid.symmetric)
        )
    )


def linear(
    isa: str,
    x_TI: Tensor,
    tiles: Tensor,
    out_features: int,
    table: Tensor | None = None,
    act_bits: int = 0,
    act_symmetric: bool = True,
    act_reach: float = 1.0,
    act_params: Affine | None = None,
    tabled: bool = False,
    by_segment: bool = False,
    halves: bool = False,
) -> Tensor:
    """``x @ W.T``, ``[T, O]`` in the dtype of x.

    Args:
        isa: one of :func:`instruction_sets`.
        x_TI: contiguous, float32, bfloat16 or float16.
        tiles: made by :func:`pack`.
        out_features: O.
        table: values of the codes if the grid is a table.
        act_bits: width to which x is quantized; 0: not quantized.
        act_symmetric, act_reach: see :class:`~lowbit.numerics.Int`.
        act_params: one set for all of x; None: fitted to each token.
        tabled: the weight is a table or a codebook.
        by_segment: round x to 8 bits with one scale for each 128 channels; faster than fixed point, with an error of 1 %.
        halves: x is bfloat16 and stays so, and the weight is rounded to bfloat16; only for :data:`MATRIX_TILES`.
    """
    assert _cpu is not None
    tokens, columns = x_TI.shape
    y_TO = x_TI.new_empty(tokens, out_features)
    scale = zero = None
    if act_params is not None:
        scale = act_params.scale.float().contiguous()
        zero = None if act_params.zero is None else act_params.zero.float().contiguous()
        if scale.numel() not in (1, tokens) or (zero is not None and zero.numel() != scale.numel()):
            raise ValueError(f"the input has {scale.numel()} scales for {tokens} tokens, expected one or one for each")
    mode = _HALVES if halves else input_mode(tabled, bool(act_bits) or by_segment)
    _cpu.linear(
        isa, tiles.data_ptr(), tiles.numel(), *table_arguments(table), x_TI.data_ptr(), DTYPES[x_TI.dtype], tokens, columns,
        y_TO.data_ptr(), DTYPES[y_TO.dtype], out_features, mode, act_bits, act_symmetric, act_reach,
        scale is not None and scale.numel() == 1, address(scale), address(zero), torch.get_num_threads(),
    )  # fmt: skip
    return y_TO


def add_rows(isa: str, x_TI: Tensor, y_TO: Tensor, rows: tuple[int, int, int, int, int, int]) -> None:
    """Adds to ``y`` the product of ``x`` with sparse rows; both contiguous, each float32, bfloat16 or float16."""
    assert _cpu is not None
    count, *places = rows
    if count != y_TO.shape[1]:
        raise ValueError(f"a side term has {count} rows, its layer {y_TO.shape[1]}")
    _cpu.side(
        isa, *places, count, x_TI.data_ptr(), DTYPES[x_TI.dtype], len(x_TI), x_TI.shape[1], y_TO.data_ptr(),
        DTYPES[y_TO.dtype], torch.get_num_threads(),
    )  # fmt: skip


def row_arguments(value: Tensor, column: Tensor, start: Tensor | None = None) -> tuple[int, int, int, int, int, int]:
    """Sparse rows as arguments of the compiled code: their number, and addresses of tensors, which must outlive their use.

    Args:
        value: float16; ``[n]`` in compressed rows, or ``[O, k]``.
        column: int16 or int32; the column of each of the n values, or of the k values in every row.
        start: start of each compressed row, int32 ``[O + 1]``.
    """
    assert value.is_contiguous()
    rows, width = (len(value), value.shape[1]) if start is None else (len(start) - 1, 0)
    return rows, address(start), column.data_ptr(), column.element_size(), value.data_ptr(), width


def input_mode(tabled: bool, rounded: bool) -> int:
    """The form of the input in compiled code: floating for table look-ups, 8 bits if it is ``rounded``, else fixed point."""
    return _FLOATS if tabled else _INT8 if rounded else _FIXED


def table_arguments(table: Tensor | None) -> tuple[int, int]:
    """Address and length of a table, float32, which must outlive their use; zeros without one."""
    return address(table), 0 if table is None else table.numel()
