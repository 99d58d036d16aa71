"""The llama shape with norms on each head of queries and keys."""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import decoder, plain_token_step
from lowbit.architectures.table import Architecture


def build(config: Any) -> Architecture:
    return decoder(
        config, name="qwen3", model_types=("qwen3",), query_key_norms=True, token_step=plain_token_step(config)
    )


TABLES = {"qwen3": build}
