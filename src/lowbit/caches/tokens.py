"""Packed tokens of all heads of one layer: codes and parameters in buffers that grow.

Tokens that share ranges (a block) are packed together; a block begins a tile, and cropping leaves slots of its last tile
empty. What is packed is never quantized again.

Shapes: B sequence, H key-value head, N token, D channel, W word, G group of a token's channels, M block, C group of a
block's channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.caches.words import TILE, from_words, to_words, words_of
from lowbit.numerics import Affine, Block, MinMax, Normal, PerGroup, PerTensor, RangeGrid, Spec, fake_quantize

_STEP = 8
"""Tiles by which buffers grow at least; a large one grows by a sixty-fourth."""


class PackedTokens:
    """Tokens ``[B, H, N, D]`` in the format ``spec``.

    Args:
        spec: a grid that a range places, per token, per group of a token's channels, or per block of tokens.
        like: ``[B, H, N, D]``, of whose sequences, heads, channels and device the tokens will be.
        range: of all tokens of each head, ``[H, 2]``, where the granularity is the whole tensor.
        shared_heads: the ranges of a token are those of all its heads together.

    Attributes:
        codes: int32 ``[B, H, tiles, W, 16]``; see :mod:`lowbit.caches.words`.
        scale, zero: parameters in the spec's ``scale_dtype``: ``[B, H, tiles, G, 16]`` of tokens (H is 1 where heads share
            them), or ``[B, H, M, C]`` of blocks. ``zero`` is None where the grid has no zero point; both are empty where one
            range serves all tokens.
        fixed: the parameters of all tokens of each head, float32 ``[H, 1, 1]``, where one range serves them.
        rows: tokens that share a range.
        groups: ranges of such tokens; each is of :attr:`width` channels.
        counts: tokens of each block; empty for formats without blocks.
        length: tokens.
        changes: how often tokens were dropped.
    """

    def __init__(self, spec: Spec, like: Tensor, range: Tensor | None = None, *, shared_heads: bool = False):
        self.spec = spec
        self.dim = like.shape[-1]
        grain = spec.granularity
        self.rows = grain.rows if isinstance(grain, Block) else 1
        self.groups = grain.param_shape((self.rows, self.dim))[1]
        width = grain.cols if isinstance(grain, Block) else grain.size if isinstance(grain, PerGroup) else self.dim
        self.width = min(width, self.dim)
        self.counts: list[int] = []
        self.length = 0
        self.changes = 0
        batch, heads = like.shape[:2]
        words = words_of(self.dim, spec.grid.bits)
        self.codes = torch.empty(batch, heads, 0, words, TILE, dtype=torch.int32, device=like.device)
        inner = (self.groups,) if self.in_blocks else (self.groups, TILE)
        sharing = 1 if shared_heads else heads
        params = torch.empty(batch, sharing, 0, *inner, dtype=spec.torch_scale_dtype, device=like.device)
        self.scale = params
        self.zero = params.clone() if len(spec.grid.fields) > 1 else None
        self.fixed: Affine | None = None
        if isinstance(grain, PerTensor):
            self.fixed = Affine(*(None if p is None else p[..., None] for p in _of_range(spec, range, like.device)))  # pyright: ignore[reportArgumentType]

    @property
    def in_blocks(self) -> bool:
        """Whether neighbouring tokens share ranges."""
        return self.rows > 1

    @property
    def block_tiles(self) -> int:
        """Tiles of a block."""
        return -(-self.rows // TILE)

    @property
    def slots(self) -> int:
        """Slots of all blocks or tokens; :attr:`counts` says which are empty."""
        return len(self.counts) * self.block_tiles * TILE if self.in_blocks else self.length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, spare room counted."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.zero) if tensor is not None)

    def append(self, x_BHND: Tensor) -> None:
        """Packs tokens, a whole number of blocks.

        Raises:
            ValueError: numbers without a scale that the format can store, such as NaN.
        """
        if self.fixed is not None:
            self._append_fixed(x_BHND.float(), self.fixed)
            return
        grain, grid = self.spec.granularity, self.spec.grid
        assert isinstance(grid, RangeGrid)
        batch, heads, count, _ = x_BHND.shape
        assert count % self.rows == 0
        if not count:
            return
        x_ND = _rows(x_BHND.float(), self.scale.shape[1] < heads)
        x_GK = grain.split(x_ND)
        params: Affine = self.spec.as_stored(TokenFit()(x_GK, grid), self.groups)  # pyright: ignore[reportAssignmentType]
        codes = _heads(grain.join(grid.encode(x_GK, params), tuple(x_ND.shape)), x_BHND.shape)
        self._write(to_words(codes, grid.bits), count)
        for name, values in params._asdict().items():
            if values is not None:
                self._write_params(name, values.view(batch, -1, count // self.rows, self.groups))
        if self.in_blocks:
            self.counts += [self.rows] * (count // self.rows)
        self.length += count

    def _append_fixed(self, x_BHND: Tensor, params: Affine) -> None:
        if not torch.isfinite(x_BHND).all():
            raise ValueError("keys or values are NaN or Inf, for which the cache's range has no codes")
        if count := x_BHND.shape[2]:
            self._write(to_words(self.spec.grid.encode(x_BHND, params), self.spec.grid.bits), count)
            self.length += count

    def _write(self, words_BHNW: Tensor, count: int) -> None:
        slots = torch.arange(count, device=words_BHNW.device)
        if self.in_blocks:
            slots = slots // self.rows * (self.block_tiles * TILE) + slots % self.rows
        slots = slots + self.slots
        self.codes = _with_room(self.codes, int(slots[-1]) // TILE + 1)
        self.codes[:, :, slots // TILE, :, slots % TILE] = words_BHNW.permute(2, 0, 1, 3)

    def _write_params(self, name: str, values_BHMG: Tensor) -> None:
        kept, count = getattr(self, name), values_BHMG.shape[2]
        values_BHMG = values_BHMG.to(kept.dtype)
        if self.in_blocks:
            start = len(self.counts)
            kept = _with_room(kept, start + count)
            kept[:, :, start : start + count] = values_BHMG
        else:
            slots = torch.arange(self.length, self.length + count, device=kept.device)
            kept = _with_room(kept, (self.length + count - 1) // TILE + 1)
            kept[:, :, slots // TILE, :, slots % TILE] = values_BHMG.permute(2, 0, 1, 3)
        setattr(self, name, kept)

    def reserve(self, count: int) -> None:
        """Makes room for ``count`` more tokens, a whole number of blocks."""
        blocks = len(self.counts) + count // self.rows if self.in_blocks else 0
        tiles = blocks * self.block_tiles if self.in_blocks else -(-(self.length + count) // TILE)
        self.codes = _with_room(self.codes, tiles)
        if self.fixed is not None:
            return
        params = blocks if self.in_blocks else tiles
        self.scale = _with_room(self.scale, params)
        self.zero = None if self.zero is None else _with_room(self.zero, params)

    def count(self, count: int) -> None:
        """Counts tokens that compiled code has packed."""
        self.counts += [self.rows] * (count // self.rows) if self.in_blocks else []
        self.length += count

    def decode(
        self, start: int = 0, end: int | None = None, tiles: Callable[[int, int], Tensor] | None = None
    ) -> Tensor:
        """The tokens from ``start`` to ``end``, float32 ``[B, H, N, D]``.

        Args:
            tiles: compiled code that decodes the tiles between two numbers, ``[B, H, slots, D]``; None: torch does.
        """
        slots = self._slots(start, self.length if end is None else end)
        first, last = int(slots[0]) // TILE, int(slots[-1]) // TILE + 1
        if tiles is not None:
            x = tiles(first, last)
            begin = int(slots[0]) - first * TILE
            whole = int(slots[-1]) - int(slots[0]) + 1 == len(slots)
            return x[:, :, begin : begin + len(slots)] if whole else x[:, :, slots - first * TILE]
        words = self.codes[:, :, first:last].transpose(-1, -2).flatten(2, 3)
        codes = from_words(words, self.spec.grid.bits, self.dim)
        params = self.fixed
        if params is None:
            zero = None if self.zero is None else self._spread(self.zero, first, last)
            params = Affine(self._spread(self.scale, first, last), zero)
        return self.spec.grid.decode(codes, params)[:, :, (slots - first * TILE).to(codes.device)]

    def _spread(self, params: Tensor, first: int, last: int) -> Tensor:
        """Parameters of every element of the tiles from ``first`` to ``last``, float32 ``[B, H or 1, slots, D]``."""
        if self.in_blocks:
            blocks = torch.arange(first, last, device=params.device) // self.block_tiles
            params = params[:, :, blocks].repeat_interleave(TILE, 2)
        else:
            params = params[:, :, first:last].transpose(-1, -2).flatten(2, 3)
        return params.float().repeat_interleave(self.width, -1)[..., : self.dim]

    def held(self, device: torch.device) -> Tensor:
        """Slots that hold tokens, in order."""
        return self._slots(0, self.length).to(device)

    def _slots(self, start: int, end: int) -> Tensor:
        """Slots of the tokens from ``start`` to ``end``."""
        if not self.in_blocks:
            return torch.arange(start, end)
        counts = torch.tensor(self.counts)
        before = counts.cumsum(0) - counts
        token = torch.arange(start, end)
        block = torch.searchsorted(before, token, right=True) - 1
        return block * (self.block_tiles * TILE) + token - before[block]

    def crop(self, count: int) -> None:
        """Drops the last ``count`` tokens."""
        self.changes += 1
        self.length -= count
        while self.in_blocks and count:
            taken = min(count, self.counts[-1])
            self.counts[-1] -= taken
            count -= taken
            if not self.counts[-1]:
                self.counts.pop()

    def to(self, device: torch.device) -> None:
        """Moves all buffers to ``device``."""
        self.codes, self.scale = self.codes.to(device), self.scale.to(device)
        self.zero = None if self.zero is None else self.zero.to(device)
        self.fixed = None if self.fixed is None else Affine(*(None if p is None else p.to(device) for p in self.fixed))  # pyright: ignore[reportArgumentType]

    def select(self, index: Tensor) -> None:
        """Keeps the sequences ``index``, in this order; one may come several times."""
        index = index.to(self.codes.device)
        self.codes, self.scale = self.codes.index_select(0, index), self.scale.index_select(0, index)
        self.zero = None if self.zero is None else self.zero.index_select(0, index)


def fake_tokens(
    x_BHND: Tensor, spec: Spec, range_H2: Tensor | None, *, shared_heads: bool, through_ranges: bool = True
) -> Tensor:
    """Tokens, a whole number of blocks, as :class:`PackedTokens` restores them, float32. Gradients pass the rounding straight
    through, and with ``through_ranges`` reach the values that set a range; what has no scale that the format can store becomes NaN."""
    x = x_BHND.float()
    if not isinstance(spec.granularity, PerTensor):
        return _heads(fake_quantize(_rows(x, shared_heads), spec, TokenFit(), through_fit=through_ranges), x.shape)
    x_HK = x.transpose(0, 1)
    rounded_HK = spec.grid.fake(x_HK.flatten(1), _of_range(spec, range_H2, x.device))  # pyright: ignore[reportAttributeAccessIssue]
    return rounded_HK.view(x_HK.shape).transpose(0, 1)


def _rows(x_BHND: Tensor, shared_heads: bool) -> Tensor:
    """Rows whose ranges are their own: a token of a head, ``[B * H * N, D]``, or of all heads, ``[B * N, H * D]``."""
    return x_BHND.transpose(1, 2).flatten(2).flatten(0, 1) if shared_heads else x_BHND.flatten(0, 2)


def _heads(rows: Tensor, shape: torch.Size) -> Tensor:
    """Tokens ``[B, H, N, D]`` of ``shape`` from :func:`_rows`."""
    batch, heads, count, dim = shape
    if rows.shape[1] == dim:
        return rows.view(shape)
    return rows.view(batch, count, heads, dim).transpose(1, 2)


def _of_range(spec: Spec, range_H2: Tensor | None, device: torch.device) -> Affine:
    """Parameters of each head, ``[H, 1]``, where one range serves all its tokens."""
    assert range_H2 is not None and isinstance(spec.grid, RangeGrid)
    lo_H1, hi_H1 = range_H2.to(device, torch.float32)[..., None].unbind(1)
    return spec.grid.from_range(lo_H1, hi_H1)


class TokenFit(MinMax):
    """Places the grid of packed tokens by their extremes; normal levels, which are of unit variance, by their root mean square."""

    def __call__(self, x_GK: Tensor, grid: RangeGrid, importance_GK: Tensor | None = None) -> Affine:
        if not isinstance(grid, Normal):
            return super().__call__(x_GK, grid)
        mean_G1 = x_GK.square().mean(1, keepdim=True)
        return Affine(torch.where(mean_G1 > 0, mean_G1, 1.0).sqrt())


def _with_room(buffer: Tensor, count: int) -> Tensor:
    """``buffer``, or a larger copy of it, with room for ``count`` entries along axis 2."""
    if count <= buffer.shape[2]:
        return buffer
    room = -(-(count + count // 64) // _STEP) * _STEP
    with torch.inference_mode(False):  # so that it can be written in any mode later
        larger = torch.zeros(*buffer.shape[:2], room, *buffer.shape[3:], dtype=buffer.dtype, device=buffer.device)
    larger[:, :, : buffer.shape[2]] = buffer
    return larger
