"""Integer products with torch's int8 matrix product, which makes 8-bit weights and activations fast on a CPU.

With weight levels ``b = code - 128`` and input levels ``a = code - 128``, both int8, and zero points shifted likewise,

    sum_I (a - za)(b - zb) = a @ b.T - za * sum_I b - zb * sum_I a + I * za * zb

so one integer product serves symmetric and asymmetric grids of up to 8 bits; the sums vanish if zero is in the middle.
All integers before the final scales are exact, so the result equals the reference up to float rounding. Processors without
int8 instructions take the products in float32, over few enough channels that all sums stay exact. Channels over a
threshold have the code of zero there; their decoded columns are multiplied in float32 and added.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels.activation import outlier_channels, quantize_activation
from lowbit.kernels.instructions import faster_than_float32
from lowbit.kernels.ops import Kernel, PackedLinear, add_side, register
from lowbit.layouts import unpack, unpack_params
from lowbit.numerics import Affine, Int, PerChannel, PerTensor, PerToken, Spec

# Most channels in one float32 product: each adds at most 2**14, and integers are exact up to 2**24.
_EXACT_CHANNELS = 2**10
# |a - za| and |b - zb| are at most 255, and the sum over I must stay below 2**31.
_MAX_CHANNELS = 2**31 // 255**2


def _grid_problem(spec: Spec, what: str) -> str | None:
    grid = spec.grid
    if not isinstance(grid, Int) or grid.bits < 2 or grid.real_zero:
        kind = f"{type(grid).__name__} of {grid.bits} bits"
        return f"{what}s are {kind}, an integer product needs integers of 2 to 8 bits with integer zero points"
    return None


def why_not(layer: PackedLinear, rows: int) -> str | None:
    """The reason why the integer product cannot run ``layer``; None if it can."""
    if layer.act is None:
        return "the input is not quantized"
    problem = _grid_problem(layer.spec, "weight") or _grid_problem(layer.act, "activation")
    if problem:
        return problem
    if not isinstance(layer.spec.granularity, PerChannel | PerTensor):
        return f"weight scales are {layer.spec.granularity}, an integer sum needs one scale for each output channel"
    if not isinstance(layer.act.granularity, PerToken | PerTensor):
        return f"activation scales are {layer.act.granularity}, an integer sum needs one scale for each token"
    if layer.device.type != "cpu":
        return f"proved on the CPU only, the layer is on {layer.device.type}"
    if layer.shape[1] > _MAX_CHANNELS:
        return f"{layer.shape[1]} input channels could overflow 32 bits (limit {_MAX_CHANNELS})"
    return None


def run(x: Tensor, layer: PackedLinear) -> Tensor:
    """The integer product, and the side terms in floating point: x ``[..., I]`` floating, ``[..., O]`` in its dtype."""
    assert layer.act is not None
    x_TI = x.reshape(-1, x.shape[-1])
    codes_TI, act = quantize_activation(x_TI, layer.act, layer.act_params, layer.threshold)
    codes_OI = unpack(layer.tensors["codes"], layer.spec.grid.bits, layer.shape[1])
    weight = unpack_params(layer.tensors, layer.spec, layer.shape)
    assert isinstance(weight, Affine)
    act = act._replace(scale=torch.where(x_TI.isnan().any(1, keepdim=True), torch.nan, act.scale))
    y_TO = integer_product(codes_TI, layer.act, act, codes_OI, layer.spec, weight)
    if len(taken := outlier_channels(x_TI, layer.threshold)):
        w_Ok = layer.spec.grid.decode(codes_OI[:, taken], weight)
        y_TO = y_TO + x_TI[:, taken].to(w_Ok.dtype) @ w_Ok.T
    return add_side(y_TO.to(x.dtype).reshape(*x.shape[:-1], layer.shape[0]), x, layer)


def integer_product(codes_TI: Tensor, a_spec: Spec, a: Affine, codes_OI: Tensor, b_spec: Spec, b: Affine) -> Tensor:
    """The decoded input times the transposed decoded weight, float32 ``[T, O]``, by one integer product.

    Args:
        codes_TI, codes_OI: uint8.
        a_spec, b_spec: grids of integers with integer zero points.
        a: scales and zero points ``[T, 1]`` or ``[1, 1]``.
        b: scales and zero points ``[O, 1]`` or ``[1, 1]``.
    """
    a_TI, b_OI = _centred(codes_TI), _centred(codes_OI)
    za_T1, zb_O1 = _zero(a_spec, a.zero), _zero(b_spec, b.zero)
    y_TO = _product(a_TI, b_OI)
    if isinstance(zb_O1, Tensor) or zb_O1:
        y_TO = y_TO - a_TI.sum(1, keepdim=True, dtype=torch.int32) * _row(zb_O1)
    if isinstance(za_T1, Tensor) or za_T1:
        centre_O1 = b_OI.sum(1, keepdim=True, dtype=torch.int32) - codes_OI.shape[1] * zb_O1
        y_TO = y_TO - za_T1 * centre_O1.T
    return y_TO * a.scale * b.scale.T


def _product(a_TI: Tensor, b_OI: Tensor) -> Tensor:
    """``a @ b.T`` of int8, int32 ``[T, O]``."""
    # torch 2.13's product mistakes a single transposed column for a contiguous one and reads past its end.
    if a_TI.shape[1] == 1:
        return a_TI.int() * b_OI.T.int()
    if faster_than_float32(torch.int8) or a_TI.device.type != "cpu":
        return torch._int_mm(a_TI, b_OI.T)
    y_TO = torch.zeros(len(a_TI), len(b_OI), dtype=torch.int32)
    for a, b in zip(a_TI.split(_EXACT_CHANNELS, 1), b_OI.split(_EXACT_CHANNELS, 1), strict=True):
        y_TO += (a.float() @ b.float().T).to(torch.int32)
    return y_TO


def _centred(codes: Tensor) -> Tensor:
    """uint8 codes minus 128, as int8: the top bit flips."""
    return codes.bitwise_xor(128).view(torch.int8)


def _zero(spec: Spec, zero: Tensor | None) -> Tensor | int:
    """Zero points of the centred levels, int32 ``[G, 1]``, or one int for all."""
    if zero is None:
        return 2 ** (spec.grid.bits - 1) - 128
    return zero.to(torch.int32) - 128


def _row(zero: Tensor | int) -> Tensor | int:
    return zero.T if isinstance(zero, Tensor) else zero


register(Kernel("int8_torch", why_not, run))
