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
from transformers import PreTrainedModel

from lowbit.training.objectives import Objective

PIECE = 64
"""Tokens of a piece."""


def loss_in_pieces(model: Any, ids_BT: Tensor, objective: Objective) -> Tensor:
    """The mean of ``objective`` over all tokens of ``ids_BT`` that are followed by one: a scalar.

    It equals ``objective.loss`` up to the order of sums. A model without a part that answers with hidden states gives the logits of
    all tokens at once.

    Args:
        model: a transformers causal language model.
        ids_BT: int64.
        objective: one that :attr:`~lowbit.training.Objective.reads_next` alone.
    """
    tokens = ids_BT.shape[1] - 1
    asked = _asked_first(model, ids_BT)
    output: Any = None if asked is None else asked.module(*asked.args, **asked.kwargs)
    if asked is None or not hasattr(output, "last_hidden_state"):  # no part of it answers with hidden states
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        return objective.of_tokens(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()) / (len(ids_BT) * tokens)
    body, hidden_BTd = asked.module, output.last_hidden_state
    total = torch.zeros((), device=hidden_BTd.device)

    def summed(first: int, piece_BTd: Tensor) -> Tensor:
        last = first + piece_BTd.shape[1]
        with _answering(body, type(output)(**{**output, "last_hidden_state": piece_BTd})):
            logits_BTV = model(input_ids=ids_BT[:, first:last], use_cache=False).logits
        return objective.of_tokens(logits_BTV.flatten(0, 1), ids_BT[:, first + 1 : last + 1].flatten())

    for first in range(0, tokens, PIECE):
        piece_BTd = hidden_BTd[:, first : min(first + PIECE, tokens)]
        some = checkpoint(summed, first, piece_BTd, use_reentrant=False)
        assert isinstance(some, Tensor)
        total = total + some
    return total / (len(ids_BT) * tokens)


class _Asked(Exception):
    """A part of a model was asked, with these arguments; it has not begun."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.module, self.args, self.kwargs = module, args, kwargs


def _asked_first(model: nn.Module, ids_BT: Tensor) -> _Asked | None:
    """The model inside ``model`` that its forward pass asks for hidden states; None: there is none.

    ``base_model`` does not say it: OPT's head asks the decoder inside its base, and Llama 4's text model names no base.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Asked(module, args, kwargs)

    inner = [module for module in model.modules() if module is not model and isinstance(module, PreTrainedModel)]
    hooks = [module.register_forward_pre_hook(stop, with_kwargs=True) for module in inner]
    try:
        if hooks:
            model(input_ids=ids_BT, use_cache=False)
    except _Asked as asked:
        return asked.with_traceback(None)  # its frames would keep tensors
    finally:
        for hook in hooks:
            hook.remove()
    return None


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
