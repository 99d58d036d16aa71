"""Bytes of a cache of keys and values, from a model's config and the formats of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowbit.caches import PackedCache, PackedLayer
from lowbit.checkpoints.config import check_positions
from lowbit.checkpoints.source import ModelSource
from lowbit.modules import CalibrationSpec, KVFormats, KVSpec
from lowbit.numerics import Spec
from lowbit.plan.layers import weight_text

USUAL_CONTEXT = 4096
"""Tokens of a sequence where the model names no limit."""


@dataclass(frozen=True)
class PlannedCache:
    """Bytes of keys and values of one sequence.

    Attributes:
        tokens: its length.
        bytes: in the recipe's formats.
        bytes_floating: in the model's dtype.
    """

    tokens: int
    bytes: int
    bytes_floating: int


def planned_cache(source: ModelSource, formats: KVFormats, tokens: int | None) -> PlannedCache | None:
    """The cache of a sequence of ``tokens``, or of as many as the model was made for; None where nothing is known of it.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    if tokens is not None:
        check_positions(source, tokens, f"a sequence of {tokens} tokens")
    tokens = tokens or context_of(source.config)
    packed, floating = (cache_bytes(source.config, each, tokens, source.dtype) for each in (formats, KVFormats()))
    return None if packed is None or floating is None else PlannedCache(tokens, packed, floating)


def context_of(config: Any) -> int:
    """The tokens that a model was made for."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or USUAL_CONTEXT


def cache_bytes(config: Any, formats: KVFormats, tokens: int, dtype: torch.dtype) -> int | None:
    """Bytes of keys and values of one sequence of ``tokens``; None for a model without layers that hold them,
    or with latent attention.

    Layers with a sliding window hold no more than that. States of a fixed size (recurrent and convolutional layers) are not
    counted. What a format keeps floating, sinks and at most so many recent tokens, is.

    Raises:
        ValueError: formats that the model cannot have.
    """
    text = config.get_text_config(decoder=True)
    heads = _heads(text)
    if heads is None:
        return None
    count, dim = heads
    cache = PackedCache(text, formats.kv, formats.overrides) if formats else DynamicCache(config=text)
    total, numbers = 0.0, 2 * count * dim
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            spec = layer.spec
            whole = min(tokens, spec.recent + spec.sink)
            total += numbers * ((tokens - whole) * spec.bits(dim, count) / 8 + whole * dtype.itemsize)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            total += numbers * min(tokens, layer.sliding_window) * dtype.itemsize
        elif isinstance(layer, DynamicLayer):
            total += numbers * tokens * dtype.itemsize
    return round(total)


def cache_bits(config: Any, formats: KVFormats) -> float | None:
    """Bits for each number of the keys and values of a long sequence, over the layers of full attention; None: not quantized."""
    text = config.get_text_config(decoder=True)
    heads = _heads(text)
    if not formats or heads is None:
        return None
    layers = PackedCache(text, formats.kv, formats.overrides).layers
    bits = [
        layer.spec.bits(heads[1], heads[0]) if isinstance(layer, PackedLayer) else 16.0
        for layer in layers
        if _grows(layer)
    ]
    return sum(bits) / len(bits)


def _grows(layer: Any) -> bool:
    return isinstance(layer, PackedLayer) or type(layer) is DynamicLayer


def _heads(text: Any) -> tuple[int, int] | None:
    """Key-value heads and their channels."""
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads or getattr(text, "kv_lora_rank", None):  # latent keys have other widths
        return None
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return getattr(text, "num_key_value_heads", None) or heads, dim


def cache_texts(formats: KVFormats) -> list[str]:
    """The formats in words, those of all layers first: ``cache: keys int2 asymmetric ...``."""
    texts = [] if formats.kv is None else [f"cache: {_text(formats.kv)}"]
    for rule in formats.overrides:
        layers = ", ".join(map(str, rule.layers))
        texts.append(f"cache of layers {layers}: {'left as it is' if rule.kv is None else _text(rule.kv)}")
    return texts


def _text(spec: KVSpec) -> str:
    parts = [f"{name} {_side(form, rotation)}" for name, form, rotation in _sides(spec)]
    parts += [f"the newest {spec.recent} tokens as they are"] if spec.recent else []
    parts += [f"the first {spec.sink} as they are"] if spec.sink else []
    parts += ["key means taken off"] if spec.centred else []
    parts += ["keys before the rotary embedding"] if spec.before_rope else []
    parts += ["ranges shared by all heads"] if spec.shared_heads else []
    changed = {"keys": (spec.key_scaled, spec.key_shifted), "values": (spec.value_scaled, spec.value_shifted)}
    for name, (scaled, shifted) in changed.items():
        words = [word for word, there in (("shifts", shifted), ("scales", scaled)) if there]
        parts += [f"{name} with calibrated {' and '.join(words)}"] if words else []
    return ", ".join(parts)


def calibration_bytes(config: Any, formats: KVFormats) -> int:
    """Bytes of what a checkpoint carries for its cache, as far as the config says the sizes of heads."""
    specs = zip(_calibrated(config, formats), calibrated_heads(config, formats))
    return sum(CalibrationSpec.of(spec.calibrated, heads).nbytes for spec, heads in specs)


def calibrated_heads(config: Any, formats: KVFormats) -> list[tuple[int, int, int]]:
    """Key-value heads and channels of keys and of values of each layer whose cache is calibrated."""
    heads = _heads(config.get_text_config(decoder=True))
    return [] if heads is None else [(heads[0], heads[1], heads[1])] * len(_calibrated(config, formats))


def _calibrated(config: Any, formats: KVFormats) -> list[KVSpec]:
    """Formats of the layers that need calibration."""
    if not formats.calibrated:
        return []
    layers = PackedCache(config, formats.kv, formats.overrides).layers
    return [layer.spec for layer in layers if isinstance(layer, PackedLayer) and layer.spec.calibrated]


def _sides(spec: KVSpec) -> tuple[tuple[str, Spec | None, str | None], ...]:
    return ("keys", spec.key, spec.key_rotation), ("values", spec.value, spec.value_rotation)


def _side(form: Spec | None, rotation: str | None) -> str:
    return "as they are" if form is None else weight_text(form) + (f", rotated ({rotation})" if rotation else "")
