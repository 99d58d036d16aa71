"""Split projections, RMSNorm, rotary embedding, gated MLP. Biases and grouped heads come from the block itself."""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import decoder
from lowbit.architectures.table import Architecture

MODEL_TYPES = ("llama", "mistral", "qwen2", "smollm3", "granite")


def build(config: Any) -> Architecture:
    return decoder(config, name="llama", model_types=MODEL_TYPES)


TABLES = dict.fromkeys(MODEL_TYPES, build)
