"""Split projections, RMSNorm, rotary embedding, gated MLP. Biases and grouped heads come from the block itself."""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import decoder, plain_token_step
from lowbit.architectures.table import Architecture

MODEL_TYPES = ("llama", "mistral", "qwen2", "smollm3", "granite")
_NO_TOKEN_STEP = {
    "smollm3": "some of its blocks have no rotary embedding",
    "granite": "it scales its residual stream and scores",
}


def build(config: Any) -> Architecture:
    step = _NO_TOKEN_STEP.get(config.model_type) or plain_token_step(config)
    return decoder(config, name="llama", model_types=MODEL_TYPES, token_step=step)


TABLES = dict.fromkeys(MODEL_TYPES, build)
