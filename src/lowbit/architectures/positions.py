"""How many positions a model can tell apart."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_OFFSET = 8
"""Rows that a table of positions may have beyond the model's own count (OPT has two)."""


def learned_positions(model: PreTrainedModel) -> int | None:
    """Positions of a model that looks each up in a table; None: its positions are computed, without a limit.

    The table is learned (an embedding), or a buffer that the model computed for as many positions as it has.

    Args:
        model: meta tensors are enough.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = model.get_input_embeddings()
    tables = (each for each in model.modules() if isinstance(each, nn.Embedding) and each is not tokens)
    if any(limit <= each.num_embeddings <= limit + _OFFSET for each in tables):
        return limit
    # Of exactly so many rows: a table with rows to spare (XGLM) grows when more are asked for.
    computed = (each for each in model.buffers() if each.dim() == 2 and each.is_floating_point())
    return limit if any(len(each) == limit != each.shape[1] for each in computed) else None
