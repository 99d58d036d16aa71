"""Codebooks: every granule has its own table of freely placed values (k-means of SqueezeLLM, arXiv:2306.07629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.numerics.grids.base import Field, Lut, rank_in_rows
from lowbit.numerics.serialize import serializable


@serializable
@dataclass(frozen=True)
class Codebook:
    """``2**bits`` values for each granule; a code is the rank of a value. A fit such as ``KMeans`` places them."""

    bits: int
    kind: ClassVar[Any] = Lut

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"a codebook has 1 to 8 bits, found {self.bits}")

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field("values", width=2**self.bits),)

    def sorted_levels(self, params: Lut) -> tuple[Tensor, Tensor, Tensor]:
        """Levels ``[G, 2**bits]``, the code of each (uint8), and the midpoints between neighbours."""
        values = params.values
        codes = torch.arange(2**self.bits, dtype=torch.uint8, device=values.device).expand_as(values)
        return values, codes, (values[:, 1:] + values[:, :-1]) / 2

    def encode(self, x_GK: Tensor, params: Lut) -> Tensor:
        """Rank of the nearest value; a tie goes to the lower. Values must rise; rounding to storage keeps them rising."""
        values, _, midpoints = self.sorted_levels(params)
        return rank_in_rows(x_GK.to(values.dtype), midpoints).to(torch.uint8)

    def decode(self, codes_GK: Tensor, params: Lut) -> Tensor:
        return params.values.gather(1, codes_GK.long())
