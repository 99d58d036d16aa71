"""Norm gains of 1 + weight. From the second generation, norms also follow attention and MLP.

The norms after attention and MLP feed only the residual stream. They have no edges, and the stream cannot rotate because of
them. The MLP's input norm is then `pre_feedforward_layernorm`. The third generation adds norms on queries and keys.
"""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import decoder
from lowbit.architectures.table import Architecture

_NORMS_AFTER = "norms follow its attention and MLP"


def gemma(config: Any) -> Architecture:
    step = "its embeddings are scaled and its gate is GELU"
    return decoder(config, name="gemma", model_types=("gemma",), gain_offset=1.0, token_step=step)


def gemma2(config: Any) -> Architecture:
    return decoder(
        config,
        name="gemma2",
        model_types=("gemma2",),
        gain_offset=1.0,
        mlp_norm="pre_feedforward_layernorm",
        output_norms=True,
        token_step=_NORMS_AFTER,
    )


def gemma3(config: Any) -> Architecture:
    return decoder(
        config,
        name="gemma3",
        model_types=("gemma3_text",),
        gain_offset=1.0,
        mlp_norm="pre_feedforward_layernorm",
        query_key_norms=True,
        output_norms=True,
        token_step=_NORMS_AFTER,
    )


TABLES = {"gemma": gemma, "gemma2": gemma2, "gemma3_text": gemma3}
