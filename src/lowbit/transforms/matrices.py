"""Orthogonal matrices for rotations, float64."""

from __future__ import annotations

import torch
from torch import Tensor


def haar(gaussian_NN: Tensor) -> Tensor:
    """Q of the QR decomposition of a Gaussian matrix, times the signs of R's diagonal; this Q is Haar distributed."""
    q, r = torch.linalg.qr(gaussian_NN)
    return (q * r.diagonal().sign()).contiguous()


def sylvester(n: int) -> Tensor:
    """Orthonormal Hadamard matrix of order n = 2^k by doubling."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return h / n**0.5


def odd_part(n: int) -> int:
    while n % 2 == 0:
        n //= 2
    return n


def hadamard_core(n: int) -> int | None:
    """The smallest order from which doubling gives a Hadamard matrix of order n; None if Paley's first construction has none.

    It is 1, or the odd part of n doubled until it is p + 1 for a prime p with p % 4 == 3.
    """
    order = odd_part(n)
    while order <= n:
        p = order - 1
        if order == 1 or (p % 4 == 3 and all(p % d for d in range(2, int(p**0.5) + 1))):
            return order
        order *= 2
    return None


def paley(order: int) -> Tensor:
    """Orthonormal Hadamard matrix of order 1, or of order p + 1 for a prime p with p % 4 == 3.

    It is I + S, with S the bordered matrix of quadratic residues.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    p = order - 1
    residue = torch.full((p,), -1.0, dtype=torch.float64)
    residue[torch.arange(1, p).square() % p] = 1.0
    residue[0] = 0.0
    index = torch.arange(p)
    s = torch.zeros(order, order, dtype=torch.float64)
    s[0, 1:], s[1:, 0] = 1.0, -1.0
    s[1:, 1:] = residue[(index[:, None] - index) % p]
    return (s + torch.eye(order, dtype=torch.float64)) / order**0.5
