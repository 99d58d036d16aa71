"""Which code runs a packed linear: an ordered list of kernels, each with its reason not to.

A kernel is a name, a predicate that answers why it cannot run this layer, and a function. The first that can, runs; the
last, ``reference``, always can and is the specification of the others. The field's alternative, flags such as ``use_x``
and ``disable_y``, leaves the user guessing; here :func:`explain` prints every answer.

A kernel sees plain data (:class:`PackedLinear`), never a module. To add one: a file in this package that ends in
``register(Kernel(...))``, imported by ``__init__``; law: it agrees with the reference (tests/laws/test_kernels.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.kernels.activation import fake_quantize_activation
from lowbit.kernels.decode import decode_packed
from lowbit.numerics import Affine, SideTerm, Spec
from lowbit.numerics.serialize import nearest

ENVIRONMENT = "LOWBIT_KERNELS"


@dataclass(frozen=True)
class PackedLinear:
    """What a kernel may know of a layer.

    Args:
        spec, shape, tensors: the weight ``[O, I]`` in the canonical layout.
        act: how the input is quantized, or None.
        act_params: static parameters of ``act``, or None where they are fitted to each call's input.
        side_terms: terms added to the weight; they multiply the input as it comes, not its quantized form.
        tiles: the codes once more, as the compiled kernels read them; ``tensors`` then makes its codes when asked.
        threshold: input channels in which any token of a call reaches it multiply the decoded weight as they are, in
            floating point (see :mod:`lowbit.kernels.activation`); 0: none do.
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

    Where ``why_not(layer, rows)`` is None, ``rows`` the number of vectors in x, ``run(x, layer)`` gives
    ``Q_act(x) @ W.T + x @ (sum of side terms).T`` for x ``[..., I]``, in the dtype of x. A ``tiled`` kernel reads tiles, which a
    layer does not have while a run is still making it: the reference then stands in, even where the kernel is forced.
    So does the kernel that ``leaves_to`` names, for layers and numbers of rows that this one is not made for.
    """

    name: str
    why_not: Callable[[PackedLinear, int], str | None]
    run: Callable[[Tensor, PackedLinear], Tensor]
    tiled: bool = False
    leaves_to: str = ""


@dataclass(frozen=True)
class Reason:
    """One line of :func:`explain`: why ``kernel`` does not run, or None for the one that does."""

    kernel: str
    why_not: str | None


def reference(x: Tensor, layer: PackedLinear) -> Tensor:
    """Decodes the weight in float32, rounds it and the (de)quantized input to the dtype of x, and multiplies."""
    weight = decode_packed(layer.tensors, layer.spec, layer.shape)
    if layer.act is None:
        return F.linear(
            x, with_side_terms(weight, layer.side_terms).to(x.dtype)
        )  # one product instead of one for each term
    fake = fake_quantize_activation(x, layer.act, layer.act_params, layer.threshold).to(x.dtype)
    return add_side(F.linear(fake, weight.to(x.dtype)), x, layer)


def with_side_terms(weight_OI: Tensor, side_terms: tuple[SideTerm, ...]) -> Tensor:
    """``weight_OI`` plus the side terms, in float32 and in place."""
    for term in side_terms:
        weight_OI += term.dense((weight_OI.shape[0], weight_OI.shape[1]))
    return weight_OI


def add_side(y: Tensor, x: Tensor, layer: PackedLinear) -> Tensor:
    """``y`` ``[..., O]`` plus what the layer's side terms make of x ``[..., I]``: for kernels that leave them to this."""
    for term in layer.side_terms:
        y = y + term.apply(x, layer.shape[0])
    return y


_REFERENCE = Kernel("reference", lambda layer, rows: None, reference)
_KERNELS: list[Kernel] = []


def register(kernel: Kernel) -> None:
    """Adds a kernel before those registered earlier: the newest that can run, runs."""
    assert kernel.name not in names(), f"two kernels are called {kernel.name}"
    _KERNELS.insert(0, kernel)


def names() -> list[str]:
    """Names of the kernels in the order in which they are asked."""
    return [kernel.name for kernel in (*_KERNELS, _REFERENCE)]


def forced() -> str | None:
    """The kernel that the environment variable LOWBIT_KERNELS forces, if it does."""
    return os.environ.get(ENVIRONMENT) or None


def choose(layer: PackedLinear, rows: int) -> Kernel:
    """The kernel that runs ``layer`` for ``rows`` input vectors; the environment variable LOWBIT_KERNELS forces one.

    Raises:
        ValueError: LOWBIT_KERNELS names a kernel that does not exist, or that cannot run this layer.
    """
    name = forced()
    if name is None:
        return next(kernel for kernel in (*_KERNELS, _REFERENCE) if kernel.why_not(layer, rows) is None)
    if name not in names():
        raise ValueError(f"{ENVIRONMENT}={name!r} is no kernel{nearest(name, names())}; all: {', '.join(names())}")
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
    """Every kernel in the order asked, with why it does not run; ``why_not`` is None for exactly the chosen one."""
    chosen, given = choose(layer, rows).name, forced()
    reasons = []
    for kernel in (*_KERNELS, _REFERENCE):
        why_not = kernel.why_not(layer, rows)
        if kernel.name != chosen and why_not is None:
            why_not = f"{ENVIRONMENT}={given} is set" if given else f"{chosen} is asked first"
        reasons.append(Reason(kernel.name, why_not))
    return reasons


def run(x: Tensor, layer: PackedLinear) -> Tensor:
    """``Q_act(x) @ W.T + x @ (sum of side terms).T`` by the chosen kernel; x ``[..., I]``, ``[..., O]`` in the dtype of x."""
    return choose(layer, x.numel() // max(1, x.shape[-1])).run(x, layer)
