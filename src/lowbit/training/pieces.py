"""The loss of a window, a piece of its tokens at a time: the logits of all its tokens are never in memory together.

The logits of a window of 512 tokens and 49,152 words take 100 MB in float32, and a loss in one go holds them three to four
times. Here the blocks run once; then the part behind them runs on one piece of the hidden states after another, and again
in the backward pass.

Shapes: B window of a batch, T token, d hidden channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit.training.objectives import Objective

PIECE = 64
"""Tokens of a piece."""


def loss_in_pieces(model: Any, ids_BT: Tensor, objective: Objective) -> Tensor:
    """The mean of ``objective`` over all tokens of ``ids_BT`` that are followed by one: a scalar.

    It equals ``objective.loss`` up to the order of sums.

    Args:
        model: a transformers causal language model.
        ids_BT: int64.
        objective: one that :attr:`~lowbit.training.Objective.reads_next` alone.
    """
    base = model.base_model
    output = base(input_ids=ids_BT, use_cache=False)
    hidden_BTd, tokens = output.last_hidden_state, ids_BT.shape[1] - 1
    total = torch.zeros((), device=hidden_BTd.device)

    def summed(first: int, piece_BTd: Tensor) -> Tensor:
        last = first + piece_BTd.shape[1]
        with _answering(base, type(output)(**{**output, "last_hidden_state": piece_BTd})):
            logits_BTV = model(input_ids=ids_BT[:, first:last], use_cache=False).logits
        return objective.of_tokens(logits_BTV.flatten(0, 1), ids_BT[:, first + 1 : last + 1].flatten())

    for first in range(0, tokens, PIECE):
        piece_BTd = hidden_BTd[:, first : min(first + PIECE, tokens)]
        some = checkpoint(summed, first, piece_BTd, use_reentrant=False)
        assert isinstance(some, Tensor)
        total = total + some
    return total / (len(ids_BT) * tokens)


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """While open, ``module`` answers with ``output``, whatever it is asked."""
    before = module.__dict__.get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.forward = before
