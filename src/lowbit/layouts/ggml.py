"""GGUF's block types: the bytes of a row of blocks, and the buffers of the canonical layout, in both directions, bit for bit.

A block is ``elements`` neighbours of a row with their scales. The types of 32 elements store scales in float16; the types of
256 (K) divide them into sub-blocks, whose scales and minima are small integers times one or two numbers in float16. In this
project's terms that is a second level over ``Block(sub-blocks, 1)`` of the scales, which are laid out ``[columns, rows]``.

Byte orders as in the package gguf, whose ``quants.py`` decodes every type; tests compare with it.

Shapes: O row, I column, N block (row-major over O and the blocks of a row), E elements of a block, S sub-block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.layouts.bitstream import pack, unpack
from lowbit.layouts.canonical import packed_layout
from lowbit.numerics import Block, Float, Minimum, PerGroup, SignedScale, Spec, Table, Unsigned

TERNARY = Table((-1.0, 0.0, 1.0))
"""The levels of TQ1_0 and TQ2_0."""
IQ4_LEVELS = Table(
    tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))), signed=True
)
"""The levels of IQ4_NL."""


@dataclass(frozen=True)
class Parts:
    """Blocks taken apart.

    Args:
        codes: uint8 ``[N, E]``.
        scale, minimum: float16 ``[N, 1]``; of the second level where there are sub-blocks. For MXFP4 the exponent's byte.
        scales, minima: of sub-blocks, uint8 ``[N, S]``, codes of the second level.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """One of GGUF's types of quantized tensors.

    Args:
        name: as GGUF has it.
        elements, nbytes: of a block.
        spec: the format of its numbers.
        join: parts to bytes, uint8 ``[N, nbytes]``.
        split: bytes to parts.
    """

    name: str
    elements: int
    nbytes: int
    spec: Spec
    join: Callable[[Parts], Tensor]
    split: Callable[[Tensor], Parts]

    @property
    def bits(self) -> float:
        """Stored bits of a weight."""
        return 8 * self.nbytes / self.elements

    def encode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The rows, uint8 ``[O, bytes]``, of a weight of ``shape`` in this type's format, whose buffers are ``tensors``."""
        rows, columns = shape
        codes = unpack(tensors["codes"], self.spec.grid.bits, columns).reshape(-1, self.elements)
        blocks = columns // self.elements

        def of_blocks(name: str) -> Tensor | None:
            """``[columns / ..., O]`` of the second level, or ``[O, blocks]``, to ``[N, 1]``."""
            if self.spec.stats is None:
                value = tensors.get(name)
            else:
                value = tensors.get(f"{name}_scale")
                value = None if value is None else value.T
            return None if value is None else value.reshape(rows * blocks, 1)

        def of_sub_blocks(name: str) -> Tensor | None:
            if self.spec.stats is None or f"{name}_codes" not in tensors:
                return None
            small = unpack(tensors[f"{name}_codes"], self.spec.stats.grid.bits, rows)
            return small.T.reshape(rows * blocks, -1)

        scale = of_blocks("scale")
        assert scale is not None
        parts = Parts(codes, scale, of_blocks("minimum"), of_sub_blocks("scale"), of_sub_blocks("minimum"))
        return self.join(parts).reshape(rows, -1)

    def decode(self, data: Tensor, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The buffers of a weight of ``shape`` whose rows are ``data``, uint8 ``[O, bytes]``: the inverse of :meth:`encode`."""
        rows, columns = shape
        parts = self.split(data.reshape(-1, self.nbytes))
        tensors = {"codes": pack(parts.codes.reshape(rows, columns), self.spec.grid.bits)}
        for name, one, small in (("scale", parts.scale, parts.scales), ("minimum", parts.minimum, parts.minima)):
            if one is None:
                continue
            if self.spec.stats is None or small is None:
                tensors[name] = one.reshape(rows, -1).contiguous()
            else:
                tensors[f"{name}_codes"] = pack(small.reshape(rows, -1).T.contiguous(), self.spec.stats.grid.bits)
                tensors[f"{name}_scale"] = one.reshape(rows, -1).T.contiguous()
        return {name: tensors[name] for name in packed_layout(self.spec, shape)}


# Pieces of blocks


def _bytes(x: Tensor) -> Tensor:
    """``[N, 1]`` to uint8 ``[N, bytes]``."""
    return x.reshape(-1).contiguous().view(torch.uint8).view(len(x), -1)


def _half(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)


def _fold(codes: Tensor, runs: int, width: int, bits: int) -> Tensor:
    """Puts ``8 / bits`` runs of ``width`` codes into ``width`` bytes, the first run lowest; ``runs`` times.

    ``[N, runs * (8 / bits) * width]`` to ``[N, runs * width]``. Codes are cut to ``bits``.
    """
    parts = (codes & 2**bits - 1).view(len(codes), runs, 8 // bits, width)
    folded = parts[:, :, 0].clone()
    for k in range(1, 8 // bits):
        folded |= parts[:, :, k] << (k * bits)
    return folded.flatten(1)


def _unfold(data: Tensor, runs: int, width: int, bits: int) -> Tensor:
    """The inverse of :func:`_fold`."""
    data = data.reshape(len(data), runs, 1, width)
    parts = [(data >> (k * bits)) & 2**bits - 1 for k in range(8 // bits)]
    return torch.cat(parts, 2).flatten(1)


def _bits_in_words(high: Tensor) -> Tensor:
    """One bit of each of 32 codes, the first lowest, in 4 bytes."""
    parts = high.view(len(high), 4, 8)
    folded = parts[:, :, 0].clone()
    for k in range(1, 8):
        folded |= parts[:, :, k] << k
    return folded


def _bits_of_words(data: Tensor) -> Tensor:
    return torch.stack([(data >> k) & 1 for k in range(8)], 2).flatten(1)


# 32 elements


def _flat(bits: int, with_minimum: bool) -> tuple[Callable[[Parts], Tensor], Callable[[Tensor], Parts]]:
    """float16 scale, float16 of the lowest value where there is one, fifth bits, nibbles."""

    def join(parts: Parts) -> Tensor:
        pieces = [_bytes(parts.scale)]
        if with_minimum:
            assert parts.minimum is not None
            pieces.append(_bytes(-parts.minimum))
        if bits == 8:
            return torch.cat([*pieces, parts.codes ^ 128], 1)
        pieces += [_bits_in_words(parts.codes >> 4)] if bits == 5 else []
        return torch.cat([*pieces, _fold(parts.codes, 1, 16, 4)], 1)

    def split(data: Tensor) -> Parts:
        at = 4 if with_minimum else 2
        minimum = -_half(data[:, 2:4]) if with_minimum else None
        if bits == 8:
            codes = data[:, at:] ^ 128
        else:
            codes = _unfold(data[:, at + 4 * (bits == 5) :], 1, 16, 4)
            if bits == 5:
                codes |= _bits_of_words(data[:, at : at + 4]) << 4
        return Parts(codes, _half(data[:, :2]), minimum)

    return join, split


def _join_exponent(parts: Parts) -> Tensor:
    return torch.cat([_bytes(parts.scale), _fold(parts.codes, 1, 16, 4)], 1)


def _split_exponent(data: Tensor) -> Parts:
    return Parts(_unfold(data[:, 1:], 1, 16, 4), data[:, :1].contiguous().view(torch.float8_e8m0fnu))


# 256 elements


def _join_sixes(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    low = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    middle = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    return torch.cat([low, middle, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], 1)


def _split_sixes(data: Tensor) -> tuple[Tensor, Tensor]:
    low, middle, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([low & 63, (rest & 15) | (low >> 6 << 4)], 1)
    return scales, torch.cat([middle & 63, (rest >> 4) | (middle >> 6 << 4)], 1)


def _join_q2(parts: Parts) -> Tensor:
    assert parts.scales is not None and parts.minima is not None and parts.minimum is not None
    small = parts.scales | parts.minima << 4
    return torch.cat([small, _fold(parts.codes, 2, 32, 2), _bytes(parts.scale), _bytes(parts.minimum)], 1)


def _split_q2(data: Tensor) -> Parts:
    small, codes, scale, minimum = data.split((16, 64, 2, 2), 1)
    return Parts(_unfold(codes, 2, 32, 2), _half(scale), _half(minimum), small & 15, small >> 4)


def _join_q3(parts: Parts) -> Tensor:
    assert parts.scales is not None
    small = torch.cat([_fold(parts.scales, 1, 8, 4), _fold(parts.scales >> 4, 1, 4, 2)], 1)
    high = _fold(parts.codes >> 2, 1, 32, 1)
    return torch.cat([high, _fold(parts.codes, 2, 32, 2), small, _bytes(parts.scale)], 1)


def _split_q3(data: Tensor) -> Parts:
    high, low, four, two, scale = data.split((32, 64, 8, 4, 2), 1)
    codes = _unfold(low, 2, 32, 2) | _unfold(high, 1, 32, 1) << 2
    return Parts(codes, _half(scale), scales=_unfold(four, 1, 8, 4) | _unfold(two, 1, 4, 2) << 4)


def _join_q45(bits: int) -> Callable[[Parts], Tensor]:
    def join(parts: Parts) -> Tensor:
        assert parts.scales is not None and parts.minima is not None and parts.minimum is not None
        small = _join_sixes(parts.scales, parts.minima)
        high = [_fold(parts.codes >> 4, 1, 32, 1)] if bits == 5 else []
        low = _fold(parts.codes, 4, 32, 4)
        return torch.cat([_bytes(parts.scale), _bytes(parts.minimum), small, *high, low], 1)

    return join


def _split_q45(bits: int) -> Callable[[Tensor], Parts]:
    def split(data: Tensor) -> Parts:
        scale, minimum, small, high, low = data.split((2, 2, 12, 32 if bits == 5 else 0, 128), 1)
        codes = _unfold(low, 4, 32, 4)
        if bits == 5:
            codes |= _unfold(high, 1, 32, 1) << 4
        return Parts(codes, _half(scale), _half(minimum), *_split_sixes(small))

    return split


def _join_q6(parts: Parts) -> Tensor:
    assert parts.scales is not None
    low, high = _fold(parts.codes, 2, 64, 4), _fold(parts.codes >> 4, 2, 32, 2)
    return torch.cat([low, high, parts.scales ^ 128, _bytes(parts.scale)], 1)


def _split_q6(data: Tensor) -> Parts:
    low, high, small, scale = data.split((128, 64, 16, 2), 1)
    return Parts(_unfold(low, 2, 64, 4) | _unfold(high, 2, 32, 2) << 4, _half(scale), scales=small ^ 128)


# 256 elements of three levels


def _join_threes(parts: Parts) -> Tensor:
    """Five levels in a byte, as digits of a number below 243 that is spread over 256: multiplying by 3 brings the next one up."""
    runs = []
    for codes, width, count in zip(parts.codes.split(_THREES, 1), (32, 16, 4), (5, 5, 4), strict=True):
        digits = codes.view(len(codes), count, width).int()
        number = (digits * torch.tensor([3 ** (4 - i) for i in range(count)])[:, None]).sum(1)
        runs.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat([*runs, _bytes(parts.scale)], 1)


def _split_threes(data: Tensor) -> Parts:
    runs, codes = data[:, :-2].split((32, 16, 4), 1), []
    for run, count in zip(runs, (5, 5, 4), strict=True):
        codes += [((run.int() * 3**i & 255) * 3 >> 8).to(torch.uint8) for i in range(count)]
    return Parts(torch.cat(codes, 1), _half(data[:, -2:]))


_THREES = (160, 80, 16)
"""Elements of the three runs of bytes of a block."""


def _second(grid: SignedScale | Unsigned, sub_blocks: int) -> Spec:
    return Spec(grid, Block(sub_blocks, 1))


BLOCK_TYPES: dict[str, BlockType] = {
    each.name: each
    for each in (
        BlockType("Q4_0", 32, 18, Spec(SignedScale(4), PerGroup(32)), *_flat(4, False)),
        BlockType("Q4_1", 32, 20, Spec(Minimum(4), PerGroup(32)), *_flat(4, True)),
        BlockType("Q5_0", 32, 22, Spec(SignedScale(5), PerGroup(32)), *_flat(5, False)),
        BlockType("Q5_1", 32, 24, Spec(Minimum(5), PerGroup(32)), *_flat(5, True)),
        BlockType("Q8_0", 32, 34, Spec(SignedScale(8), PerGroup(32)), *_flat(8, False)),
        BlockType("IQ4_NL", 32, 18, Spec(IQ4_LEVELS, PerGroup(32)), *_flat(4, False)),
        BlockType(
            "MXFP4",
            32,
            17,
            Spec(Float(2, 1, shared_exponent=True), PerGroup(32), scale_dtype="float8_e8m0fnu"),
            _join_exponent,
            _split_exponent,
        ),
        BlockType("Q2_K", 256, 84, Spec(Minimum(2), PerGroup(16), _second(Unsigned(4), 16)), _join_q2, _split_q2),
        BlockType(
            "Q3_K", 256, 110, Spec(SignedScale(3), PerGroup(16), _second(SignedScale(6), 16)), _join_q3, _split_q3
        ),
        BlockType(
            "Q4_K", 256, 144, Spec(Minimum(4), PerGroup(32), _second(Unsigned(6), 8)), _join_q45(4), _split_q45(4)
        ),
        BlockType(
            "Q5_K", 256, 176, Spec(Minimum(5), PerGroup(32), _second(Unsigned(6), 8)), _join_q45(5), _split_q45(5)
        ),
        BlockType(
            "Q6_K", 256, 210, Spec(SignedScale(6), PerGroup(16), _second(SignedScale(8), 16)), _join_q6, _split_q6
        ),
        BlockType("TQ1_0", 256, 54, Spec(TERNARY, PerGroup(256)), _join_threes, _split_threes),
        BlockType(
            "TQ2_0",
            256,
            66,
            Spec(TERNARY, PerGroup(256)),
            lambda parts: torch.cat([_fold(parts.codes, 2, 32, 2), _bytes(parts.scale)], 1),
            lambda data: Parts(_unfold(data[:, :64], 2, 32, 2), _half(data[:, 64:])),
        ),
    )
}
"""By name. A weight in ``spec`` of a type is stored in it as it is; two types of three levels share one."""
