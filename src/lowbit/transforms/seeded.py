"""Orthogonal rotations that are stored as a seed, and applied without ever building the matrix.

A dense rotation of n channels is n^2 numbers, as many as the weight that it serves. These are 64 bits: what they apply is
generated from the seed, and is a Kronecker product of two small matrices, so that a vector costs n (p + q)
multiplications with p q = n. Two kinds, both mixing all channels:

* :class:`Kronecker`: two Haar matrices between two random orders (QuIP, arXiv:2307.13304).
* :class:`RandomHadamard`: random signs, then a Hadamard matrix, as flat as an orthogonal matrix can be.

Not every n has a useful factorization, or a Hadamard matrix. Then the widest m < n that has is applied twice, to the
first m channels and to the last m, m over n / 2: the product is orthogonal, nothing is padded, and an outlier anywhere is
spread over at least m channels.

What is generated is part of the storage format. It is drawn from ``random.Random(seed).random()`` alone, the one
sequence that Python promises never to change; torch promises nothing of the kind. From its numbers, in this order,

    k signs:               -1 where u < 1/2, else 1; the next k numbers
    an order of k:         the stable argsort of the next k numbers
    a k x k Haar matrix:   of the normals sqrt(-2 log(1 - u)) cos(2 pi v), u the next k^2 numbers, v the k^2 after those

Results are cached, never stored. A law test freezes them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from lowbit.transforms.matrices import haar, hadamard_core, paley, sylvester

_LARGEST_FACTOR = 512
"""Of a Haar matrix: beyond, its generation (cubic) and the product with it are felt."""
_LARGEST_CORE = 128
"""Of a Hadamard matrix that doubling starts from."""


class _Signs(NamedTuple):
    s_N: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s_N

    def inverse(self) -> _Signs:
        return self


class _Order(NamedTuple):
    index_N: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.index_N]

    def inverse(self) -> _Order:
        return _Order(self.index_N.argsort())


class _Mix(NamedTuple):
    """A (x) B: ``A X B^T`` on x reshaped row by row to X ``[P, Q]``."""

    a_PP: Tensor
    b_QQ: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x_PQ = x.unflatten(-1, (len(self.a_PP), len(self.b_QQ)))
        return (self.a_PP @ (x_PQ @ self.b_QQ.T)).flatten(-2)

    def inverse(self) -> _Mix:
        return _Mix(self.a_PP.T, self.b_QQ.T)


_Part = _Signs | _Order | _Mix


class _Round(NamedTuple):
    """``parts``, one after another, on the channels from ``start`` to ``end``."""

    start: int
    end: int
    parts: tuple[_Part, ...]

    def forward(self, x: Tensor) -> Tensor:
        y = x[..., self.start : self.end]
        for part in self.parts:
            y = part.forward(y)
        return y if y.shape == x.shape else torch.cat([x[..., : self.start], y, x[..., self.end :]], -1)

    def inverse(self) -> _Round:
        return self._replace(parts=tuple(part.inverse() for part in reversed(self.parts)))

    def to(self, dtype: torch.dtype, device: torch.device) -> _Round:
        def placed(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else t.dtype).contiguous()

        return self._replace(parts=tuple(part._make(map(placed, part)) for part in self.parts))


class Made(NamedTuple):
    """A rotation whose matrices exist: what is run again and again, and what torch can trace."""

    size: int
    rounds: tuple[_Round, ...]

    def forward(self, x: Tensor) -> Tensor:
        y = x.unflatten(-1, (-1, self.size))
        for step in self.rounds:
            y = step.forward(y)
        return y.flatten(-2)


class _Numbers:
    """The sequence of a seed, and what is made of it; see the module docstring."""

    def __init__(self, seed: int):
        self._next = random.Random(seed).random

    def uniform(self, count: int) -> Tensor:
        return torch.tensor([self._next() for _ in range(count)], dtype=torch.float64)

    def signs(self, count: int) -> _Signs:
        return _Signs(torch.where(self.uniform(count) < 0.5, -1.0, 1.0).double())

    def order(self, count: int) -> _Order:
        return _Order(self.uniform(count).argsort(stable=True))

    def haar(self, k: int) -> Tensor:
        radius = (-2 * (1 - self.uniform(k * k)).log()).sqrt()
        return haar((radius * (2 * math.pi * self.uniform(k * k)).cos()).view(k, k))


@dataclass(frozen=True)
class Seeded:
    """A rotation of each consecutive run of ``size`` channels; ``inverted``: its inverse.

    seed: 0 to 2^63 - 1, all that is stored. A layer's input is rotated by one of these, its output by an inverted one.
    """

    seed: int
    size: int
    inverted: bool = False
    exact: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.seed < 2**63 or self.size < 1:
            raise ValueError(f"a seed is 0 to 2^63 - 1 and a size at least 1, found {self.seed} and {self.size}")

    @staticmethod
    def width(n: int) -> int:
        """How many of n channels are mixed at once."""
        raise NotImplementedError

    @staticmethod
    def parts(numbers: _Numbers, width: int) -> tuple[_Part, ...]:
        """What mixes ``width`` channels, float64, from the next numbers of the seed."""
        raise NotImplementedError

    def inverse(self) -> Self:
        """The transform that undoes this one."""
        return replace(self, inverted=not self.inverted)

    def made(self, dtype: torch.dtype, device: torch.device) -> Made:
        """This rotation with its matrices, for inputs of ``dtype`` on ``device``."""
        return Made(self.size, _rounds(type(self), self.seed, self.size, self.inverted, dtype, device))

    def forward(self, x: Tensor) -> Tensor:
        return self.made(x.dtype, x.device).forward(x)

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.forward(w_OI), b

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.forward(w_OI.T).T, None if b is None else self.forward(b)

    def dual(self) -> Self:
        return self

    def tile(self, copies: int) -> Self:
        return self


@dataclass(frozen=True)
class Kronecker(Seeded):
    """A random order, ``A (x) B`` with Haar A and B of about equal size, another random order.

    QuIP's code deals the prime factors of n to A and B in turn, and in its usual mode draws a new A for each row of the
    other axis, which multiplies what has to be generated by up to 2 sqrt(n) and gains nothing that can be measured.
    """

    @staticmethod
    def width(n: int) -> int:
        return next(m for m in range(n, 0, -1) if m // _small_factor(m) <= _LARGEST_FACTOR)

    @staticmethod
    def parts(numbers: _Numbers, width: int) -> tuple[_Part, ...]:
        p = _small_factor(width)
        enter, a, b = numbers.order(width), numbers.haar(p), numbers.haar(width // p)
        return enter, _Mix(a, b), numbers.order(width)


@dataclass(frozen=True)
class RandomHadamard(Seeded):
    """Random signs, then a Hadamard matrix: of order n where doubling reaches n from a small one, else of the largest
    power of two below n, twice."""

    @staticmethod
    def width(n: int) -> int:
        core = hadamard_core(n)
        return n if core is not None and core <= _LARGEST_CORE else 2 ** (n.bit_length() - 1)

    @staticmethod
    def parts(numbers: _Numbers, width: int) -> tuple[_Part, ...]:
        core = hadamard_core(width)
        assert core is not None
        left, right = 1, width // core  # core (x) Sylvester, cut in two where the sizes come closest
        while 2 * core * left <= right // 2:
            left, right = left * 2, right // 2
        parts = sorted((torch.kron(paley(core), sylvester(left)), sylvester(right)), key=len)
        return numbers.signs(width), _Mix(*parts)  # products with the last factor are one large one: it is the larger


def _small_factor(n: int) -> int:
    """The largest divisor of n that is not over its root."""
    return next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)


@lru_cache(maxsize=4096)  # a large model has some thousand rotations, of 20 to 200 KiB each
def _rounds(
    kind: type[Seeded], seed: int, size: int, inverted: bool, dtype: torch.dtype, device: torch.device
) -> tuple[_Round, ...]:
    numbers, width = _Numbers(seed), kind.width(size)
    with torch.inference_mode(False), torch.no_grad():
        starts = [0] if width == size else [0, size - width]
        rounds = [_Round(start, start + width, kind.parts(numbers, width)) for start in starts]
        if inverted:
            rounds = [step.inverse() for step in reversed(rounds)]
        return tuple(step.to(dtype, device) for step in rounds)
