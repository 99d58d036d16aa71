"""What one position's logits say: the negative log-likelihood of the token that came, the distance to another model.

One window's logits of a small model with a large vocabulary are hundreds of megabytes, and the obvious formula makes
five more tensors of that size. Here a window is taken a chunk of tokens at a time, so what is held beside the logits
that the models returned is a few chunks. Rows do not depend on each other, so the chunk changes no result.

log_softmax in float32 (float64 for float64 logits), sums over the vocabulary and everything after them in float64.

Shape suffixes: T token, C a chunk of tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_TOKENS = 32


class TokenScores(NamedTuple):
    """Scores of each of T positions. The last three are None where there was no reference to compare with.

    nll: -log q(target) in nats, float64 [T].
    kl: KL(p || q) in nats, p the reference's distribution and q the model's, float64 [T].
    agree: whether p and q have the same most likely token, bool [T].
    reference_nll: -log p(target) in nats, float64 [T].
    """

    nll: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None
    reference_nll: Tensor | None = None


@torch.no_grad()
def score_tokens(
    logits_TV: Tensor, targets_T: Tensor, reference_TV: Tensor | None = None, *, chunk: int = CHUNK_TOKENS
) -> TokenScores:
    """Score T positions: `logits_TV[t]` predicts `targets_T[t]`, and so does `reference_TV[t]`.

    Args:
        logits_TV: the judged model's logits, any float dtype.
        targets_T: int64 token ids.
        reference_TV: the original model's logits at the same positions, or None.
        chunk: positions taken at a time; changes memory, never results.
    """
    targets_T1 = targets_T[:, None].to(logits_TV.device)
    # Results are made first and filled in: small tensors that outlive a chunk, allocated between large ones that do
    # not, leave gaps in the C heap that the next chunk does not fit, and it grew by half a gigabyte a window.
    nll_T, kl_T, reference_nll_T = logits_TV.new_empty(3, len(targets_T), dtype=torch.float64)
    agree_T = torch.empty_like(nll_T, dtype=torch.bool)
    for rows in _chunks(len(targets_T), chunk):
        logq_CV = _log_softmax(logits_TV[rows])
        nll_T[rows] = -logq_CV.gather(1, targets_T1[rows]).squeeze(1)
        if reference_TV is not None:
            reference_CV = reference_TV[rows].to(logits_TV.device)
            logp_CV = _log_softmax(reference_CV)
            reference_nll_T[rows] = -logp_CV.gather(1, targets_T1[rows]).squeeze(1)
            kl_T[rows], agree_T[rows] = _compare(logp_CV, logq_CV, reference_CV, logits_TV[rows])
    return TokenScores(nll_T) if reference_TV is None else TokenScores(nll_T, kl_T, agree_T, reference_nll_T)


@torch.no_grad()
def kl_and_agreement(logits_p: Tensor, logits_q: Tensor, *, chunk: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
    """KL(p || q) in nats and top-1 agreement of each position; p is the original, q the quantized model. No gradients.

    Args:
        logits_p: [T, V] logits of the original, any float dtype.
        logits_q: [T, V] logits of the quantized model; results are on its device.
        chunk: positions taken at a time; changes memory, never results.

    Returns:
        KL as float64 [T] (NaN where either has a NaN, infinity where q gives 0 to what p does not) and agreement as
        bool [T] (False where KL is NaN).

    Raises:
        ValueError: the shapes differ.
    """
    if logits_p.shape != logits_q.shape or logits_p.ndim != 2:
        raise ValueError(
            f"expected two logits of one shape [tokens, vocabulary], found {list(logits_p.shape)} and "
            f"{list(logits_q.shape)}: the models must share a vocabulary"
        )
    kl_T = logits_q.new_empty(len(logits_q), dtype=torch.float64)
    agree_T = torch.empty_like(kl_T, dtype=torch.bool)
    for rows in _chunks(len(logits_q), chunk):
        p_CV, q_CV = logits_p[rows].to(logits_q.device), logits_q[rows]
        kl_T[rows], agree_T[rows] = _compare(_log_softmax(p_CV), _log_softmax(q_CV), p_CV, q_CV)
    return kl_T, agree_T


def _compare(logp_CV: Tensor, logq_CV: Tensor, p_CV: Tensor, q_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL [C], agreement [C]) of one chunk. Top tokens are the logits': log_softmax can round two into a tie."""
    ratio_CV = logp_CV - logq_CV
    # 0 log 0 = 0: a vocabulary entry that the original masks with -inf adds nothing, and -inf - -inf is NaN.
    ratio_CV.masked_fill_(logp_CV == -torch.inf, 0.0)
    kl_C = ratio_CV.mul_(logp_CV.exp()).sum(-1, dtype=torch.float64)
    return kl_C, (p_CV.argmax(-1) == q_CV.argmax(-1)) & ~kl_C.isnan()


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _chunks(length: int, chunk: int) -> list[slice]:
    assert chunk > 0
    return [slice(start, start + chunk) for start in range(0, length, chunk)]
