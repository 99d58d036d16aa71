"""Binary-coded grids: a weight is a sum of signed bases, ``w = sum_k +-alpha_k (+ offset)`` (LUT-GEMM, arXiv:2206.09557).

The format exists for products: a plane of signs needs additions only, or look-ups in a table of partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.numerics.grids.base import Bases, Field, rank_in_rows
from lowbit.numerics.serialize import serializable


@serializable
@dataclass(frozen=True)
class BinaryCoded:
    """Values with ``bits`` bases in each granule: bit k of a code adds ``+alpha_k`` where it is 1, ``-alpha_k`` where it is 0.

    Args:
        bits: 1 to 8.
        offset: each granule also stores a number that is added to all its values.
    """

    bits: int
    offset: bool = False
    kind: ClassVar[Any] = Bases

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"a binary-coded grid has 1 to 8 bits, found {self.bits}")

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field("alpha", width=self.bits), *((Field("offset"),) if self.offset else ()))

    def signs(self, codes: Tensor) -> Tensor:
        """``[..., bits]`` of -1 and 1, int8."""
        planes = [(codes >> k) & 1 for k in range(self.bits)]
        return torch.stack(planes, -1).to(torch.int8).mul_(2).sub_(1)

    def levels(self, params: Bases) -> Tensor:
        """Value of each code, ``[G, 2**bits]``."""
        every = torch.arange(2**self.bits, device=params.alpha.device)
        values = params.alpha @ self.signs(every).to(params.alpha.dtype).T
        return values if params.offset is None else values + params.offset

    def sorted_levels(self, params: Bases) -> tuple[Tensor, Tensor, Tensor]:
        """Levels ``[G, 2**bits]``, the code of each (uint8), and the midpoints between neighbours."""
        levels, codes = self.levels(params).sort(dim=1, stable=True)
        return levels, codes.to(torch.uint8), (levels[:, 1:] + levels[:, :-1]) / 2

    def encode(self, x_GK: Tensor, params: Bases) -> Tensor:
        levels, codes, midpoints = self.sorted_levels(params)
        return codes.gather(1, rank_in_rows(x_GK.to(levels.dtype), midpoints))

    def decode(self, codes_GK: Tensor, params: Bases) -> Tensor:
        return self.levels(params).gather(1, codes_GK.long())
