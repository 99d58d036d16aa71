"""What quantization does to a model's answers, without a judge: along the original's own answers, and side by side.

Both models get a prompt through the chat template. The original answers greedily, and both then read its answer:

* KL(original || model) and the share of tokens where both have the same first choice, over the answer's tokens.
* First divergence: the tokens of the two models' own greedy answers before the first that differs.
* Repetition: the share of an answer's passages of four tokens that stood in it before. Damaged models loop.

A judge, which tells better from other, is optional: :mod:`lowbit.evaluation.judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoints.config import check_positions
from lowbit.evaluation.forward import evaluating, logits_of, protocol_name
from lowbit.evaluation.generate import check_chat, prompt_ids
from lowbit.evaluation.intervals import Interval, mean_and_interval
from lowbit.numerics.divergence import score_tokens
from lowbit.progress import Progress, silent
from lowbit.rows import lines_of, text_of

GRAM = 4
"""Tokens of a passage whose repetition counts."""


@dataclass(frozen=True)
class Answer:
    """Two answers to one prompt.

    Attributes:
        prompt, original, model: texts; the last two without special tokens.
        tokens: length of the original's answer, its end included.
        kl: mean over these tokens, in nats.
        top1_agreement: share of these tokens.
        diverges_at: tokens that both answers begin with; None: the answers are the same.
        repetition_original, repetition: shares of repeated passages.
    """

    prompt: str
    original: str
    model: str
    tokens: int
    kl: float
    top1_agreement: float
    diverges_at: int | None
    repetition_original: float
    repetition: float


@dataclass(frozen=True)
class ChatScore:
    """All prompts. Intervals are 95 %, with each prompt as one sample.

    Attributes:
        protocol: how it was measured.
        kl, top1_agreement: over all tokens of the original's answers.
        same: answers that are equal to the original's in every token.
        median_divergence: median of the tokens before the first that differs; equal answers count with their length.
        repetition_original, repetition: means over prompts.
        answers: each prompt.
    """

    protocol: str
    kl: float
    kl_interval: Interval | None
    top1_agreement: float
    top1_interval: Interval | None
    same: int
    median_divergence: float
    repetition_original: float
    repetition: float
    answers: tuple[Answer, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self) | {"answers": [vars(answer) for answer in self.answers]}


def read_prompts(path: str | PathLike[str] | None = None) -> tuple[str, ...]:
    """One prompt a line; without a file, the ones that come along.

    Raises:
        ValueError: no such file, one that is no text, or no prompt in it.
    """
    if path is None:
        text, path = files("lowbit.evaluation").joinpath("prompts.txt").read_text(encoding="utf-8"), "prompts.txt"
    elif not Path(path).expanduser().is_file():
        raise ValueError(f"no file of prompts {str(path)!r}: expected one prompt a line")
    else:
        text = text_of(Path(path).expanduser())
    prompts = tuple(line.strip() for line in lines_of(text) if line.strip())
    if not prompts:
        raise ValueError(f"{path}: no prompts; expected one a line")
    return prompts


def compare_chat(
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    *,
    progress: Progress = silent,
) -> ChatScore:
    """Answers of a quantized model beside its original's.

    Args:
        model, original: transformers causal LMs with one vocabulary.
        tokenizer: with a chat template.
        prompts: a user's questions, each asked alone.
        max_new_tokens: of an answer.
        progress: called as ``progress(prompts done, prompts, what)``.

    Raises:
        ValueError: a tokenizer without a chat template, no prompts, or one that does not fit into the model's positions.
    """
    check_chat(tokenizer)
    if not prompts or max_new_tokens < 1:
        raise ValueError(f"expected at least one prompt and one new token, found {len(prompts)} and {max_new_tokens}")
    answers, sums = [], []
    for done, prompt in enumerate(prompts):
        progress(done, len(prompts), "answers")
        ids_T = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])[0]
        for each in (model, original):
            check_positions(each, len(ids_T) + max_new_tokens, f"a prompt of {len(ids_T)} tokens and its answer")
        theirs, ours = (_greedy(each, tokenizer, ids_T, max_new_tokens) for each in (original, model))
        kl_T, agree_T = _along(model, original, ids_T, theirs)
        sums.append((kl_T.sum().item(), agree_T.sum().item(), len(theirs)))
        answers.append(
            Answer(
                prompt=prompt,
                original=tokenizer.decode(theirs, skip_special_tokens=True),
                model=tokenizer.decode(ours, skip_special_tokens=True),
                tokens=len(theirs),
                kl=kl_T.mean().item(),
                top1_agreement=agree_T.mean().item(),
                diverges_at=_first_difference(theirs, ours),
                repetition_original=repetition(theirs.tolist()),
                repetition=repetition(ours.tolist()),
            )
        )
    progress(len(prompts), len(prompts), "answers")
    kl, agree, tokens = np.array(sums, dtype=np.float64).T
    mean_kl, kl_interval = mean_and_interval(kl, tokens)
    top1, top1_interval = mean_and_interval(agree, tokens)
    return ChatScore(
        protocol=protocol_name(model, f"greedy answers of up to {max_new_tokens} tokens, chat template"),
        kl=mean_kl,
        kl_interval=kl_interval,
        top1_agreement=top1,
        top1_interval=top1_interval,
        same=sum(answer.diverges_at is None for answer in answers),
        median_divergence=float(
            np.median([answer.tokens if answer.diverges_at is None else answer.diverges_at for answer in answers])
        ),
        repetition_original=float(np.mean([answer.repetition_original for answer in answers])),
        repetition=float(np.mean([answer.repetition for answer in answers])),
        answers=tuple(answers),
    )


def repetition(ids: Sequence[int]) -> float:
    """The share of an answer's passages of :data:`GRAM` tokens that stood in it before; 0 for a shorter answer."""
    passages = list(zip(*(ids[i:] for i in range(GRAM))))
    return 1 - len(set(passages)) / len(passages) if passages else 0.0


def _greedy(model: Any, tokenizer: Any, ids_T: Tensor, count: int) -> Tensor:
    """The ids of the model's answer, int64, with the token that ends it."""
    ids_1T = ids_T[None].to(model.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with evaluating(model):
        out = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=count,
            pad_token_id=pad,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    return out[0, len(ids_T) :].cpu()


def _along(model: Any, original: Any, prompt_T: Tensor, answer_T: Tensor) -> tuple[Tensor, Tensor]:
    """KL and agreement at each token of ``answer_T``, which both models read after the prompt."""
    ids_T = torch.cat([prompt_T, answer_T])[:-1]
    with evaluating(model, original):
        theirs, ours = (logits_of(each, ids_T, last=len(answer_T)).cpu() for each in (original, model))
    scores = score_tokens(ours, answer_T, theirs)
    assert scores.kl is not None and scores.agree is not None
    return scores.kl.double(), scores.agree.double()


def _first_difference(a: Tensor, b: Tensor) -> int | None:
    length = min(len(a), len(b))
    unlike = (a[:length] != b[:length]).nonzero()
    if len(unlike):
        return int(unlike[0])
    return None if len(a) == len(b) else length
