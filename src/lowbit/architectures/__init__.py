"""Model architectures as tables: the linears of a model, the inputs they share, and the transforms that each edge carries.

`for_config` returns the table of a model type, or discovers blocks and linears if there is none. `resolve` applies a table
to one block. `fold` folds a transform into the block's weights, and `rotate_residual` a rotation of the stream between the
blocks. README.md says how to add a model.
"""

from __future__ import annotations

from typing import Any

import torch

from lowbit.architectures import bloom, falcon, gemma, gpt2, gpt_neox, llama, moe, opt, phi3, qwen3
from lowbit.architectures.attention import (
    IMPLEMENTATION,
    attention_modules,
    attention_spec,
    check_attention,
    observed,
    operand_ranges,
    quantize_attention,
)
from lowbit.architectures.discover import discover
from lowbit.architectures.experts import UnfusedExperts, unfuse_experts
from lowbit.architectures.fold import add_bias, fold, needs_bias
from lowbit.architectures.positions import learned_positions
from lowbit.architectures.residual import rotate_residual
from lowbit.architectures.resolve import ModelBlock, block_modules, model_blocks, resolve
from lowbit.architectures.resolved import Port, ResolvedBlock, ResolvedEdge, ResolvedInput, ResolvedResidual
from lowbit.architectures.table import ROLE_GROUPS, Architecture, Kind, TokenStep

__all__ = [
    "IMPLEMENTATION",
    "ROLE_GROUPS",
    "Architecture",
    "Kind",
    "ModelBlock",
    "Port",
    "ResolvedBlock",
    "ResolvedEdge",
    "ResolvedInput",
    "ResolvedResidual",
    "TokenStep",
    "UnfusedExperts",
    "add_bias",
    "attention_modules",
    "attention_spec",
    "block_modules",
    "check_attention",
    "discover",
    "fold",
    "for_config",
    "learned_positions",
    "model_blocks",
    "model_types",
    "needs_bias",
    "observed",
    "operand_ranges",
    "quantize_attention",
    "resolve",
    "rotate_residual",
    "unfuse_experts",
]

_FAMILIES = (bloom, falcon, gemma, gpt2, gpt_neox, llama, moe, opt, phi3, qwen3)
_TABLES = {model_type: build for family in _FAMILIES for model_type, build in family.TABLES.items()}


def model_types() -> tuple[str, ...]:
    """The model types that have a table, sorted."""
    return tuple(sorted(_TABLES))


def for_config(config: Any) -> Architecture:
    """The architecture table for a transformers configuration, by its `model_type`.

    A type without a table gets a discovered one, from an empty model on the meta device; its `warnings` name what is not
    available.

    Raises:
        ValueError: there is no table, and transformers cannot build a causal language model from `config`.
    """
    build = _TABLES.get(config.model_type)
    return _discover_from(config) if build is None else build(config)


def _discover_from(config: Any) -> Architecture:
    from transformers import AutoModelForCausalLM  # slow to import, and most configurations have a table

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ValueError(
            f"Model type {config.model_type!r} has no architecture table, and no empty model could be built to "
            f"discover one ({error}); expected one of {model_types()} or a causal language model of transformers."
        ) from error
    unfuse_experts(model)
    return discover(model)
