"""The packed cache of a model: its format, fitted to the model's keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from lowbit.architectures import IMPLEMENTATION, for_config
from lowbit.caches import PackedCache, format_of
from lowbit.caches.rotary import frequencies
from lowbit.modules import KVRule, KVSpec
from lowbit.modules.kv_spec import LEAST_TOKENS
from lowbit.numerics import Block

LARGE = 16.0
"""A key bias of this magnitude dwarfs what varies from token to token, which is of the order of one."""


def packed_cache(
    model: nn.Module | PreTrainedConfig, spec: KVSpec | None, overrides: Sequence[KVRule] = ()
) -> PackedCache:
    """An empty cache for ``model``, or for its configuration, in these formats.

    Raises:
        ValueError: see :class:`~lowbit.caches.PackedCache`.
    """
    if isinstance(model, PreTrainedConfig):
        return PackedCache(model, spec, overrides)
    config: Any = model.config
    cache = PackedCache(config, spec, (*overrides, *rules_for_biases(model, spec, overrides)))
    cache.stay_packed(config.get_text_config(decoder=True)._attn_implementation == IMPLEMENTATION)
    return cache


def rules_for_biases(model: Any, spec: KVSpec | None, overrides: Sequence[KVRule] = ()) -> tuple[KVRule, ...]:
    """Rules for the layers of ``model`` whose key projection has a bias that is :data:`LARGE` somewhere.

    Their keys are packed before the rotary embedding, where a bias is the same for every token, and centred, which takes it
    off. After the embedding it turns with the position, and 4 bits hold little else (transformers' own 4-bit cache on
    Qwen2.5 answers nothing right).
    """
    table = for_config(model.config)
    path = next((entry.path for entry in table.linears if entry.role == "k"), None)
    if path is None:
        return ()
    try:
        frequencies(model.config.get_text_config(decoder=True), 2)
        turns = True
    except ValueError:
        turns = False
    blocks = model.get_submodule(table.blocks)
    rules = []
    for i, block in enumerate(blocks):
        bias = getattr(block.get_submodule(path), "bias", None)
        form = format_of(i, len(blocks), spec, overrides)
        if form is None or form.key is None or bias is None or bias.abs().max() < LARGE:
            continue
        in_blocks = isinstance(form.key.granularity, Block) or isinstance(form.value and form.value.granularity, Block)
        recent = form.recent if in_blocks else max(form.recent, LEAST_TOKENS)
        fitted = replace(form, before_rope=turns, centred=recent >= LEAST_TOKENS, recent=recent)
        rules.append(KVRule((i,), fitted))
    return tuple(rules)
