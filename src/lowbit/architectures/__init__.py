"""Model architectures as tables: the linears of a model, the inputs they share, and the transforms that each edge carries.

`for_config` returns the table of a model type, or discovers blocks and linears if there is none. `resolve` applies a table
to one block. `fold` folds a transform into the block's weights, and `rotate_residual` a rotation of the stream between the
blocks. README.md says how to add a model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lowbit.architectures import bloom, falcon, gemma, gpt2, gpt_neox, llama, moe, opt, phi3, qwen3
from lowbit.architectures.attention import (
    IMPLEMENTATION,
    attention_modules,
    attention_spec,
    check_attention,
    observed,
    operand_ranges,
    quantize_attention,
    simulated_layers,
)
from lowbit.architectures.decoder import auto_class, blocks_path, decoder_of, is_language_model
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
    "auto_class",
    "block_modules",
    "check_attention",
    "discover",
    "fold",
    "for_config",
    "is_language_model",
    "learned_positions",
    "model_blocks",
    "model_types",
    "needs_bias",
    "observed",
    "operand_ranges",
    "quantize_attention",
    "resolve",
    "rotate_residual",
    "simulated_layers",
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
    available. A model of text and images has the table of its text part, with paths in the whole model.

    Raises:
        ValueError: there is no table, and transformers cannot build a language model from `config`.
    """
    build = _TABLES.get(config.model_type)
    if build is not None:
        return build(config)
    model = _empty(config)
    text_config = config.get_text_config()
    build = _TABLES.get(text_config.model_type)
    if text_config is config or build is None:
        unfuse_experts(model)
        return discover(model)
    return _inside(build(text_config), model, config.model_type)


def _empty(config: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            # A configuration class of the model's own exists only where its code is trusted.
            own = type(config).__module__.startswith("transformers_modules")
            return auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=own)
    except Exception as error:
        raise ValueError(
            f"Model type {config.model_type!r} has no architecture table, and no empty model could be built to "
            f"discover one ({error}); expected one of {model_types()} or a language model of transformers."
        ) from error


def _inside(table: Architecture, model: PreTrainedModel, model_type: str) -> Architecture:
    """The table of a text model for one that holds it: the same blocks, at the paths of `model`."""
    decoder = decoder_of(model)
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    alone = table.blocks.partition(".")[0]  # the decoder's name in a model of text alone
    modules = {path for path, _ in model.named_modules()}

    def place(path: str) -> str:
        if path in modules and not path.startswith(f"{alone}."):
            return path
        inner = f"{prefix}.{path.removeprefix(f'{alone}.')}"
        if inner not in modules:
            raise ValueError(f"{type(model).__name__} has no {inner}, which is {path} in a {table.name!r} model")
        return inner

    if place(table.blocks) != blocks_path(model):
        raise ValueError(f"the blocks of {type(model).__name__} are {blocks_path(model)}, not {place(table.blocks)}")
    return replace(
        table,
        model_types=(*table.model_types, model_type),
        blocks=place(table.blocks),
        embed=tuple(map(place, table.embed)),
        final_norm=None if table.final_norm is None else place(table.final_norm),
        after=tuple(map(place, table.after)),
        head=None if table.head is None else place(table.head),
        token_step="it takes images too",
    )
