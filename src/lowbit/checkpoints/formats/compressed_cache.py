"""Quantized caches in compressed-tensors: ``kv_cache_scheme`` of config.json, and the scales of every attention module.

One form is known to vLLM (its ``CompressedTensorsKVCacheMethod``) and to the package: E4M3, keys behind the rotary embedding, with one
static scale for a layer's keys and one for its values: ``ATTENTION.k_scale`` and ``ATTENTION.v_scale``, float32 [1] (strategy
``tensor``). Here that is a :class:`~lowbit.modules.KVSpec` of ``PerTensor`` ranges that all heads share, whose range
is 448 scales to both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel, PlainTensor
from lowbit.modules import CalibrationSpec, KVSpec
from lowbit.modules.cache_calibration import CALIBRATION
from lowbit.numerics import Float, PerTensor, Spec

_FLOATS = Float(4, 3, "fn")
_E4M3 = Spec(_FLOATS, PerTensor(), scale_dtype="float32")
CACHE = KVSpec(_E4M3, _E4M3, shared_heads=True)
"""The cache that the format describes."""
NOTE = (
    "The cache is quantized by readers that know kv_cache_scheme, such as vLLM; transformers 5.24 with compressed-tensors 0.20 leaves it as "
    "it is and reports its scales as unexpected."
)
"""What whoever loads such a model should know."""
_RANGES = {"key_range": "k_scale", "value_range": "v_scale"}
_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def why_no_cache(description: ModelDescription) -> str:
    """Why the format cannot describe the cache of a model, or ""."""
    if not description.cache:
        return ""
    kv = description.kv
    if description.kv_overrides or kv is None:
        return "it has one format for the cache of all layers"
    if replace(kv, past_only=True) != CACHE:
        return (
            "its caches are E4M3 with one static scale for all keys and one for all values of a layer; "
            "--kv kv-fp8:ranges=static,heads=shared makes one"
        )
    return ""


def scheme(description: ModelDescription) -> dict[str, Any] | None:
    """The content of ``kv_cache_scheme``; None without a quantized cache."""
    return dict(_SCHEME) if description.cache else None


def with_scales(model: PackedModel) -> PackedModel:
    """The model with scales in place of ranges, under the format's names."""

    def parts() -> Iterator[PackedLayer | PlainTensor]:
        for part in model.parts():
            path, _, name = part.name.rpartition(f".{CALIBRATION}.")
            if isinstance(part, PlainTensor) and name in _RANGES:
                part = PlainTensor(f"{path}.{_RANGES[name]}", _scale(part.tensor))
            yield part

    return replace(model, parts=parts) if model.description.cache else model


def _scale(range_G2: Tensor) -> Tensor:
    """The scale of the ranges that all heads share, float32 ``[1]``."""
    return _FLOATS.from_range(range_G2[:1, :1].float(), range_G2[:1, 1:].float()).scale.reshape(1)


def is_known(found: Mapping[str, Any]) -> bool:
    """Whether a ``kv_cache_scheme`` is the one that is read."""
    return all(found.get(key, False if key == "dynamic" else None) == value for key, value in _SCHEME.items())


def with_ranges(model: PackedModel, scales: Mapping[str, Tensor], config: Any) -> PackedModel:
    """The model with the ranges of its cache.

    Args:
        model: without its cache.
        scales: every tensor called ``k_scale`` or ``v_scale`` by name.
        config: transformers' config of the model.

    Raises:
        ValueError: an attention module with one of the two, or scales of another shape or sign.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found: dict[str, Tensor] = {}
    for path in sorted({name.rpartition(".")[0] for name in scales}):
        for buffer, name in _RANGES.items():
            scale = scales.get(f"{path}.{name}")
            if scale is None or scale.numel() != 1 or not scale.float().item() > 0:
                raise ValueError(f"{path} needs one positive {name} beside the other, found {scale}")
            end = scale.float().reshape(1, 1) * _FLOATS.max_level
            found[f"{path}.{CALIBRATION}.{buffer}"] = torch.cat([-end, end], 1).expand(heads, 2).contiguous()
    paths = {name.rpartition(f".{CALIBRATION}.")[0] for name in found}
    calibration = CalibrationSpec.of(_RANGES, (heads, dim, dim))
    description = replace(model.description, kv=CACHE, kv_calibration=dict.fromkeys(sorted(paths), calibration))

    def parts() -> Iterator[PackedLayer | PlainTensor]:
        yield from model.parts()
        for name, tensor in found.items():
            yield PlainTensor(name, tensor)

    return replace(model, description=description, parts=parts)
