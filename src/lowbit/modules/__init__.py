"""Packed layers. A module is a description and buffers; what multiplies is in :mod:`lowbit.kernels`."""

from lowbit.modules.activation import (
    ActSpec,
    fake_activation,
    fake_quantize_activation,
    quantize_activation,
    static_params,
)
from lowbit.modules.attention import AttentionSpec, attend
from lowbit.modules.attention_ranges import OperandRanges
from lowbit.modules.draft_linear import DraftLinear, make_drafts, unmake_drafts, weight_shape
from lowbit.modules.kv_spec import KVSpec
from lowbit.modules.linear_format import LinearFormat
from lowbit.modules.quant_linear import QuantLinear, buffer_layout, features, prepare, restore, stored_bits_of
from lowbit.modules.residual import described_residual, residual_of, rotation_of, turn_residual, turned

__all__ = [
    "ActSpec",
    "AttentionSpec",
    "DraftLinear",
    "KVSpec",
    "LinearFormat",
    "OperandRanges",
    "QuantLinear",
    "attend",
    "buffer_layout",
    "described_residual",
    "fake_activation",
    "fake_quantize_activation",
    "features",
    "make_drafts",
    "prepare",
    "quantize_activation",
    "residual_of",
    "restore",
    "rotation_of",
    "static_params",
    "stored_bits_of",
    "turn_residual",
    "turned",
    "unmake_drafts",
    "weight_shape",
]
