"""Products with packed weights by compiled code: one kernel for each instruction set, and one torch operator.

Inputs are multiplied as follows:

* quantized integers (:class:`Int` of up to 8 bits, one scale for each token or for all): one integer product; input
  channels that reach a threshold take one more product in fixed point;
* floating inputs and uniform or binary-coded weights: three integer products in 24-bit fixed point with one scale for each
  128 channels. This costs less than converting the weights, with a smaller error than a float32 sum (over 110 dB). A
  token in which one value takes the digits of most others is multiplied in float32;
* floating inputs and tables or codebooks: in float32;
* many bfloat16 tokens with matrix tiles: unchanged, with weights rounded to bfloat16 in cache;
* many other floating tokens, unless three integer products are faster for any number of them: the weight is decoded in
  panels that stay in cache, and torch multiplies, in float32 if the processor has no matrix instructions for the input's
  dtype.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import native, side_terms
from lowbit.kernels.activation import dynamic_params, fake_quantize_activation, without_outliers
from lowbit.kernels.instructions import faster_than_float32, speedup
from lowbit.kernels.native import BINARY, CODEBOOK, TABLE, UNIFORM
from lowbit.kernels.ops import Kernel, PackedLinear, reference, register
from lowbit.numerics import Affine, Int, PerTensor, PerToken, Spec

_PANEL_BYTES = 1 << 20  # of decoded weight: half of a common second-level cache
# Most tokens for which the packed product is faster than decoding the weight and torch's product: with matrix tiles in
# torch for the dtype, with vector instructions for it, with float32 in AVX-512, and with less.
_FEW_TILED = {UNIFORM: 32, TABLE: 12, CODEBOOK: 12, BINARY: 8}
_FEW = {UNIFORM: 64, TABLE: 48, CODEBOOK: 16, BINARY: 16}
_FEW_FLOAT = {UNIFORM: 160, TABLE: 160, CODEBOOK: 24, BINARY: 24}
_FEW_SLOW = 16
# Most bfloat16 tokens for fixed point or vector lanes where matrix tiles are available.
_FEW_BY_LANES = {UNIFORM: 24, TABLE: native.TILE_ROWS - 1, BINARY: native.TILE_ROWS - 1}
# Instruction sets with integer dot products and at most eight float32 lanes: three integer products cost less than one in
# float32 for any number of tokens. With AVX-512 they do if torch's own gain from integers is well over three, and with matrix
# tiles if a group fills one: in a quarter to nine tenths of the time (SmolLM2's and Llama's linears).
_DOTS = ("avxvnni", "neon")
_THREE_PAY = 4.5


@dataclass(frozen=True)
class Product:
    """The product of one packed layer, without its tiles; made once and called for every input.

    Args:
        kind, rows, table: of the weight, see :mod:`lowbit.kernels.native`.
        act: format of the input; None: not quantized.
        params: static parameters of ``act``.
        bits: width of integers that multiply the codes directly; 0: the input has another form.
        symmetric, reach: of these integers.
        whole: one range for all tokens, instead of one for each.
        threshold: see :class:`~lowbit.kernels.ops.PackedLinear`.
    """

    kind: int
    rows: int
    table: Tensor | None
    act: Spec | None
    params: Affine | None
    bits: int = 0
    symmetric: bool = True
    reach: float = 1.0
    whole: bool = False
    threshold: float = 0.0

    def __call__(self, x: Tensor, tiles: Tensor, isa: str = "") -> Tensor:
        """``Q_act(x) @ W.T`` for x ``[..., I]``, ``[..., O]`` in its dtype; an empty ``isa`` takes this machine's best."""
        params = self.params
        if self.act is not None and not self.bits:
            x, params = fake_quantize_activation(x, self.act, params, self.threshold).to(x.dtype), None
        scale, zero = (None, None) if params is None else params
        how = (self.kind, self.rows, self.bits, self.symmetric, self.reach, self.whole, self.threshold, isa)
        about = (x, tiles, self.table, scale, zero, *how)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return torch.ops.lowbit.packed_linear(*about)
        return multiply(*about)


def product_of(layer: PackedLinear) -> Product:
    """The :class:`Product` of a packable layer."""
    kind, act = native.kind_of(layer.spec), layer.act
    assert kind is not None
    made = Product(kind, layer.shape[0], native.table_of(layer.spec), act, layer.act_params, threshold=layer.threshold)
    if act is None or not native.integer_input(layer):
        return made
    assert isinstance(act.grid, Int)
    whole = isinstance(act.granularity, PerTensor)
    return replace(made, bits=act.grid.bits, symmetric=act.grid.symmetric, reach=act.grid.reach, whole=whole)


def multiply(
    x: Tensor,
    tiles: Tensor,
    table: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    kind: int,
    rows: int,
    bits: int,
    symmetric: bool,
    reach: float,
    whole: bool,
    threshold: float,
    isa: str,
) -> Tensor:
    """The body of the operator ``lowbit::packed_linear``: the fastest product for the number of tokens in x ``[..., I]``.

    The arguments are those of :class:`Product`; ``scale`` and ``zero`` are its ``params``.
    """
    isa = isa or native.instruction_sets()[0]
    x_TI = x.reshape(-1, x.shape[-1])
    x_TI = (x_TI if x.dtype in native.DTYPES else x_TI.float()).contiguous()
    tiled = isa in native.MATRIX_TILES and kind != CODEBOOK and x_TI.dtype == torch.bfloat16
    if bits:
        grid = Int(bits, symmetric=symmetric, reach=reach)
        y_TO = _of_integers(isa, x_TI, tiles, rows, grid, scale, zero, whole, threshold)
    elif tiled and len(x_TI) > _FEW_BY_LANES[kind]:
        y_TO = native.linear(isa, x_TI, tiles, rows, table, halves=True)
    elif len(x_TI) > _few(isa, kind, x_TI.dtype, tiles):
        wide = x_TI if faster_than_float32(x_TI.dtype) else x_TI.float()
        y_TO = _by_panels(isa, wide, tiles, rows, table)
    else:
        y_TO = native.linear(isa, x_TI, tiles, rows, table, tabled=kind in (TABLE, CODEBOOK))
    return y_TO.to(x.dtype).view(*x.shape[:-1], rows)


def _of_integers(
    isa: str,
    x_TI: Tensor,
    tiles: Tensor,
    rows: int,
    grid: Int,
    scale: Tensor | None,
    zero: Tensor | None,
    whole: bool,
    threshold: float,
) -> Tensor:
    params = None if scale is None else Affine(scale, zero)
    spec = Spec(grid, PerTensor() if whole else PerToken())
    ranged, kept, taken = without_outliers(x_TI, threshold)
    if params is None and (whole or len(taken)):  # otherwise the compiled code fits each token's range
        params = dynamic_params(ranged.float(), spec)
    if not len(taken):
        return native.linear(isa, x_TI, tiles, rows, None, grid.bits, grid.symmetric, grid.reach, params)
    y_TO = native.linear(isa, kept.float(), tiles, rows, None, grid.bits, grid.symmetric, grid.reach, params)
    return y_TO + _of_channels(isa, x_TI.float(), taken, tiles, rows)


def _of_channels(isa: str, x_TI: Tensor, taken: Tensor, tiles: Tensor, rows: int) -> Tensor:
    """The product of the channels ``taken`` alone, float32 like x.

    It costs one floating row for each token, or for each channel if these are fewer: products with rows of the identity
    extract the columns of the weight.
    """
    if len(x_TI) <= len(taken):
        alone = torch.zeros_like(x_TI).index_copy_(1, taken, x_TI[:, taken])
        return native.linear(isa, alone, tiles, rows)
    wanted_kI = x_TI.new_zeros(len(taken), x_TI.shape[1]).scatter_(1, taken[:, None], 1.0)
    return x_TI[:, taken] @ native.linear(isa, wanted_kI, tiles, rows)


def decoded(tiles: Tensor, table: Tensor | None, rows: int, columns: int, isa: str) -> Tensor:
    """The body of ``lowbit::packed_weight``: the weight ``[O, I]``, float32."""
    weight_OI = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    native.decode(isa or native.instruction_sets()[0], tiles, table, rows, 0, weight_OI)
    return weight_OI


# torch operators: torch.compile keeps them whole, and gradients pass through.
torch.library.define(
    "lowbit::packed_linear",
    "(Tensor x, Tensor tiles, Tensor? table, Tensor? scale, Tensor? zero, int kind, int rows, int bits, bool symmetric, "
    "float reach, bool whole, float threshold, str isa) -> Tensor",
)
torch.library.impl("lowbit::packed_linear", "CPU", multiply)


torch.library.define("lowbit::packed_weight", "(Tensor tiles, Tensor? table, int rows, int columns, str isa) -> Tensor")
torch.library.impl("lowbit::packed_weight", "CPU", decoded)


@torch.library.register_fake("lowbit::packed_weight")
def _weight_shape(tiles: Tensor, table: Any, rows: int, columns: int, isa: str) -> Tensor:
    return tiles.new_empty(rows, columns, dtype=torch.float32)


@torch.library.register_fake("lowbit::packed_linear")
def _shape_only(x: Tensor, tiles: Tensor, table: Any, scale: Any, zero: Any, kind: int, rows: int, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, table, _, _, _, rows, bits, *_, isa = inputs
    if bits:
        raise NotImplementedError("an integer product has no gradient; restore() the layer to learn through it")
    ctx.save_for_backward(tiles, table)
    ctx.shape, ctx.isa = (rows, x.shape[-1]), isa


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    tiles, table = ctx.saved_tensors
    weight_OI = torch.ops.lowbit.packed_weight(tiles, table, *ctx.shape, ctx.isa)
    return g @ weight_OI.to(g.dtype), *[None] * 12


torch.library.register_autograd("lowbit::packed_linear", _backward, setup_context=_remember)


def _few(isa: str, kind: int, dtype: torch.dtype, tiles: Tensor) -> float:
    """Most tokens for which the packed product is faster than decoding."""
    if faster_than_float32(dtype):
        return (_FEW_TILED if isa in native.MATRIX_TILES else _FEW)[kind]
    if kind == UNIFORM and isa in native.MATRIX_TILES and native.group_of(tiles) >= native.TILE_COLUMNS:
        return math.inf
    if kind == UNIFORM and (isa in _DOTS or (isa == "avx512" and speedup(torch.int8) > _THREE_PAY)):
        return math.inf
    return _FEW_FLOAT[kind] if isa in ("amx", "avx512") else _FEW_SLOW


def _by_panels(isa: str, x_TI: Tensor, tiles: Tensor, rows: int, table: Tensor | None) -> Tensor:
    columns = x_TI.shape[1]
    step = max(16, _PANEL_BYTES // (columns * x_TI.element_size()) // 16 * 16) * torch.get_num_threads()
    # One panel is reused, because new memory costs more than decoding.
    panel, y_TO = x_TI.new_empty(min(step, rows), columns), x_TI.new_empty(len(x_TI), rows)
    for start in range(0, rows, step):
        weight = panel[: rows - start]
        native.decode(isa, tiles, table, rows, start, weight)
        torch.mm(x_TI, weight.T, out=y_TO[:, start : start + step])
    return y_TO


def _why_not(isa: str, layer: PackedLinear, rows: int) -> str | None:
    reason = native.why_unpackable(layer)
    if reason is None and layer.tiles is None:
        return "the weight is not packed for it; lowbit.load does, and prepare() of the layer"
    if reason is None and isa in native.MATRIX_TILES and (other := native.why_no_matrix_tiles(layer, rows)):
        return f"{other}; {native.MATRIX_TILES[isa]} runs it"
    return reason


def run(isa: str, x: Tensor, layer: PackedLinear) -> Tensor:
    """The kernel of instruction set ``isa``, see :class:`~lowbit.kernels.ops.Kernel`."""
    if layer.act is not None and torch.is_grad_enabled() and x.requires_grad:
        return reference(x, layer)
    assert layer.tiles is not None
    return side_terms.add(product_of(layer)(x, layer.tiles, isa), x, layer.side_terms, isa)


for _isa in reversed(native.instruction_sets()):
    register(
        Kernel(
            _isa,
            functools.partial(_why_not, _isa),
            functools.partial(run, _isa),
            tiled=True,
            leaves_to=native.MATRIX_TILES.get(_isa, ""),
        )
    )
