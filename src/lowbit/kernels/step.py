"""One call of the compiled code (``cpu/step.cpp``) runs one token through a whole model.

For a small model, the calls of transformers cost more than the arithmetic of a token: about thirty for each block, a
thousand for a model of 135 million weights. Here a model is described once, by the addresses of its tensors, and one call
runs all of it. The products are those of :mod:`lowbit.kernels.product`, with the same arithmetic; values between them are
float32. Nothing is copied: the step sees tensors that change in place, but not tensors that are replaced;
:mod:`lowbit.decoding` watches for these.

Shapes: O output channel, I input channel, D dim of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.compiled import address
from lowbit.kernels import native, side_terms
from lowbit.kernels.native import CODEBOOK, DTYPES, TABLE
from lowbit.kernels.product import Product
from lowbit.numerics import KeptColumns, SideTerm, Sparse


@dataclass(frozen=True)
class Linear:
    """A linear of the model: a packed ``product`` with ``tiles`` and ``side_terms``, or a dense ``weight`` ``[O, I]``; and a
    ``bias`` ``[O]``.

    What is packed may be multiplied: its input by ``before`` ``[I]``, and its output by ``after`` ``[O]`` (contiguous float32).
    With ``eps`` the output is then normalized over its channels, ``(y - mean) / sqrt(variance + eps)``. The bias comes last.
    """

    product: Product | None = None
    tiles: Tensor | None = None
    side_terms: tuple[SideTerm, ...] = ()
    weight: Tensor | None = None
    bias: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    eps: float | None = None


@dataclass(frozen=True)
class RmsNorm:
    """``x / rms(x) * (gain + gain_offset)``."""

    gain: Tensor
    eps: float
    gain_offset: float = 0.0


@dataclass(frozen=True)
class DecoderBlock:
    """The parts of one block; the norms of each head, ``q_norm`` and ``k_norm``, may be absent."""

    attention_norm: RmsNorm
    q: Linear
    k: Linear
    v: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    o: Linear
    mlp_norm: RmsNorm
    gate: Linear
    up: Linear
    down: Linear


def watch() -> Any:
    """A fast comparison of dictionary entries with recorded values.

    ``entry(place, name, value, present)`` records an entry and ``same()`` compares all of them; ``empty(place)`` records a
    dictionary and ``all_empty()`` says whether all of these are empty.
    """
    assert native._cpu is not None
    return native._cpu.Watch()


def why_not(linear: Linear) -> str | None:
    """The reason why the step cannot multiply by ``linear``; None if it can."""
    product = linear.product
    if product is None:
        return None
    if product.act is not None and not product.bits:
        return "its input is quantized to a format without an integer product"
    if product.threshold:
        return "channels of its input that reach a threshold are multiplied separately"
    for term in linear.side_terms:
        if reason := side_terms.why_not(term):
            return reason
    return None


class TokenStep:
    """A model, described to the compiled code.

    Args:
        isa: one of :func:`~lowbit.kernels.native.instruction_sets`.
        hidden: width of the residual stream.
        heads, kv_heads, head_dim: of attention; query heads that share a key-value head are neighbours.
        rotary: leading channels of a head that positions rotate, channel i together with channel i + rotary / 2.
        blocks, norm, head: linears for which :func:`why_not` is None; contiguous tensors with dtypes in
            :data:`~lowbit.kernels.native.DTYPES`.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        isa: str,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary: int,
        blocks: Sequence[DecoderBlock],
        norm: RmsNorm,
        head: Linear,
    ):
        assert native._cpu is not None
        self._step = native._cpu.Step(isa, hidden, heads, kv_heads, head_dim, rotary, head_dim**-0.5)
        self._kept: list[object] = [tuple(blocks), norm, head]  # keeps alive the memory that the step reads
        for b in blocks:
            self._step.block(
                self._norm(b.attention_norm), self._linear(b.q), self._linear(b.k), self._linear(b.v),
                self._norm(b.q_norm), self._norm(b.k_norm), self._linear(b.o), self._norm(b.mlp_norm),
                self._linear(b.gate), self._linear(b.up), self._linear(b.down),
            )  # fmt: skip
        self._step.finish(self._norm(norm), self._linear(head))
        self._vocabulary = head.product.rows if head.product is not None else len(head.weight)  # pyright: ignore[reportArgumentType]

    def __call__(
        self, x: Tensor, keys: list[int], values: list[int], dtype: torch.dtype, capacity: int, length: int,
        cos: Tensor, sin: Tensor,
    ) -> Tensor:  # fmt: skip
        """Logits ``[V]`` of the next token, in the dtype of x; writes the token's keys and values.

        Args:
            x: ``[hidden]``, the token's embedding.
            keys, values: for each block the address of its cache ``[kv_heads, capacity, head_dim]`` of ``dtype``.
            length: tokens in the cache, fewer than ``capacity``.
            cos, sin: float32 ``[rotary]``, of the token's position.
        """
        logits = x.new_empty(self._vocabulary)
        self._step.run(
            x.data_ptr(), DTYPES[x.dtype], keys, values, DTYPES[dtype], capacity, length, cos.data_ptr(), sin.data_ptr(),
            logits.data_ptr(), DTYPES[logits.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return logits

    def packed(
        self, x: Tensor, keys: list[Any], values: list[Any], length: int, cos: Tensor, sin: Tensor
    ) -> Tensor | None:
        """The same with packed tokens, to which the token is added; None if some number does not fit the storage of its scale.

        Args:
            keys, values: for each block what :func:`lowbit.kernels.cache.layer_side` gave.
            length: tokens that they hold.
        """
        logits = x.new_empty(self._vocabulary)
        fits = self._step.run_packed(
            x.data_ptr(), DTYPES[x.dtype], keys, values, length, cos.data_ptr(), sin.data_ptr(), logits.data_ptr(),
            DTYPES[logits.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return logits if fits else None

    def _norm(self, norm: RmsNorm | None) -> int:
        if norm is None:
            return -1
        gain = norm.gain
        return self._step.norm(gain.data_ptr(), DTYPES[gain.dtype], len(gain), norm.gain_offset, norm.eps)

    def _linear(self, linear: Linear) -> int:
        bias = (0, 0) if linear.bias is None else (linear.bias.data_ptr(), DTYPES[linear.bias.dtype])
        if linear.product is None:
            weight = linear.weight
            assert weight is not None and weight.is_contiguous()
            return self._step.dense(weight.data_ptr(), DTYPES[weight.dtype], *weight.shape, *bias)
        p, tiles = linear.product, linear.tiles
        assert tiles is not None and why_not(linear) is None
        if linear.bias is not None and linear.bias.numel() != p.rows:
            raise ValueError(f"a bias has {linear.bias.numel()} numbers for {p.rows} rows")
        params = [None if t is None else t.float().contiguous() for t in p.params or (None, None)]
        self._kept.append(params)
        mode = native.input_mode(p.kind in (TABLE, CODEBOOK), bool(p.bits))
        matrix = self._step.packed(
            tiles.data_ptr(), tiles.numel(), *native.table_arguments(p.table), mode, p.bits, p.symmetric, p.reach,
            *(0 if t is None else t.data_ptr() for t in params), *bias,
        )  # fmt: skip
        for term in linear.side_terms:
            assert isinstance(term, Sparse | KeptColumns)
            self._step.beside(matrix, *side_terms.row_arguments(term))
        if linear.before is not None or linear.after is not None or linear.eps is not None:
            self._step.around(
                matrix, address(linear.before), address(linear.after), linear.eps is not None, linear.eps or 0.0
            )
        return matrix
