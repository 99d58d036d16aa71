"""Perplexity and the divergence from the original model, in one pass over the text.

Perplexity alone says little about a small change: its uncertainty over twenty windows is some per cent, and a quantized
model can gain on one passage what it loses on another. KL(original || quantized) and the share of positions where both
rank the same token first compare the two models position by position. They are measured in the same pass if the
original is given.

Laws: a model against itself has KL exactly 0 and agreement exactly 1. Figures follow the protocols `gptq`, `llama.cpp`
and `word` of `windows.py` for every model.

Batch 1. Memory in addition to the models: one window's logits of each, and a few chunks of them (see
`lowbit.numerics.divergence`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoints.config import check_positions
from lowbit.evaluation.cache_checks import CheckScore
from lowbit.evaluation.forward import evaluating, logits_of, protocol_name, vocabulary_size
from lowbit.evaluation.intervals import Interval, exp, mean_and_interval
from lowbit.evaluation.reference import KeptOriginal
from lowbit.evaluation.windows import Cut, Text, Window, cut
from lowbit.modules import kv_formats
from lowbit.numerics.divergence import score_tokens
from lowbit.progress import Progress


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text. Intervals are 95 % (see `intervals.py`), None with one window.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per counted token (per word for `word`). NaN or infinity if
            the model is broken.
        kl: mean KL(original || model) in nats per counted token; None without an original.
        top1_agreement: share of counted positions where both have the same most likely token; None without an original.
        reference_perplexity: the original's perplexity on the same tokens; None without an original.
        log_perplexity_difference: log of the perplexity over the original's; its interval is that of differences window by
            window, which is narrower than those of both. None without an original.
        tokens, words: counted predictions, and words if the protocol counts them.
        windows, seq_len, protocol: how the text was cut, and whether the model read it through a quantized cache.
        text: the text's name, as the caller gave it.
        ids_sha256: a hash of the window length and the ids that were read.
        broken_tokens: counted tokens whose negative log-likelihood or KL is NaN or infinite.
        checks: those of retrieval and generation, where they were asked for; the caller fills them in too.
        bits_per_weight, model_bits_per_weight, cache_bits, bytes: of the checkpoint's quantized linears, of all of it, of each
            number in its quantized cache, and of its weight files; the caller fills them in, with `dataclasses.replace`.
    """

    perplexity: float
    perplexity_interval: Interval | None
    kl: float | None
    kl_interval: Interval | None
    top1_agreement: float | None
    top1_interval: Interval | None
    reference_perplexity: float | None
    tokens: int
    words: int | None
    windows: int
    seq_len: int
    protocol: str
    text: str
    ids_sha256: str
    broken_tokens: int = 0
    log_perplexity_difference: float | None = None
    log_perplexity_difference_interval: Interval | None = None
    bits_per_weight: float | None = None
    model_bits_per_weight: float | None = None
    cache_bits: float | None = None
    checks: tuple[CheckScore, ...] = ()
    bytes: int | None = None

    @property
    def broken(self) -> bool:
        """Whether the model gave a value that is not a finite number."""
        return self.broken_tokens > 0 or not math.isfinite(self.perplexity)

    def to_dict(self) -> dict[str, Any]:
        """The fields and `broken` as values of strict JSON; NaN and infinity become null."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        checks = [{name: _json_safe(value) for name, value in vars(check).items()} for check in self.checks]
        safe = {name: _json_safe(value) for name, value in values.items()}
        return safe | {"checks": checks, "broken": self.broken}


class _WindowSums(NamedTuple):
    """One window's sums over its counted tokens. Those of the comparison are 0 without an original."""

    tokens: float
    nll: float
    kl: float
    agree: float
    reference_nll: float
    broken: float


def evaluate_model(
    model: PreTrainedModel,
    text: Text | Cut,
    tokenizer: Any = None,
    protocol: str = "gptq",
    seq_len: int = 1024,
    windows: int | None = None,
    *,
    against: PreTrainedModel | KeptOriginal | None = None,
    chunk: int | None = None,
    text_name: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a causal LM on a text in one pass, with the divergence from the original model if that is given.

    Args:
        model: a transformers causal LM, quantized or not.
        text: one string, documents (protocol `word` only), or integer ids [T] or [windows, seq_len]; or what `cut` made of them by
            this protocol and these sizes.
        tokenizer: its transformers tokenizer; not needed for ids.
        protocol: `gptq`, `llama.cpp` or `word`, see `windows.py`.
        seq_len: tokens in a window.
        windows: number of windows from the start of the text; None: all.
        against: the original model with the same vocabulary, or its kept states; gives KL and agreement.
        chunk: tokens that a model with a quantized cache reads at a time; None: as few as its formats ask for.
        text_name: the text's name in the result.
        progress: called as progress(done, total, description) before the first and after each window.

    Returns:
        An `Evaluation`. A model that gives NaN or infinity is reported as broken, not refused.

    Raises:
        ValueError: what `cut` raises, ids outside the vocabulary, a window longer than the model's positions, two
            models with different vocabularies, an original whose own logits are not finite, a chunk for a model whose
            cache is not quantized.
    """
    pieces = text if isinstance(text, Cut) else cut(text, tokenizer, protocol, seq_len, windows)
    original = against.model if isinstance(against, KeptOriginal) else against
    for judged in (model,) if original is None else (model, original):
        check_fits(judged, pieces)
    if chunk is not None and not kv_formats(model):
        raise ValueError(
            f"chunk is {chunk}, and nothing quantizes this model's cache: name a method for caches (--kv kivi:2), or leave chunk out"
        )
    total = len(pieces.windows)
    sums = []
    with evaluating(model, original):
        for done, window in enumerate(pieces.windows):
            if progress:
                progress(done, total, "perplexity")
            sums.append(_score_window(model, against, window, chunk))
    if progress:
        progress(total, total, "perplexity")
    columns = _WindowSums(*np.array(sums, dtype=np.float64).T)
    return _summarise(
        columns,
        pieces,
        against is not None,
        protocol=protocol_name(model, protocol, chunk, max(len(window.inputs) for window in pieces.windows)),
        seq_len=seq_len,
        text=text_name,
    )


def _score_window(
    model: PreTrainedModel, against: PreTrainedModel | KeptOriginal | None, window: Window, chunk: int | None
) -> _WindowSums:
    """Runs both models over one window and sums their scores. Their logits are freed when it returns."""
    counted = slice(window.first, window.first + len(window.targets))
    reference_TV = None
    if against is not None:
        kept = isinstance(against, KeptOriginal)
        reference_TV = (against.logits(window.inputs) if kept else logits_of(against, window.inputs))[counted]
    logits_TV = logits_of(model, window.inputs, chunk=chunk)[counted]
    if reference_TV is not None and reference_TV.shape != logits_TV.shape:
        raise ValueError(
            f"the model has {logits_TV.shape[1]} logits and the original {reference_TV.shape[1]}: "
            "KL needs one vocabulary; compare models of the same family"
        )
    scores = score_tokens(logits_TV, window.targets, reference_TV)
    broken = ~scores.nll.isfinite()
    if scores.kl is None or scores.agree is None or scores.reference_nll is None:
        return _WindowSums(len(window.targets), float(scores.nll.sum()), 0.0, 0.0, 0.0, float(broken.sum()))
    if not scores.reference_nll.isfinite().all():
        raise ValueError("the original model's own logits are NaN or infinite: check its files, or leave it out")
    return _WindowSums(
        tokens=len(window.targets),
        nll=float(scores.nll.sum()),
        kl=float(scores.kl.sum()),
        agree=float(scores.agree.sum()),
        reference_nll=float(scores.reference_nll.sum()),
        broken=float((broken | ~scores.kl.isfinite()).sum()),
    )


def _summarise(sums: Any, pieces: Cut, compared: bool, *, protocol: str, seq_len: int, text: str) -> Evaluation:
    """`sums` is a `_WindowSums` of columns [W]: each field holds that sum of every window."""
    tokens = int(sums.tokens.sum())
    # Perplexity per word divides the same total by another count.
    per_unit = 1.0 if pieces.words is None else tokens / pieces.words
    nll, nll_interval = mean_and_interval(sums.nll, sums.tokens)
    kl, kl_interval = mean_and_interval(sums.kl, sums.tokens)
    top1, top1_interval = mean_and_interval(sums.agree, sums.tokens)
    reference_nll, _ = mean_and_interval(sums.reference_nll, sums.tokens)
    more, around = mean_and_interval(sums.nll - sums.reference_nll, sums.tokens)
    return Evaluation(
        perplexity=exp(nll * per_unit),
        perplexity_interval=nll_interval and (exp(nll_interval[0] * per_unit), exp(nll_interval[1] * per_unit)),
        kl=kl if compared else None,
        kl_interval=_clipped(kl_interval, kl, math.inf) if compared else None,
        top1_agreement=top1 if compared else None,
        top1_interval=_clipped(top1_interval, top1, 1.0) if compared else None,
        reference_perplexity=exp(reference_nll * per_unit) if compared else None,
        tokens=tokens,
        words=pieces.words,
        windows=len(pieces.windows),
        seq_len=seq_len,
        protocol=protocol,
        text=text,
        ids_sha256=windows_sha256(pieces, seq_len),
        broken_tokens=int(sums.broken.sum()),
        log_perplexity_difference=more * per_unit if compared else None,
        log_perplexity_difference_interval=around and (around[0] * per_unit, around[1] * per_unit)
        if compared
        else None,
    )


def check_fits(model: PreTrainedModel, pieces: Cut) -> None:
    """Raises ValueError if a window is longer than the model's positions or has ids outside its vocabulary."""
    longest = max(len(window.inputs) for window in pieces.windows)
    check_positions(model, longest, f"a window of {longest} tokens")
    limit = vocabulary_size(model)
    low = min(min(int(window.inputs.min()), int(window.targets.min())) for window in pieces.windows)
    high = max(max(int(window.inputs.max()), int(window.targets.max())) for window in pieces.windows)
    if low < 0 or high >= limit:
        raise ValueError(
            f"the ids run from {low} to {high} and the model's vocabulary has {limit}: "
            "tokenize the text with this model's own tokenizer"
        )


def windows_sha256(pieces: Cut, seq_len: int) -> str:
    """A hash of the window length and of all ids that are read: `Evaluation.ids_sha256`."""
    digest = hashlib.sha256(f"{seq_len}:".encode())
    for window in pieces.windows:
        digest.update(_bytes(window.inputs))
        digest.update(_bytes(window.targets[-1:]))
    return digest.hexdigest()


def _bytes(ids: Tensor) -> bytes:
    return ids.cpu().numpy().astype("<i8").tobytes()


def _clipped(interval: Interval | None, mean: float, high: float) -> Interval | None:
    """The interval cut to [0, high], the range of the quantity. A mean of -1e-9 by rounding stays inside."""
    return interval and (max(interval[0], min(0.0, mean)), min(interval[1], high))


def _json_safe(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json_safe(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
