"""Log-likelihoods of continuations after their contexts, as lm-eval computes them for a causal model.

Read from lm-eval 0.4.13 (``TemplateLM._encode_pair``, ``HFLM._loglikelihood_tokens``) and tested against it item by item:

* White space at the end of a context belongs to the continuation. Context and continuation are tokenized together, and the
  tokens after as many as the context alone has are the continuation. A context without a word is BOS (EOS without one).
* Tokens that do not fit into the model's positions are cut from the left.
* The score is the sum of log probabilities of the continuation's tokens; it is greedy if each of them is the model's first choice.

The requests of an item, which mostly share a context, run as one batch padded on the right; those with the same input (answers of
one token) run once. A causal model does not see what stands to the right. Models whose ranges belong to a whole call read each
request alone (:func:`~lowbit.evaluation.forward.rows_are_alone`).

Shape suffixes: B requests, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.evaluation.forward import evaluating, logits_of, rows_are_alone


class Request(NamedTuple):
    """A text and what may follow it."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a continuation.

    Attributes:
        nats: sum of the log probabilities of its tokens; NaN if the model is broken.
        greedy: whether each of its tokens is the model's first choice.
        tokens: its length.
        cut: tokens that did not fit into the model's positions.
    """

    nats: float
    greedy: bool
    tokens: int
    cut: int = 0


def likelihoods(
    model: PreTrainedModel, tokenizer: Any, items: Iterable[Sequence[Request]]
) -> Iterator[tuple[Likelihood, ...]]:
    """The likelihood of every request of every item, item by item.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer; special tokens that it puts before a text are used.
        items: requests that are scored together.

    Raises:
        ValueError: a continuation without a token, or one that is longer than the model's positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    alone = not rows_are_alone(model)
    with evaluating(model):
        for requests in items:
            pairs = [_encode(tokenizer, request) for request in requests]
            cuts = [0 if limit is None else max(0, len(c) + len(t) - limit - 1) for c, t in pairs]
            for request, (_, target) in zip(requests, pairs, strict=True):
                if not target or (limit is not None and len(target) > limit):
                    raise ValueError(
                        f"the continuation {request.continuation[:60]!r} has {len(target)} tokens; expected 1 to {limit or 'any number'}"
                    )
            inputs = [(c + t)[cut:-1] for (c, t), cut in zip(pairs, cuts, strict=True)]
            logits = _logits(model, inputs, [len(target) for _, target in pairs], alone)
            yield tuple(_score(each, target, cut) for each, (_, target), cut in zip(logits, pairs, cuts, strict=True))


def _logits(model: PreTrainedModel, inputs: list[list[int]], counts: list[int], alone: bool) -> list[Tensor]:
    """For each input the logits ``[count, V]`` of its last ``count`` positions."""
    unique = list(dict.fromkeys(map(tuple, inputs)))
    most = {ids: max(n for i, n in zip(inputs, counts, strict=True) if tuple(i) == ids) for ids in unique}
    if alone or len(unique) == 1:
        rows = {ids: logits_of(model, torch.tensor(ids), last=most[ids]) for ids in unique}
    else:
        width = max(map(len, unique))
        kept = width - min(len(ids) - most[ids] for ids in unique)
        ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in unique], device=model.device)
        logits_BTV = model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept).logits
        ends = [len(ids) - (width - kept) for ids in unique]
        rows = {ids: row_TV[end - most[ids] : end] for ids, row_TV, end in zip(unique, logits_BTV, ends, strict=True)}
    return [rows[tuple(ids)][-count:] for ids, count in zip(inputs, counts, strict=True)]


def _score(logits_TV: Tensor, target: list[int], cut: int) -> Likelihood:
    wanted_T = torch.tensor(target, device=logits_TV.device)
    log_TV = logits_TV.float().log_softmax(-1)
    nats = log_TV.gather(-1, wanted_T[:, None]).double().sum().item()
    return Likelihood(nats, torch.equal(logits_TV.argmax(-1), wanted_T), len(target), cut)


def _encode(tokenizer: Any, request: Request) -> tuple[list[int], list[int]]:
    """The ids of the context and of the continuation."""
    context = request.context.rstrip()
    continuation = request.context[len(context) :] + request.continuation
    if not context:
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise ValueError("a text without a context is predicted from BOS or EOS, and the tokenizer has neither")
        ids = _ids(tokenizer, continuation, special=False)
        return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
    # A text that begins with BOS already gets no second one.
    special = not (tokenizer.bos_token and context.startswith(tokenizer.bos_token))
    before = _ids(tokenizer, context, special)
    return before, _ids(tokenizer, context + continuation, special)[len(before) :]


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
