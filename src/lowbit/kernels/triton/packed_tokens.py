"""Scores of packed keys and mixtures of packed values on a GPU. Imports triton.

A program reads one tile of 16 tokens of one head in words (see ``caches/words.py``), unpacks it in registers in float32 and
meets all queries of the head with it, so packed tokens cross the memory once.

Shapes: H sequence and key-value head, R query, N slot of a token, D channel, L token of a tile.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportOptionalOperand=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = tl.constexpr(16)


@triton.jit
def tile_of(
    codes, scale, zero, table, head, tile, tiles, params, middle,
    BITS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_TILES: tl.constexpr, TABLED: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    """Values ``[D, L]`` float32 of one tile; channels from DIM on are zero. BLOCK_TILES 0: scales are of tokens."""
    d_D = tl.arange(0, D)
    l_L = tl.arange(0, 16)
    inside_D1 = (d_D < DIM)[:, None]
    word_D, shift_D = d_D * BITS // 32, (d_D * BITS % 32).to(tl.uint32)
    at_DL = ((head * tiles + tile) * WORDS + word_D[:, None]) * 16 + l_L[None, :]
    code_DL = tl.load(codes + at_DL, mask=inside_D1, other=0).to(tl.uint32, bitcast=True) >> shift_D[:, None]
    if 32 % BITS != 0:
        over_D1 = (shift_D + BITS > 32)[:, None] & inside_D1
        next_DL = tl.load(codes + at_DL + 16, mask=over_D1, other=0).to(tl.uint32, bitcast=True)
        left_D = tl.where(shift_D == 0, 0, 32 - shift_D)
        code_DL |= tl.where(over_D1, next_DL << left_D[:, None], 0)
    code_DL = (code_DL & (2**BITS - 1)).to(tl.int32)
    value_DL = tl.load(table + code_DL) if TABLED else code_DL.to(tl.float32)
    group_D = d_D // WIDTH
    if BLOCK_TILES == 0:
        param_DL = head * params + (tile * GROUPS + group_D[:, None]) * 16 + l_L[None, :]
    else:
        param_DL = head * params + tile // BLOCK_TILES * GROUPS + group_D[:, None] + 0 * l_L[None, :]
    scale_DL = tl.load(scale + param_DL, mask=inside_D1, other=0.0).to(tl.float32)
    if ZEROED:
        return (value_DL - tl.load(zero + param_DL, mask=inside_D1, other=0.0).to(tl.float32)) * scale_DL
    return (value_DL - middle) * scale_DL


@triton.jit
def score_tiles(
    query, codes, scale, zero, table, out, tiles, used, params, middle, rows,
    BITS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_TILES: tl.constexpr, TABLED: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    """out ``[H, R, N]``: queries ``[H, R, DIM]`` times one tile of keys."""
    head, tile = tl.program_id(0), tl.program_id(1)
    key_DL = tile_of(
        codes, scale, zero, table, head, tile, tiles, params, middle,
        BITS, DIM, D, WORDS, GROUPS, WIDTH, BLOCK_TILES, TABLED, ZEROED,
    )  # fmt: skip
    d_D = tl.arange(0, D)
    for r in range(rows):
        query_D = tl.load(query + (head * rows + r) * DIM + d_D, mask=d_D < DIM, other=0.0)
        score_L = tl.sum(query_D[:, None] * key_DL, 0)
        tl.store(out + (head * rows + r) * used * 16 + tile * 16 + tl.arange(0, 16), score_L)


@triton.jit
def mix_tiles(
    weight, codes, scale, zero, table, out, tiles, used, params, middle, rows, together, pieces,
    BITS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_TILES: tl.constexpr, TABLED: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    """out ``[H, pieces, R, DIM]``: one query's weights ``[H, R, N]`` times ``together`` tiles of values."""
    head, piece, r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d_D = tl.arange(0, D)
    sum_D = tl.zeros((D,), tl.float32)
    for tile in range(piece * together, min((piece + 1) * together, used)):
        value_DL = tile_of(
            codes, scale, zero, table, head, tile, tiles, params, middle,
            BITS, DIM, D, WORDS, GROUPS, WIDTH, BLOCK_TILES, TABLED, ZEROED,
        )  # fmt: skip
        weight_L = tl.load(weight + (head * rows + r) * used * 16 + tile * 16 + tl.arange(0, 16))
        value_DL = tl.where(weight_L[None, :] != 0.0, value_DL, 0.0)  # a slot without a token may hold anything
        sum_D += tl.sum(weight_L[None, :] * value_DL, 1)
    tl.store(out + ((head * pieces + piece) * rows + r) * DIM + d_D, sum_D, mask=d_D < DIM)


@dataclass(frozen=True)
class Tokens:
    """Packed tokens of all heads.

    Args:
        codes: int32 ``[B, H, tiles, words, 16]``.
        scale, zero: of tokens ``[B, H, tiles, groups, 16]``, or of blocks ``[B, H, blocks, groups]``.
        table: float32, values of the codes; None: the codes themselves.
        middle: zero point where ``zero`` is None.
        bits, dim, width: of a code; channels of a head, and of a group.
        block_tiles: tiles of a block; 0: scales are of tokens.
        used: tiles that hold tokens.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    middle: float
    bits: int
    dim: int
    width: int
    block_tiles: int
    used: int

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        _batch, _heads, tiles, words, _ = self.codes.shape
        groups = self.scale.shape[3]
        tensors = [
            self.codes, self.scale, self.scale if self.zero is None else self.zero,
            self.scale if self.table is None else self.table,
        ]  # fmt: skip
        constants = {
            "BITS": self.bits, "DIM": self.dim, "D": max(16, triton.next_power_of_2(self.dim)), "WORDS": words,
            "GROUPS": groups, "WIDTH": self.width, "BLOCK_TILES": self.block_tiles, "TABLED": self.table is not None,
            "ZEROED": self.zero is not None,
        }  # fmt: skip
        return [*tensors, tiles, self.used, self.scale[0, 0].numel(), self.middle], constants


def scores(query_BHRD: Tensor, tokens: Tokens) -> Tensor:
    """Queries times every slot of packed keys, float32 ``[B, H, R, N]``; slots without a token hold anything.

    Args:
        query_BHRD: float32, contiguous, scaled, in the coordinates of packed keys.
    """
    batch, heads, rows, _ = query_BHRD.shape
    out = torch.empty(batch, heads, rows, tokens.used * 16, dtype=torch.float32, device=query_BHRD.device)
    (codes, scale, zero, table, *numbers), constants = tokens._arguments()
    score_tiles[(batch * heads, tokens.used)](query_BHRD, codes, scale, zero, table, out, *numbers, rows, **constants)
    return out


def mixture(weight_BHRN: Tensor, tokens: Tokens, together: int = 16) -> Tensor:
    """The sum of packed values by ``weight`` (float32, contiguous, zero at slots without a token), float32 ``[B, H, R, D]``."""
    batch, heads, rows, _ = weight_BHRN.shape
    pieces = -(-tokens.used // together)
    out = torch.empty(batch, heads, pieces, rows, tokens.dim, dtype=torch.float32, device=weight_BHRN.device)
    (codes, scale, zero, table, *numbers), constants = tokens._arguments()
    mix_tiles[(batch * heads, pieces, rows)](
        weight_BHRN, codes, scale, zero, table, out, *numbers, rows, together, pieces, **constants
    )
    return out.sum(2)
