"""Attention whose operands are quantized at run time.

Queries, keys and values get one dynamic range for each token of each head. Query times key is then one integer product a
key head, with both scales after it. Probability times value sums over tokens, whose values have a scale each: these scales
go to the probabilities before they are rounded, and the second product is of integers as well.

Shapes: B window, H query head, G key and value head, R query heads that share one of them, T query, S key token, D channel,
X all queries of the R heads.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.numerics import Affine, Int, MinMax, PerToken, Spec, tagged

# Queries that are scored at once: what bounds the memory of a long prompt.
_QUERIES = 512

# Sums of so many products of 8-bit codes stay below 2**31; longer ones are taken in floating point.
_MOST_TOKENS = 2**31 // 255**2


@tagged
@dataclass(frozen=True)
class AttentionSpec:
    """The formats of the operands of attention's two products.

    Args:
        bits: 2 to 8, of queries, keys and values.
        symmetric: no zero points.
        probability_bits: 2 to 8, of what the softmax gives, one dynamic range for each query of each head; None: floating.

    Raises:
        ValueError: bits that are no integer grid of 2 to 8 bits; probabilities beside values that have zero points, which no
            single integer product multiplies.
    """

    bits: int
    symmetric: bool = True
    probability_bits: int | None = None

    def __post_init__(self):
        for what, bits in (("bits", self.bits), ("probability_bits", self.probability_bits)):
            if bits is not None and not 2 <= bits <= 8:
                raise ValueError(f"{what} of attention is 2 to 8, found {bits}")
        if self.probability_bits is not None and not self.symmetric:
            raise ValueError(
                "quantized probabilities need symmetric values: set symmetric, or leave probability_bits out"
            )

    @property
    def operand(self) -> Spec:
        """Of queries, keys and values."""
        return Spec(Int(self.bits, self.symmetric), PerToken())

    @property
    def probability(self) -> Spec | None:
        """Of probabilities; they are not negative, so the zero point is the lowest code."""
        return None if self.probability_bits is None else Spec(Int(self.probability_bits), PerToken())


def attend(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    spec: AttentionSpec | None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(scaling * query @ key.T + mask) @ value`` of quantized operands, ``[B, T, H, D]`` in the query's dtype.

    Args:
        spec: the formats; None: nothing is quantized.
        mask: broadcast to ``[B, H, T, S]``; true where a key is seen, or floating and added.
        causal: without a mask, the last of the T queries sees all S keys, the one before it one less, and so on.
        scaling: None: 1 / sqrt(D).
        softcap: bounds the scores to it by a tanh, before the mask.

    Integer products where no gradient is asked for; else the same numbers, floating, with gradients straight through the
    rounding. Scores and softmax are in float32.
    """
    groups, length = key_BGSD.shape[1], key_BGSD.shape[2]
    batch, heads, queries, size = query_BHTD.shape
    shared = heads // groups
    factor = size**-0.5 if scaling is None else scaling
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, length, dtype=torch.bool, device=query_BHTD.device).tril(length - queries)
    mask = None if mask is None else mask.expand(batch, heads, queries, length)
    floating = length > _MOST_TOKENS or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (query_BHTD, key_BGSD, value_BGSD))
    )
    out_BHTD = []
    for b, g, start in itertools.product(range(batch), range(groups), range(0, queries, _QUERIES)):
        place = b, slice(g * shared, (g + 1) * shared), slice(start, start + _QUERIES)
        query_RTD, key_SD, value_SD = query_BHTD[place].float(), key_BGSD[b, g].float(), value_BGSD[b, g].float()
        score_XS = _scores(query_RTD.reshape(-1, size), key_SD, spec, floating) * factor
        if softcap is not None:
            score_XS = softcap * torch.tanh(score_XS / softcap)
        if mask is not None:
            seen_XS = mask[place].reshape(score_XS.shape)
            score_XS = score_XS.masked_fill(~seen_XS, -torch.inf) if mask.dtype == torch.bool else score_XS + seen_XS
        mixed_XD = _mixtures(torch.softmax(score_XS, -1), value_SD, spec, floating)
        out_BHTD.append(mixed_XD.view(*query_RTD.shape[:2], -1))
    chunks = -(-queries // _QUERIES)
    rows = [torch.cat(out_BHTD[i : i + chunks], 1) for i in range(0, len(out_BHTD), chunks)]
    return torch.cat(rows).view(batch, heads, queries, -1).transpose(1, 2).to(query_BHTD.dtype)


def _scores(query_XD: Tensor, key_SD: Tensor, spec: AttentionSpec | None, floating: bool) -> Tensor:
    if spec is None:
        return query_XD @ key_SD.T
    if floating:
        return _fake(query_XD, spec.operand)[0] @ _fake(key_SD, spec.operand)[0].T
    queries, q = kernels.quantize_activation(query_XD, spec.operand)
    keys, k = kernels.quantize_activation(key_SD, spec.operand)
    return kernels.integer_product(queries, spec.operand, q, keys, spec.operand, k)


def _mixtures(p_XS: Tensor, value_SD: Tensor, spec: AttentionSpec | None, floating: bool) -> Tensor:
    if spec is None:
        return p_XS @ value_SD
    if spec.probability is None:
        return p_XS @ _fake(value_SD, spec.operand)[0]
    if floating:
        value_SD, scale_S1 = _fake(value_SD, spec.operand)
        return _fake(p_XS * scale_S1.T, spec.probability)[0] @ (value_SD / scale_S1)
    values, v = kernels.quantize_activation(value_SD, spec.operand)
    weights, p = kernels.quantize_activation(p_XS * v.scale.T, spec.probability)
    one = Affine(torch.ones(1, 1, device=p_XS.device), None)  # the values' scales are in the weights
    return kernels.integer_product(weights, spec.probability, p, values.T, spec.operand, one)


def _fake(x_TI: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Rows rounded and restored, with gradients straight through, and their scales ``[T, 1]``."""
    grid = spec.grid
    assert isinstance(grid, Int)
    params = MinMax()(x_TI, grid)
    return grid.fake(x_TI, params), params.scale
