"""Attention whose operands are quantized at run time.

Queries, keys and values get one dynamic range for each token of each head, or static ranges that calibration has found
(:class:`~lowbit.modules.OperandRanges`). Query times key is then one integer product a key head, with both scales after it,
or one for each cluster of channels that has ranges of its own. Probability times value sums over tokens. Where values have
a scale for each token, these scales go to the probabilities before they are rounded; static ones are of channels and come
after the sum. Floating formats are rounded for real and multiplied in floating point.

Shapes: B window, H query head, G key and value head, R query heads that share one of them, T query, S key token, D channel,
X all queries of the R heads.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.modules.attention_ranges import HeadRanges, OperandRanges, mapped
from lowbit.numerics import Affine, Float, Int, MinMax, PerToken, Spec, serializable

# Queries that are scored at once: what bounds the memory of a long prompt.
_QUERIES = 512

# Sums of so many products of 8-bit codes stay below 2**31; longer ones are taken in floating point.
_MOST_TOKENS = 2**31 // 255**2


@serializable
@dataclass(frozen=True)
class AttentionSpec:
    """The formats of the operands of attention's two products.

    Args:
        bits: 2 to 8, of queries, keys and values.
        symmetric: no zero points.
        probability_bits: 2 to 8, of what the softmax gives: one dynamic range for each query of each head, or with static
            ranges the one from 0 to 1; None: floating.
        format: a floating format of so many bits, such as E2M1, for queries, keys and values; None: integers.
        static: ranges are known before, from calibration; else each token of each head has its own.
        clusters: of static ranges: how many clusters of channels each head has, each with a range of its own; None: one range
            serves all heads of the queries, one those of the keys, and one those of the values.
        heads: of static ranges that are known: query heads, key-value heads, channels of a key and of a value. Recipes
            leave it out: it is the model's.

    Raises:
        ValueError: bits that are no grid of 2 to 8 bits; probabilities beside values that no single integer product
            multiplies; clusters or heads of ranges that are not static; static ranges of floating formats.
    """

    bits: int
    symmetric: bool = True
    probability_bits: int | None = None
    format: str | None = None
    static: bool = False
    clusters: int | None = None
    heads: tuple[int, int, int, int] | None = None

    def __post_init__(self):
        for what, bits in (("bits", self.bits), ("probability_bits", self.probability_bits)):
            if bits is not None and not 2 <= bits <= 8:
                raise ValueError(f"{what} of attention is 2 to 8, found {bits}")
        if self.probability_bits is not None and not (self.symmetric or self.static):
            raise ValueError(
                "quantized probabilities need symmetric values, or static ones: set symmetric, or leave probability_bits out"
            )
        if self.format is not None:
            Float.of(self.bits, self.format)  # raises where there is none
            if self.static or self.probability_bits is not None:
                raise ValueError(
                    "floating operands of attention have dynamic ranges, and floating probabilities: leave static and "
                    "probability_bits out"
                )
        if not self.static and (self.clusters is not None or self.heads is not None):
            raise ValueError("clusters and heads are of static ranges of attention's operands: set static")
        if self.clusters is not None and not 1 <= self.clusters <= 256:
            raise ValueError(f"a head has 1 to 256 clusters, found clusters={self.clusters}")
        if self.heads is not None:
            numbers = all(isinstance(number, int) and number > 0 for number in self.heads)
            if len(self.heads) != 4 or not numbers or self.heads[0] % self.heads[1]:
                raise ValueError(
                    "heads are numbers of query heads, of key-value heads that divide them, and of channels of keys and of "
                    f"values; found {self.heads}"
                )

    @property
    def operand(self) -> Spec:
        """Of queries, keys and values; the granularity is that of dynamic ranges."""
        grid = Int(self.bits, self.symmetric) if self.format is None else Float.of(self.bits, self.format)
        return Spec(grid, PerToken())

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
    ranges: OperandRanges | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(scaling * query @ key.T + mask) @ value`` of quantized operands, ``[B, T, H, D]`` in the query's dtype.

    Args:
        spec: the formats; None: nothing is quantized.
        ranges: the static ones. Where ``spec`` has static ranges and they are not known yet, nothing is quantized.
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
    if spec is not None and spec.static and ranges is None:
        spec = None
    out_BHTD = []
    for b, g, start in itertools.product(range(batch), range(groups), range(0, queries, _QUERIES)):
        place = b, slice(g * shared, (g + 1) * shared), slice(start, start + _QUERIES)
        query_RTD, key_SD, value_SD = query_BHTD[place].float(), key_BGSD[b, g].float(), value_BGSD[b, g].float()
        products = _products(spec, None if ranges is None else ranges.of_head(g), floating)
        score_XS = products.scores(query_RTD, key_SD) * factor
        if softcap is not None:
            score_XS = softcap * torch.tanh(score_XS / softcap)
        if mask is not None:
            seen_XS = mask[place].reshape(score_XS.shape)
            score_XS = score_XS.masked_fill(~seen_XS, -torch.inf) if mask.dtype == torch.bool else score_XS + seen_XS
        mixed_XD = products.mixtures(torch.softmax(score_XS, -1), value_SD)
        out_BHTD.append(mixed_XD.view(*query_RTD.shape[:2], -1))
    chunks = -(-queries // _QUERIES)
    rows = [torch.cat(out_BHTD[i : i + chunks], 1) for i in range(0, len(out_BHTD), chunks)]
    return torch.cat(rows).view(batch, heads, queries, -1).transpose(1, 2).to(query_BHTD.dtype)


class _Products(Protocol):
    """The two products of one key-value head."""

    def scores(self, query_RTD: Tensor, key_SD: Tensor) -> Tensor:
        """``[X, S]``, not scaled."""
        ...

    def mixtures(self, p_XS: Tensor, value_SD: Tensor) -> Tensor:
        """``[X, D]``."""
        ...


def _products(spec: AttentionSpec | None, ranges: HeadRanges | None, floating: bool) -> _Products:
    if spec is None:
        return _Exact()
    if ranges is not None:
        return _Static(spec, ranges, floating)
    return _Dynamic(spec, floating or spec.format is not None)


class _Exact:
    def scores(self, query_RTD: Tensor, key_SD: Tensor) -> Tensor:
        return query_RTD.flatten(0, 1) @ key_SD.T

    def mixtures(self, p_XS: Tensor, value_SD: Tensor) -> Tensor:
        return p_XS @ value_SD


@dataclass(frozen=True)
class _Dynamic:
    """A range for each token; ``floating``: decoded operands are multiplied."""

    spec: AttentionSpec
    floating: bool

    def scores(self, query_RTD: Tensor, key_SD: Tensor) -> Tensor:
        query_XD, operand = query_RTD.flatten(0, 1), self.spec.operand
        if self.floating:
            return _fake(query_XD, operand)[0] @ _fake(key_SD, operand)[0].T
        queries, q = kernels.quantize_activation(query_XD, operand)
        keys, k = kernels.quantize_activation(key_SD, operand)
        return kernels.integer_product(queries, operand, q, keys, operand, k)

    def mixtures(self, p_XS: Tensor, value_SD: Tensor) -> Tensor:
        operand, probability = self.spec.operand, self.spec.probability
        if probability is None:
            return p_XS @ _fake(value_SD, operand)[0]
        if self.floating:
            value_SD, scale_S1 = _fake(value_SD, operand)
            return _fake(p_XS * scale_S1.T, probability)[0] @ (value_SD / scale_S1)
        values, v = kernels.quantize_activation(value_SD, operand)
        weights, p = kernels.quantize_activation(p_XS * v.scale.T, probability)
        # The values' scales are in the weights.
        one = Affine(torch.ones(1, 1, dtype=torch.float32, device=p_XS.device), None)
        return kernels.integer_product(weights, probability, p, values.T, operand, one)


@dataclass(frozen=True)
class _Static:
    """Ranges that were known before; ``floating``: decoded operands are multiplied."""

    spec: AttentionSpec
    ranges: HeadRanges
    floating: bool

    def scores(self, query_RTD: Tensor, key_SD: Tensor) -> Tensor:
        operand, ranges = self.spec.operand, self.ranges
        q_R1D, k_1D = ranges.at_channels(ranges.query), ranges.at_channels(ranges.key)
        q_R1D = mapped(q_R1D, lambda p: p[:, None])
        grid = operand.grid
        assert isinstance(grid, Int)
        if self.floating:
            return grid.fake(query_RTD, q_R1D).flatten(0, 1) @ grid.fake(key_SD, k_1D).T
        queries_XD, keys_SD = grid.encode(query_RTD, q_R1D).flatten(0, 1), grid.encode(key_SD, k_1D)
        total = torch.zeros((), dtype=torch.float32, device=query_RTD.device)
        for c, channels in enumerate(ranges.clusters):
            q_X1 = _column(ranges.query, c, query_RTD.shape[1])
            q_X1 = q_X1._replace(scale=_seen(q_X1.scale, query_RTD.flatten(0, 1)))
            k_S1 = _column(ranges.key, c, 1)
            k_S1 = k_S1._replace(scale=_seen(k_S1.scale, key_SD))
            total = total + kernels.integer_product(
                queries_XD[:, channels], operand, q_X1, keys_SD[:, channels], operand, k_S1
            )
        return total

    def mixtures(self, p_XS: Tensor, value_SD: Tensor) -> Tensor:
        operand, probability = self.spec.operand, self.spec.probability
        v_D = self.ranges.at_channels(self.ranges.value, of_values=True)
        v_1D = mapped(v_D, lambda p: p.reshape(1, -1))
        grid = operand.grid
        assert isinstance(grid, Int)
        if probability is None:
            return p_XS @ grid.fake(value_SD, v_1D)
        unit = torch.tensor([[1.0]], dtype=torch.float32, device=p_XS.device)
        p_11 = probability.grid.from_range(0 * unit, unit)  # pyright: ignore[reportAttributeAccessIssue]
        if self.floating:
            return probability.grid.fake(p_XS, p_11) @ grid.fake(value_SD, v_1D)  # pyright: ignore[reportAttributeAccessIssue]
        values, weights = grid.encode(value_SD, v_1D), probability.grid.encode(p_XS, p_11)
        v_D1 = mapped(v_1D, lambda p: p.T)
        v_D1 = v_D1._replace(scale=_seen(v_D1.scale, value_SD.T))
        p_X1 = p_11._replace(scale=_seen(p_11.scale, p_XS))
        return kernels.integer_product(weights, probability, p_X1, values.T.contiguous(), operand, v_D1)


def _column(params_RC: Affine, c: int, times: int) -> Affine:
    """Parameters of cluster ``c``, once for each of ``times`` tokens of every head: ``[R * times, 1]``."""
    return mapped(params_RC, lambda p: p[:, c].repeat_interleave(times)[:, None])


def _seen(scale_N1: Tensor, x_NK: Tensor) -> Tensor:
    """The scales of rows, NaN where a row holds NaN, which codes cannot say."""
    return torch.where(x_NK.isnan().any(1, keepdim=True), torch.nan, scale_N1)


def _fake(x_TI: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Rows rounded and restored, with gradients straight through, and their scales ``[T, 1]``."""
    grid = spec.grid
    assert isinstance(grid, Int | Float)
    params = MinMax()(x_TI, grid)
    return grid.fake(x_TI, params), params.scale  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
