"""Orthogonal rotations that are stored as a seed and applied without building the whole matrix.

A dense rotation of n channels has n^2 numbers, as many as the weight that it serves. These have 64 bits. The seed
generates a Kronecker product of two small matrices, so a vector costs n (p + q) multiplications with p q = n. There are
two kinds, which both mix all channels:

* :class:`Kronecker`: two Haar matrices between two random orders (QuIP, arXiv:2307.13304).
* :class:`RandomHadamard`: random signs, then a Hadamard matrix, whose entries all have the same magnitude.

Not every n has a useful factorization, or a Hadamard matrix. Then the largest suitable m < n, which is over n / 2, is
applied twice: to the first m channels, then to the last m. The product is orthogonal, nothing is padded, and every
outlier spreads over at least m channels.

The generated matrices are part of the storage format. They come only from ``random.Random(seed).random()``, the one
sequence that Python promises never to change; torch makes no such promise. Its numbers give, in this order,

    k signs:               -1 where u < 1/2, else 1; the next k numbers
    an order of k:         the stable argsort of the next k numbers
    a k x k Haar matrix:   from the normals sqrt(-2 log(1 - u)) cos(2 pi v), u the next k^2 numbers, v the k^2 after those

Results are cached and never stored. A law test freezes them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from lowbit.transforms.matrices import haar, hadamard_core, paley, sylvester

_LARGEST_FACTOR = 512
"""Largest size of a Haar matrix; larger ones take noticeable time to generate (cubic) and to multiply."""
_LARGEST_CORE = 128
"""Largest size of the Hadamard matrix that doubling starts from."""


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
    """Applies ``parts`` in order to the channels from ``start`` to ``end``."""

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
    """A rotation with its matrices in memory: it can run repeatedly, and torch can trace it."""

    size: int
    rounds: tuple[_Round, ...]

    def forward(self, x: Tensor) -> Tensor:
        y = x.unflatten(-1, (-1, self.size))
        for step in self.rounds:
            y = step.forward(y)
        return y.flatten(-2)


class _Numbers:
    """The random sequence of a seed, and the parts drawn from it; see the module docstring."""

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
    """A rotation of each consecutive run of ``size`` channels.

    A layer rotates its input with one of these and its output with an inverted one.

    Args:
        seed: 0 to 2^63 - 1; the only number that is stored.
        size: channels in a run.
        inverted: apply the inverse.
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
        """Number of the n channels that one application mixes."""
        raise NotImplementedError

    @staticmethod
    def parts(numbers: _Numbers, width: int) -> tuple[_Part, ...]:
        """The parts that mix ``width`` channels, float64, drawn from the next numbers of the seed."""
        raise NotImplementedError

    def inverse(self) -> Self:
        """The transform that undoes this one."""
        return replace(self, inverted=not self.inverted)

    def made(self, dtype: torch.dtype, device: torch.device) -> Made:
        """This rotation with its matrices, for inputs of ``dtype`` on ``device``."""
        return Made(self.size, _rounds(type(self), self.seed, self.size, self.inverted, dtype, device))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # once; its products would convert every operand
        if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
            y = _Rotated.apply(x, self)
            assert isinstance(y, Tensor)
            return y
        return self.made(x.dtype, x.device).forward(x)

    def fold_in(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.forward(w_OI), b

    def fold_out(self, w_OI: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.forward(w_OI.T).T, None if b is None else self.forward(b)

    def dual(self) -> Self:
        return self

    def tile(self, copies: int) -> Self:
        return self


class _Rotated(torch.autograd.Function):
    """A rotation that keeps nothing for its backward pass, which is its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Seeded) -> Tensor:
        ctx.rotation = rotation
        y = rotation.made(x.dtype, x.device).forward(x)
        return y.data  # it is new and kept nowhere, so callers may change it in place, which torch forbids with views

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.rotation.inverse().forward(grads[0]), None


@dataclass(frozen=True)
class Kronecker(Seeded):
    """A random order, ``A (x) B`` with Haar A and B of about equal size, then another random order.

    QuIP's code deals the prime factors of n to A and B in turn, and usually draws a new A for each row of the other axis.
    That multiplies the numbers to generate by up to 2 sqrt(n) without a measurable gain.
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
    """Random signs, then a Hadamard matrix: of order n if doubling a small one gives n, else twice one of the largest power
    of two below n."""

    @staticmethod
    def width(n: int) -> int:
        core = hadamard_core(n)
        return n if core is not None and core <= _LARGEST_CORE else 2 ** (n.bit_length() - 1)

    @staticmethod
    def parts(numbers: _Numbers, width: int) -> tuple[_Part, ...]:
        core = hadamard_core(width)
        assert core is not None
        left, right = 1, width // core  # core (x) Sylvester, cut into two factors of the closest sizes
        while 2 * core * left <= right // 2:
            left, right = left * 2, right // 2
        parts = sorted((torch.kron(paley(core), sylvester(left)), sylvester(right)), key=len)
        return numbers.signs(width), _Mix(*parts)  # the larger factor is last: its products are one large product


def _small_factor(n: int) -> int:
    """The largest divisor of n that is at most its square root."""
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
