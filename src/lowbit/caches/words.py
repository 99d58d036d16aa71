"""Codes of one token of one head in 32-bit words, sixteen tokens side by side.

A word holds the codes of consecutive channels of one token, the first in its lowest bits; where the width does not divide 32
a code may begin in one word and end in the next. The words of sixteen tokens lie side by side (a tile), so a vector
instruction shifts one channel of all of them into place, and a token that is appended touches no other token's words.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TILE = 16
"""Tokens of a tile."""


def words_of(dim: int, bits: int) -> int:
    """32-bit words that ``dim`` codes of ``bits`` take."""
    return -(-dim * bits // 32)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[..., D]`` to int32 words ``[..., W]``."""
    dim = codes.shape[-1]
    first, shift, second = _places(dim, bits, codes.device)
    wide = codes.long() << shift  # below 2**39: a code begins in the lower word and may end in the upper
    words = torch.zeros(*codes.shape[:-1], words_of(dim, bits) + 1, dtype=torch.int64, device=codes.device)
    words.index_add_(-1, first, wide & 0xFFFFFFFF)  # bits of different codes differ, so sums are unions
    words.index_add_(-1, second, wide >> 32)
    return words[..., :-1].to(torch.int32)


def from_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """Words int32 ``[..., W]`` to codes uint8 ``[..., dim]``."""
    first, shift, second = _places(dim, bits, words.device)
    low = words.long() & 0xFFFFFFFF
    wide = low.index_select(-1, first)
    if 32 % bits:
        wide = wide | low.index_select(-1, second.clamp(max=words.shape[-1] - 1)) << 32
    return ((wide >> shift) & (2**bits - 1)).to(torch.uint8)


@lru_cache
def _places(dim: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The word in which each channel's code begins, the bit there, and the word after it."""
    begin = torch.arange(dim, device=device) * bits
    return begin // 32, begin % 32, begin // 32 + 1
