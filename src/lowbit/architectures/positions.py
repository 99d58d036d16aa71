"""How many positions a model can tell apart."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_OFFSET = 8
"""Rows that a table of positions may have beyond the model's own count (OPT has two)."""


def learned_positions(model: PreTrainedModel) -> int | None:
    """Positions of a model that learned an embedding for each; None: its positions are computed, without a limit.

    Args:
        model: meta tensors are enough.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = model.get_input_embeddings()
    tables = (each for each in model.modules() if isinstance(each, nn.Embedding) and each is not tokens)
    return limit if any(limit <= each.num_embeddings <= limit + _OFFSET for each in tables) else None
