"""The choice of a kernel for a packed linear: an ordered list of kernels, each with its reason not to run.

A kernel is a name, a predicate that returns the reason why it cannot run a layer, and a function. The first kernel without
a reason runs. The last, ``reference``, always can and is the specification of the others. Flags such as ``use_x`` and
``disable_y``, the usual alternative, leave users guessing; :func:`explain` shows every reason.

A kernel sees plain data (:class:`PackedLinear`), never a module. To add one, end a file of this package in
``register(Kernel(...))`` and import it in ``__init__``. Law: it agrees with the reference (tests/laws/test_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.compiled import ENVIRONMENT, forced
from lowbit.kernels.activation import fake_quantize_activation
from lowbit.kernels.decode import decode_packed
from lowbit.numerics import Affine, PerChannel, PerGroup, SideTerm, Spec
from lowbit.numerics.serialize import nearest


@dataclass(frozen=True)
class PackedLinear:
    """The data of a layer that kernels see.

    Args:
        spec, shape, tensors: the weight ``[O, I]`` in the canonical layout.
        act: format of the input; None: not quantized.
        act_params: static parameters of ``act``; None: fitted to the input of each call.
        side_terms: terms added to the weight; they multiply the unquantized input.
        tiles: the codes as the compiled kernels read them; ``tensors`` then makes its codes on request.
        threshold: input channels that reach it in any token of a call are multiplied in floating point (see
            :mod:`lowbit.kernels.activation`); 0: none.
    """

    spec: Spec
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    act: Spec | None = None
    act_params: Affine | None = None
    side_terms: tuple[SideTerm, ...] = ()
    tiles: Tensor | None = None
    threshold: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.tensors["codes"].device if self.tiles is None else self.tiles.device


@dataclass(frozen=True)
class Kernel:
    """A name, a predicate and a function.

    Args:
        name: unique.
        why_not: ``why_not(layer, rows)`` is the reason why the kernel cannot run ``rows`` input vectors; None if it can.
        run: ``run(x, layer)`` is ``Q_act(x) @ W.T + x @ (sum of side terms).T`` for x ``[..., I]``, in the dtype of x.
        tiled: it reads tiles. A layer has none while a run still makes it; the reference runs instead, also if this kernel
            is forced.
        leaves_to: the kernel that runs instead if this one is forced and cannot run.
    """

    name: str
    why_not: Callable[[PackedLinear, int], str | None]
    run: Callable[[Tensor, PackedLinear], Tensor]
    tiled: bool = False
    leaves_to: str = ""


@dataclass(frozen=True)
class Reason:
    """One line of :func:`explain`: the reason why ``kernel`` does not run; None for the one that runs."""

    kernel: str
    why_not: str | None


def reference_weight(layer: PackedLinear) -> Tensor:
    """The weight ``[O, I]`` that :func:`reference` multiplies, float32: with side terms where the input is not quantized, so
    that one product serves all."""
    weight = decode_packed(layer.tensors, layer.spec, layer.shape)
    return with_side_terms(weight, layer.side_terms) if layer.act is None else weight


def reference(x: Tensor, layer: PackedLinear, weight: Tensor | None = None) -> Tensor:
    """Decodes the weight in float32, rounds it and the quantized and decoded input to the dtype of x, and multiplies.

    ``weight``: the layer's :func:`reference_weight`, where the caller kept it.
    """
    if layer.act is None:
        return _product(x, layer, weight)
    fake = fake_quantize_activation(x, layer.act, layer.act_params, layer.threshold).to(x.dtype)
    return add_side(_product(fake, layer, weight), x, layer)


def _product(x: Tensor, layer: PackedLinear, weight: Tensor | None) -> Tensor:
    if weight is None and torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        y = _DecodedTwice.apply(x, layer)
        assert isinstance(y, Tensor)
        return y
    return _by_parts(x, layer, weight)


_VOCABULARY = 30_000
"""Rows from which on a weight is a vocabulary's. Decoded whole, it would outweigh everything else."""
_PART = 1 << 22
"""Weights of a vocabulary that are decoded at once."""


def _parts(layer: PackedLinear, weight: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight, and what :func:`reference_weight` has there: all at once, but those of a vocabulary in parts.

    ``weight``: the whole :func:`reference_weight`, where the caller kept it.
    """
    rows, columns = layer.shape
    step = rows if rows < _VOCABULARY else max(1, _PART // columns)
    by_row = isinstance(layer.spec.granularity, PerChannel | PerGroup) and layer.spec.stats is None
    if weight is None and (step == rows or not by_row or layer.side_terms):
        weight = reference_weight(layer)
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        if weight is not None:
            yield some, weight[some]
        else:
            tensors = {name: tensor[some] for name, tensor in layer.tensors.items()}
            part = replace(layer, tensors=tensors, shape=(some.stop - first, columns), tiles=None)
            yield some, reference_weight(part)


def _by_parts(x: Tensor, layer: PackedLinear, weight: Tensor | None = None) -> Tensor:
    parts = [F.linear(x, part.to(x.dtype)) for _, part in _parts(layer, weight)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _DecodedTwice(torch.autograd.Function):
    """The product with a frozen weight that is decoded again in the backward pass, instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return _by_parts(x, layer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (g,) = grads
        total = None
        for rows, weight in _parts(ctx.layer):
            some = g[..., rows] @ weight.to(g.dtype)
            total = some if total is None else total.float() + some
        assert total is not None
        return total.to(g.dtype), None


def with_side_terms(weight_OI: Tensor, side_terms: tuple[SideTerm, ...]) -> Tensor:
    """``weight_OI`` plus the side terms, in float32 and in place."""
    for term in side_terms:
        weight_OI += term.dense((weight_OI.shape[0], weight_OI.shape[1]))
    return weight_OI


def add_side(y: Tensor, x: Tensor, layer: PackedLinear) -> Tensor:
    """``y`` ``[..., O]`` plus the products of x ``[..., I]`` with the layer's side terms, for kernels that do not add them."""
    for term in layer.side_terms:
        y = y + term.apply(x, layer.shape[0])
    return y


_REFERENCE = Kernel("reference", lambda layer, rows: None, reference)
_KERNELS: list[Kernel] = []


def register(kernel: Kernel) -> None:
    """Adds a kernel before all registered earlier: the newest that can run, runs."""
    assert kernel.name not in names(), f"two kernels are called {kernel.name}"
    _KERNELS.insert(0, kernel)


def names() -> list[str]:
    """Names of the kernels in the order in which they are asked."""
    return [kernel.name for kernel in (*_KERNELS, _REFERENCE)]


def choose(layer: PackedLinear, rows: int) -> Kernel:
    """The kernel that runs ``layer`` for ``rows`` input vectors; the environment variable LOWBIT_KERNELS can force one.

    Raises:
        ValueError: LOWBIT_KERNELS names a kernel that does not exist, or that cannot run this layer.
    """
    name = forced()
    if name is None:
        return next(kernel for kernel in (*_KERNELS, _REFERENCE) if kernel.why_not(layer, rows) is None)
    if name not in names():
        raise ValueError(f"{ENVIRONMENT}={name!r} is not a kernel{nearest(name, names())}")
    kernel = _called(name)
    if kernel.tiled and layer.tiles is None:
        return _REFERENCE
    reason = kernel.why_not(layer, rows)
    if reason is not None and kernel.leaves_to:
        kernel = _called(kernel.leaves_to)
        reason = kernel.why_not(layer, rows)
    if reason is not None:
        raise ValueError(f"{ENVIRONMENT}={name!r} cannot run this layer: {reason}; unset it or use 'reference'")
    return kernel


def _called(name: str) -> Kernel:
    return next(kernel for kernel in (*_KERNELS, _REFERENCE) if kernel.name == name)


def explain(layer: PackedLinear, rows: int) -> list[Reason]:
    """Every kernel in the order asked, with the reason why it does not run; None for the chosen one only."""
    chosen, given = choose(layer, rows).name, forced()
    reasons = []
    for kernel in (*_KERNELS, _REFERENCE):
        why_not = kernel.why_not(layer, rows)
        if kernel.name != chosen and why_not is None:
            why_not = f"{ENVIRONMENT}={given} is set" if given else f"{chosen} is asked first"
        reasons.append(Reason(kernel.name, why_not))
    return reasons


def run(x: Tensor, layer: PackedLinear) -> Tensor:
    """``Q_act(x) @ W.T + x @ (sum of side terms).T`` by the chosen kernel, ``[..., O]`` in the dtype of x ``[..., I]``."""
    return choose(layer, x.numel() // max(1, x.shape[-1])).run(x, layer)
