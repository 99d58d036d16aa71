"""StoredFloats: trains what a packed model stores in floating point; its codes stay frozen.

Scales, table values, binary bases, kept weights and the gains of norms are stored as numbers anyway, so training them
costs no bit. Codes never change, so the packed model itself is trained, not a stand-in.

The whole model is in memory once, with gradients for these few numbers. Weights are decoded again in the backward pass,
not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.layouts import pack_qtensor
from lowbit.modules import QuantLinear, fake_activation, restore
from lowbit.numerics import QTensor, serializable


@serializable
@dataclass(frozen=True)
class StoredFloats:
    """All floating parameters of packed linears, and the gains and biases of norms.

    Every number moves in units of its granule's largest magnitude, so one relative learning rate serves scales, tables
    and gains. Layers with quantized statistics keep them: their second rounding would swallow the steps.
    """

    @property
    def needs_packed(self) -> bool:
        return True

    def parameters(self, model: nn.Module) -> _StoredFloats:
        return _StoredFloats(model)


class _StoredFloats:
    """The trained parameters of one model."""

    def __init__(self, model: nn.Module):
        restore(model)  # the stored form is trained
        self.model = model
        layers = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.is_tied]
        fixed = sum(layer.spec.stats is not None for layer in layers)
        self.notes = [f"{fixed} layers keep their quantized statistics: they are not tuned"] if fixed else []
        self.linears = [_Linear(layer) for layer in layers if layer.spec.stats is None]
        self.gains = {name: _Relative(p.detach()) for name, p in model.named_parameters() if p.dim() == 1}
        self.leaves = [part.delta for each in self.linears for part in each.parts.values()]
        self.leaves += [gain.delta for gain in self.gains.values()]
        self._open = ExitStack()

    def __enter__(self) -> _StoredFloats:
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
            self.model.get_parameter(name).copy_(gain.value())


class _Relative:
    """A tensor ``[G, width]`` in units of each row's largest magnitude, or a vector in units of its own magnitudes."""

    def __init__(self, start: Tensor):
        self.start = start.float()
        flat = self.start if start.dim() == 2 else self.start[:, None]
        self.unit = flat.abs().amax(1, keepdim=True).view(-1, *[1] * (start.dim() - 1))
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def value(self) -> Tensor:
        return self.start + self.unit * self.delta


class DecodedProduct(torch.autograd.Function):
    """``h W^T`` for a weight ``W = dense(*parts)`` that the backward pass decodes again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, dense: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        device = h.device.type
        h = h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h
        ctx.dense = dense
        ctx.save_for_backward(h, *parts)
        return h @ dense(*parts).to(h.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        h, *parts = ctx.saved_tensors
        leaves = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            w_OI = ctx.dense(*leaves)
        of_weight = g.flatten(0, -2).T @ h.flatten(0, -2)
        return g @ w_OI.detach().to(g.dtype), None, *torch.autograd.grad(w_OI, leaves, of_weight.to(w_OI.dtype))


class _Linear:
    """While open, a packed linear computes with its floating parameters as leaves of the graph."""

    def __init__(self, layer: QuantLinear):
        self.layer, q = layer, layer.qtensor()
        self.codes = q.codes
        fixed = {field.name for field in layer.spec.grid.fields if field.bits is not None}
        self.fixed = {name: value for name, value in q.params._asdict().items() if name in fixed}
        self.parts = {
            name: _Relative(value)
            for name, value in q.params._asdict().items()
            if name not in fixed and value is not None
        }

    def __enter__(self) -> _Linear:
        self.layer.product = self.product
        return self

    def __exit__(self, *_) -> None:
        del self.layer.__dict__["product"]

    def product(self, x: Tensor) -> Tensor:
        h = fake_activation(x, self.layer.act, self.layer.act_params)
        y = DecodedProduct.apply(h, self._dense, *(part.value() for part in self.parts.values()))
        assert isinstance(y, Tensor)
        for term in self.layer.side_terms:
            y = y + term.apply(x, self.layer.shape[0])
        return y

    def _dense(self, *parts: Tensor) -> Tensor:
        spec = self.layer.spec
        params = spec.grid.kind(**self.fixed, **dict(zip(self.parts, parts, strict=True)))
        codes_GK = spec.granularity.split(self.codes)
        return spec.granularity.join(spec.grid.decode(codes_GK, params), self.layer.shape)

    @torch.no_grad()
    def commit(self) -> None:
        values = {name: part.value() for name, part in self.parts.items()}
        raw = self.layer.spec.grid.kind(**self.fixed, **values)
        for name, tensor in pack_qtensor(QTensor.fitted(self.codes, raw, self.layer.spec)).items():
            self.layer.get_buffer(name).copy_(tensor)
