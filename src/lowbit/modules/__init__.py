"""Packed layers. A module is a description and buffers; what multiplies is in :mod:`lowbit.kernels`."""

from lowbit.modules.activation import ActSpec, fake_quantize_activation, quantize_activation
from lowbit.modules.attention import AttentionSpec, attend
from lowbit.modules.quant_linear import QuantLinear, buffer_layout, features, prepare, restore, stored_bits_of

__all__ = [
    "ActSpec",
    "AttentionSpec",
    "QuantLinear",
    "attend",
    "buffer_layout",
    "fake_quantize_activation",
    "features",
    "prepare",
    "quantize_activation",
    "restore",
    "stored_bits_of",
]
