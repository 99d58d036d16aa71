"""Packed linears that compute with leaves of the graph while training is open, and the model that they are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.layouts import pack_qtensor
from lowbit.modules import QuantLinear, fake_activation
from lowbit.numerics import QTensor
from lowbit.training.relative import Relative
from lowbit.training.trainable import Group


class DecodedProduct(torch.autograd.Function):
    """``h W^T`` for a weight ``W = dense(*parts)`` that the backward pass decodes again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, dense: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        device = h.device.type
        h = h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h
        ctx.dense = dense
        ctx.save_for_backward(h, *parts)
        return F.linear(h, dense(*parts).to(h.dtype))  # as the reference kernel multiplies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        h, *parts = ctx.saved_tensors
        if not parts:  # codes alone
            return g @ ctx.dense().to(g.dtype), None
        leaves = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            w_OI = ctx.dense(*leaves)
        of_weight = g.flatten(0, -2).T @ h.flatten(0, -2)
        return g @ w_OI.detach().to(g.dtype), None, *torch.autograd.grad(w_OI, leaves, of_weight.to(w_OI.dtype))


class TrainedLinear:
    """While open, a packed linear multiplies by :meth:`weight` of :meth:`values`, which gradients reach.

    Law: it computes bit for bit what the reference kernel computes with what :meth:`commit` stores.
    """

    def __init__(self, layer: QuantLinear):
        self.layer = layer

    def values(self) -> list[Tensor]:
        """What the weight is made of: leaves, or functions of them."""
        raise NotImplementedError

    def weight(self, *values: Tensor) -> Tensor:
        """The weight ``[O, I]`` as the layer restores it, without its side terms."""
        raise NotImplementedError

    def quantized(self) -> QTensor:
        """Codes and parameters to store."""
        raise NotImplementedError

    def read(self, x: Tensor) -> Tensor:
        """The input ``[..., I]`` as the weight reads it."""
        return fake_activation(x, self.layer.act, self.layer.act_params)

    def __enter__(self) -> TrainedLinear:
        self.layer.product = self.product
        return self

    def __exit__(self, *_: object) -> None:
        del self.layer.__dict__["product"]

    def product(self, x: Tensor) -> Tensor:
        """As :meth:`QuantLinear.product`."""
        y = DecodedProduct.apply(self.read(x), self._multiplied, *self.values())
        assert isinstance(y, Tensor)
        if self.layer.act is not None:
            for term in self.layer.side_terms:
                y = y + term.apply(x, self.layer.shape[0])
        return y

    def _multiplied(self, *values: Tensor) -> Tensor:
        """The weight with side terms where the input is not quantized: one product serves all, as in the reference."""
        weight = self.weight(*values)
        if self.layer.act is None:
            for term in self.layer.side_terms:
                weight = weight + term.dense(self.layer.shape)
        return weight

    @torch.no_grad()
    def commit(self) -> None:
        for name, tensor in pack_qtensor(self.quantized()).items():
            self.layer.get_buffer(name).copy_(tensor)


class TrainedModel:
    """The trained parameters of one model: those of ``linears``, and ``gains``, vectors of the model by name. See
    ``Parameters``."""

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[TrainedLinear],
        gains: Mapping[str, Relative],
        groups: list[Group],
        notes: list[str],
    ):
        self.model, self.linears, self.gains, self.groups, self.notes = model, linears, gains, groups, notes
        self._open = ExitStack()

    def __enter__(self) -> TrainedModel:
        for each in self.linears:
            self._open.enter_context(each)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def replaced(self) -> dict[str, Tensor]:
        return {name: gain.value() for name, gain in self.gains.items()}

    @torch.no_grad()
    def commit(self) -> None:
        for each in self.linears:
            each.commit()
        for name, gain in self.gains.items():
            module, _, leaf = name.rpartition(".")
            getattr(self.model.get_submodule(module), leaf).copy_(gain.value())
