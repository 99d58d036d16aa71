"""Dense bit streams: codes of 1 to 8 bits, one after another, with no bit lost between them.

Code i of a row sits at bits ``i * bits`` and up, least significant first; rows start at whole bytes. The usual
alternative, as many codes as fit a 32-bit word, wastes bits at 3, 5, 6 and 7 and needs a table of special cases.

A word of W codes, W the least number that fills whole bytes, is spread to W bytes in log2(W) steps: the upper half of
the codes moves up to its place, in both halves of that the upper quarter moves, and so on. All widths share the one
function, every step is a whole-tensor shift and mask, and packing is the same walk backwards. Bytes are read as
little-endian words, as safetensors requires of its hosts too.

Law: ``unpack(pack(codes, bits), bits, n) == codes`` for all codes below ``2**bits``.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_width(n: int, bits: int) -> int:
    """Bytes that a row of ``n`` codes takes."""
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``[..., n]`` uint8 codes below ``2**bits`` to ``[..., ceil(n * bits / 8)]`` uint8; spare bits of a row are zero.

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
    """``[..., ceil(n * bits / 8)]`` uint8 back to ``[..., n]`` uint8 codes.

    Raises:
        ValueError: a row that is not as long as ``n`` codes are.
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_width(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_width(n, bits)} bytes, found {packed.shape[-1]}")
    if bits == 8:
        return packed
    per_word = 8 // gcd(bits, 8)
    used = per_word * bits // 8
    if used == 1:  # 1, 2 and 4 bits: a byte is a word
        word = packed.to(_WORD[per_word])
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
    """The last dimension filled with zeros to a multiple; contiguous."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % multiple)).contiguous()


def _steps(bits: int, per_word: int) -> list[tuple[int, int, int]]:
    """(codes that move, mask of their spread places, mask of those that stay), from the coarsest step to the finest."""
    steps = []
    half = per_word // 2
    while half:
        run = 2 ** (half * bits) - 1
        lower = sum(run << start * 8 for start in range(0, per_word, 2 * half))
        steps.append((half, lower << half * 8, lower))
        half //= 2
    return steps
