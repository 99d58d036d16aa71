"""Dense bit streams: codes of 1 to 8 bits, one after another, without gaps.

Code i of a row starts at bit ``i * bits``, least significant bit first; rows start at whole bytes. The usual
alternative, whole codes in 32-bit words, wastes bits at widths of 3, 5, 6 and 7 and needs special cases.

A word is W codes, the least number that fills whole bytes. log2(W) steps spread it to W bytes: the upper half of the
codes moves to its place, then the upper quarter within each half, and so on. All widths share this function, every step
shifts and masks a whole tensor, and packing takes the steps in reverse. Bytes are read as little-endian words, which
safetensors also requires.

Law: ``unpack(pack(codes, bits), bits, n) == codes`` for all codes below ``2**bits``.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_width(n: int, bits: int) -> int:
    """Bytes in a row of ``n`` codes."""
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into bytes.

    Args:
        codes: uint8 ``[..., n]``, below ``2**bits``.
        bits: 1 to 8.

    Returns:
        uint8 ``[..., ceil(n * bits / 8)]``; unused bits at the end of a row are zero.

    Raises:
        ValueError: codes that are not uint8, or that do not fit.
    """
    _check(codes, bits)
    n = codes.shape[-1]
    if bits < 8 and codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes of {bits} bits are below {2**bits}, found {int(codes.max())}")
    if bits == 8:
        return codes.contiguous()
    per_word = 8 // gcd(bits, 8)
    word = _pad(codes, per_word).view(_WORD[per_word])
    for half, upper, lower in reversed(_steps(bits, per_word)):
        word = (word & lower) | ((word & upper) >> (half * (8 - bits)))
    used = per_word * bits // 8
    return (
        word.contiguous()
        .view(torch.uint8)
        .unflatten(-1, (-1, per_word))[..., :used]
        .flatten(-2)[..., : packed_width(n, bits)]
        .contiguous()
    )


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        packed: uint8 ``[..., ceil(n * bits / 8)]``.
        bits: 1 to 8.
        n: codes in a row.

    Returns:
        Codes, uint8 ``[..., n]``.

    Raises:
        ValueError: a row whose length is not that of ``n`` codes.
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_width(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_width(n, bits)} bytes, found {packed.shape[-1]}")
    if bits == 8:
        return packed
    per_word = 8 // gcd(bits, 8)
    used = per_word * bits // 8
    if used == 1:  # 1, 2 and 4 bits: a byte is a word
        word = _plain(packed).to(_WORD[per_word])
    else:
        groups = _pad(packed, used).unflatten(-1, (-1, used))
        spread = groups.new_zeros(*groups.shape[:-1], per_word)
        spread[..., :used] = groups
        word = spread.view(_WORD[per_word]).squeeze(-1)
    for half, upper, lower in _steps(bits, per_word):
        moved = (word << (half * (8 - bits))).bitwise_and_(upper)
        word = (word & lower).bitwise_or_(moved)
    return word.view(torch.uint8)[..., :n].contiguous()


def _check(x: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, found {bits}")
    if x.dtype != torch.uint8:
        raise ValueError(f"codes and packed bytes are torch.uint8, found {x.dtype}")


def _pad(x: Tensor, multiple: int) -> Tensor:
    """Fills the last dimension with zeros to a multiple of ``multiple``; see :func:`_plain`."""
    return _plain(torch.nn.functional.pad(x, (0, -x.shape[-1] % multiple)))


def _plain(x: Tensor) -> Tensor:
    """Contiguous, with the strides of its shape: a dimension of one element may have any, and views as other types refuse those."""
    return x.contiguous().view(-1).view(x.shape)


def _steps(bits: int, per_word: int) -> list[tuple[int, int, int]]:
    """(codes that move, mask of their new places, mask of the codes that stay) for each step, the coarsest first."""
    steps = []
    half = per_word // 2
    while half:
        run = 2 ** (half * bits) - 1
        lower = sum(run << start * 8 for start in range(0, per_word, 2 * half))
        steps.append((half, lower << half * 8, lower))
        half //= 2
    return steps
