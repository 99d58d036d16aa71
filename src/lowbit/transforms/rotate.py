"""Orthogonal rotation: spreads outlier channels over all channels.

There are two constructors. `hadamard` is a Hadamard matrix with random row signs. All its entries have magnitude
1/sqrt(n), so it bounds the largest entry of a rotated outlier as tightly as an orthogonal matrix can. `random_orthogonal`
is Haar distributed. For sizes without a Hadamard matrix of Sylvester's or Paley's kind, `hadamard` is the Kronecker
product of the largest power of two with a random orthogonal matrix of the odd part. That matrix is orthogonal, mixes
every channel with every other, and needs no stored tables of large Hadamard matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.transforms.matrices import haar, hadamard_core, odd_part, paley, sylvester


@dataclass(frozen=True, eq=False)
class Rotate:
    """x @ q on each consecutive run of D channels, D the size of q; D == I is a dense rotation.

    Args:
        q: [D, D] orthogonal, the same for every run; or [R, D, D], one for each of the R = I / D runs. The laws hold for
            orthogonal matrices only, because the inverse is taken to be the transpose.
    """

    q: Tensor
    exact: ClassVar[bool] = True

    @staticmethod
    def hadamard(n: int, seed: int, *, block: int | None = None, dtype: torch.dtype = torch.float64) -> Rotate:
        """Randomized Hadamard over n channels, or over each run of `block` channels (for example one head)."""
        return Rotate(_hadamard_matrix(_run_length(n, block), seed).to(dtype))

    @staticmethod
    def random_orthogonal(n: int, seed: int, *, block: int | None = None, dtype: torch.dtype = torch.float64) -> Rotate:
        """Haar-distributed orthogonal matrix over n channels, or over each run of `block` channels."""
        return Rotate(_haar_matrix(_run_length(n, block), _generator(seed)).to(dtype))

    @property
    def size(self) -> int:
        """Channels in a run."""
        return self.q.shape[-1]

    def inverse(self) -> Rotate:
        """The rotation that undoes this one."""
        return Rotate(self.q.mT)

    def forward(self, x: Tensor) -> Tensor:
        runs, q = x.unflatten(-1, (-1, self.size)), self.q.to(x.dtype)
        if q.dim() == 2:
            return (runs @ q).flatten(-2)
        return torch.einsum("...rd,rde->...re", runs, q).flatten(-2)

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.forward(w_OI), b

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.forward(w_OI.T).T, None if b is None else self.forward(b)

    def dual(self) -> Rotate:
        return self

    def tile(self, copies: int) -> Rotate:
        return self if self.q.dim() == 2 else Rotate(self.q.repeat(copies, 1, 1))


def _run_length(n: int, block: int | None) -> int:
    if block is not None and n % block:
        raise ValueError(f"A rotation of {n} channels cannot be cut into runs of {block}; choose a divisor of {n}.")
    return n if block is None else block


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hadamard_matrix(n: int, seed: int) -> Tensor:
    """Random row signs times core (x) Sylvester, with the smallest core that the odd part of n allows."""
    generator = _generator(seed)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    order = hadamard_core(n)
    core = _haar_matrix(odd_part(n), generator) if order is None else paley(order)
    return signs[:, None] * torch.kron(core, sylvester(n // len(core)))


def _haar_matrix(n: int, generator: torch.Generator) -> Tensor:
    return haar(torch.randn(n, n, generator=generator, dtype=torch.float64))
