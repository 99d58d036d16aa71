"""Packed layers. A module is a description and buffers; what multiplies is in :mod:`lowbit.kernels`."""

from lowbit.modules.activation import ActSpec, fake_quantize_activation, quantize_activation
from lowbit.modules.attention import AttentionSpec, attend
from lowbit.modules.attention_ranges import OperandRanges
from lowbit.modules.kv_spec import KVSpec
from lowbit.modules.linear_format import LinearFormat
from lowbit.modules.quant_linear import QuantLinear, buffer_layout, features, prepare, restore, stored_bits_of
from lowbit.modules.residual import described_residual, residual_of, rotation_of, turn_residual, turned

__all__ = [
    "ActSpec",
    "AttentionSpec",
    "KVSpec",
    "LinearFormat",
    "OperandRanges",
    "QuantLinear",
    "attend",
    "buffer_layout",
    "described_residual",
    "fake_quantize_activation",
    "features",
    "prepare",
    "quantize_activation",
    "residual_of",
    "restore",
    "rotation_of",
    "stored_bits_of",
    "turn_residual",
    "turned",
]
