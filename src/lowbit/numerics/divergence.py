"""Scores of each position's logits: negative log-likelihood of the next token, and divergence from another model.

The logits of one window can take hundreds of megabytes, and the plain formula makes five more tensors of that size.
Here a window is processed in chunks of tokens, so only a few chunks are held in addition to the models' logits. Rows do
not depend on each other, so the chunk size changes no result.

Logarithms of probabilities are float32 (float64 for float64 logits); sums over the vocabulary and all later steps are float64.
Compiled code compares chunks on the CPU where it can, with the same results but for the last bits.

Shape suffixes: T token, C a chunk of tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.numerics.compiled_divergence import compare

CHUNK_TOKENS = 32


class TokenScores(NamedTuple):
    """Scores of T positions. The last three are None without a reference.

    Attributes:
        nll: -log q(target) in nats, float64 [T].
        kl: KL(p || q) in nats of the reference's distribution p from the model's q, float64 [T].
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
    """Scores T positions: `logits_TV[t]` and `reference_TV[t]` predict `targets_T[t]`.

    Args:
        logits_TV: the judged model's logits, any float dtype.
        targets_T: int64 token ids.
        reference_TV: the original model's logits at the same positions, or None.
        chunk: positions in each chunk; changes memory, never results.
    """
    targets_T1 = targets_T[:, None].to(logits_TV.device)
    # Results are allocated first: small tensors that outlive a chunk, allocated between large ones, leave gaps in the C
    # heap that the next chunk does not fit. The heap grew by half a gigabyte with each window.
    nll_T, kl_T, reference_nll_T = logits_TV.new_empty(3, len(targets_T), dtype=torch.float64)
    agree_T = torch.empty_like(nll_T, dtype=torch.bool)
    for rows in _chunks(len(targets_T), chunk):
        q_CV = _wide(logits_TV[rows])
        p_CV = q_CV if reference_TV is None else _wide(reference_TV[rows].to(q_CV.device))
        targets_C1 = targets_T1[rows]
        compared = compare(p_CV, q_CV)
        if compared is not None:
            nll_T[rows] = compared.log_q - q_CV.gather(1, targets_C1).squeeze(1)
            reference_nll_T[rows] = compared.log_p - p_CV.gather(1, targets_C1).squeeze(1)
            kl_T[rows], agree_T[rows] = compared.kl, compared.agree
            continue
        logq_CV = q_CV.log_softmax(-1)
        nll_T[rows] = -logq_CV.gather(1, targets_C1).squeeze(1)
        if reference_TV is not None:
            logp_CV = p_CV.log_softmax(-1)
            reference_nll_T[rows] = -logp_CV.gather(1, targets_C1).squeeze(1)
            kl_T[rows], agree_T[rows] = _compare(logp_CV, logq_CV, p_CV, q_CV)
    return TokenScores(nll_T) if reference_TV is None else TokenScores(nll_T, kl_T, agree_T, reference_nll_T)


@torch.no_grad()
def kl_and_agreement(logits_p: Tensor, logits_q: Tensor, *, chunk: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
    """KL(p || q) in nats and top-1 agreement at each position, without gradients.

    Args:
        logits_p: [T, V] logits of the original, any float dtype.
        logits_q: [T, V] logits of the quantized model; results are on its device.
        chunk: positions in each chunk; changes memory, never results.

    Returns:
        KL as float64 [T] (NaN if either has a NaN, infinity if q gives 0 to a token that p does not) and agreement as
            bool [T]
        (False if KL is NaN).

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
        p_CV, q_CV = _wide(logits_p[rows].to(logits_q.device)), _wide(logits_q[rows])
        compared = compare(p_CV, q_CV)
        if compared is not None:
            kl_T[rows], agree_T[rows] = compared.kl, compared.agree
        else:
            kl_T[rows], agree_T[rows] = _compare(p_CV.log_softmax(-1), q_CV.log_softmax(-1), p_CV, q_CV)
    return kl_T, agree_T


def _compare(logp_CV: Tensor, logq_CV: Tensor, p_CV: Tensor, q_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL [C], agreement [C]) of one chunk.

    The top tokens come from the logits, because log_softmax can round two into a tie.
    """
    ratio_CV = logp_CV - logq_CV
    # 0 log 0 = 0: an entry that the original masks with -inf adds nothing, but -inf - -inf would be NaN.
    ratio_CV.masked_fill_(logp_CV == -torch.inf, 0.0)
    kl_C = ratio_CV.mul_(logp_CV.exp()).sum(-1, dtype=torch.float64)
    return kl_C, (p_CV.argmax(-1) == q_CV.argmax(-1)) & ~kl_C.isnan()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(length: int, chunk: int) -> list[slice]:
    assert chunk > 0
    return [slice(start, start + chunk) for start in range(0, length, chunk)]
