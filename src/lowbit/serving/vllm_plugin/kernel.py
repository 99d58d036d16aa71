"""This project's products as a linear kernel of vLLM's: integers of 2 to 8 bits of compressed-tensors checkpoints.

vLLM asks its kernels in order. On CPUs its own takes 4 bits, so that this one takes the others;
``VLLM_DISABLED_KERNELS=CPUWNA16LinearKernel`` leaves 4 bits to it too.

Shapes: O output channel, I input channel, G group of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig  # pyright: ignore

from lowbit.layouts import pack, packed_width, unpack
from lowbit.modules import LinearDescription, QuantLinear
from lowbit.numerics import Int, PerChannel, PerGroup, Spec
from lowbit.serving.vllm_plugin.methods import Packed, announced, product


class LowbitLinearKernel(MPLinearKernel):
    """Integers with scales, and zero points, of a row or a group; any number of rows."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        kind = c.weight_type
        wide, share = c.full_weight_shape[0], c.partition_weight_shape[0]
        if not kind.is_integer() or kind.is_signed() or not 2 <= kind.size_bits <= 8:
            return False, f"weights are integers of 2 to 8 bits without a sign, found {kind}"
        if kind.has_bias() and kind.bias != 2 ** (kind.size_bits - 1):
            return False, f"codes are counted from {2 ** (kind.size_bits - 1)}, found {kind.bias}"
        if share != wide and share * kind.size_bits % 32:
            return False, f"{share} codes of {kind.size_bits} bits of a process do not fill whole words"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        codes, scale, zero = self._get_weight_params(layer)
        bits, (wide, high) = self.config.weight_type.size_bits, self.config.partition_weight_shape
        if zero is not None and any(width * bits % 32 for width in layer.output_partition_sizes):
            raise ValueError(
                f"zero points of {bits} bits of {layer.output_partition_sizes} outputs do not fill whole words each, and "
                "vLLM joins such words wrongly"
            )
        description, tensors = _packed(bits, wide, high, codes.data, scale.data, None if zero is None else zero.data)
        made = QuantLinear(description, tensors)
        made.prepare()
        layer.packed = Packed([made])
        self._name = announced(layer.prefix, layer.packed)
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name in layer._parameters:
                setattr(layer, name, nn.Parameter(torch.empty(0), requires_grad=False))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = product(x, self._name, layer.packed)
        return y if bias is None else y + bias


def _packed(
    bits: int, wide: int, high: int, words: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[LinearDescription, dict[str, Tensor]]:
    """Words int32 ``[O, words]``, scales ``[O, G]`` and zero points int32 ``[words of O, G]`` in the canonical layout; a row of
    words is a row of codes, filled up."""
    stream = words.contiguous().view(torch.uint8)[:, : packed_width(wide, bits)]
    tensors = {"codes": stream.contiguous(), "scale": scale.contiguous()}
    groups = scale.shape[1]
    if zero is not None:
        counted = unpack(zero.T.contiguous().view(torch.uint8)[:, : packed_width(high, bits)].contiguous(), bits, high)
        tensors["zero"] = pack(counted.T.reshape(-1).contiguous(), bits)
    granularity = PerChannel() if groups == 1 else PerGroup(wide // groups)
    dtype = str(scale.dtype).removeprefix("torch.")
    spec = Spec(Int(bits, symmetric=zero is None), granularity, scale_dtype=dtype)
    return LinearDescription(spec, (high, wide)), tensors
