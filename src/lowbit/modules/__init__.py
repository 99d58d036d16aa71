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
from lowbit.modules.cache_calibration import (
    CacheCalibration,
    CalibrationSpec,
    cache_calibration,
    calibrate_cache,
    calibrations,
)
from lowbit.modules.description import LinearDescription
from lowbit.modules.draft_linear import DraftLinear, SharedInput, make_drafts, unmake_drafts, weight_shape
from lowbit.modules.kv_spec import KVFormats, KVRule, KVSpec, kv_formats, set_kv_formats
from lowbit.modules.linear_format import LinearFormat
from lowbit.modules.packed_layers import kept_weights, prepare, restore
from lowbit.modules.quant_embedding import QuantEmbedding, scale_of
from lowbit.modules.quant_linear import QuantLinear
from lowbit.modules.residual import (
    ResidualMatrix,
    ResidualRotation,
    StoredRotation,
    hold_residual,
    residual_of,
    turn_residual,
    turned,
    turning,
)
from lowbit.modules.serialize_transforms import PartDescription, TensorInfo
from lowbit.modules.validation import check_finite, check_tensors

__all__ = [
    "ActSpec",
    "AttentionSpec",
    "CacheCalibration",
    "CalibrationSpec",
    "DraftLinear",
    "KVFormats",
    "KVRule",
    "KVSpec",
    "LinearDescription",
    "LinearFormat",
    "OperandRanges",
    "PartDescription",
    "QuantEmbedding",
    "QuantLinear",
    "ResidualMatrix",
    "ResidualRotation",
    "SharedInput",
    "StoredRotation",
    "TensorInfo",
    "attend",
    "cache_calibration",
    "calibrate_cache",
    "calibrations",
    "check_finite",
    "check_tensors",
    "fake_activation",
    "fake_quantize_activation",
    "hold_residual",
    "kept_weights",
    "kv_formats",
    "make_drafts",
    "prepare",
    "quantize_activation",
    "residual_of",
    "restore",
    "scale_of",
    "set_kv_formats",
    "static_params",
    "turn_residual",
    "turned",
    "turning",
    "unmake_drafts",
    "weight_shape",
]
