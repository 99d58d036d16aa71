"""Tune: gradients on what the whole packed model stores in floating point, with its codes frozen.

After every block has been solved by itself, what is left to choose costs no bit: scales, table values, binary bases, kept
weights and the gains of norms are stored as numbers anyway. They are moved so that the model's own next-token
distribution comes closest to the original's on the calibration windows. Codes are never touched, so what is trained is
the packed model itself and not a stand-in for it.

Scope: the whole model in memory, once, with its gradients for these few numbers; weights are decoded anew in the
backward pass and not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lowbit.layouts import pack_qtensor
from lowbit.modules import QuantLinear, restore
from lowbit.numerics import QTensor, serializable
from lowbit.steps.precision import faster_products
from lowbit.steps.simulate import fake_activation


@dataclass
class ModelState:
    """A quantized model as steps of model scope see it.

    Attributes:
        model: a transformers causal language model in float32 whose linears are packed; changed in place.
        ids: ``[N, T]``, the calibration windows.
        original: logits ``[T, V]`` of the original model for window i.
    """

    model: nn.Module
    ids: Tensor
    original: Callable[[int], Tensor]
    seed: int = 0
    tick: Callable[[str], None] = lambda what: None
    notes: list[str] = field(default_factory=list)


@serializable
@dataclass(frozen=True)
class Tune:
    """AdamW on all floating parameters of packed linears and on norm gains, against the original's distribution.

    The loss is the KL divergence from the original's next-token distribution, averaged over tokens. Every number moves
    in units of its granule's largest magnitude, so one learning rate ``lr`` (relative; falls by a cosine to zero) serves
    scales, tables and gains alike. ``batch``: windows a step. ``amp``: products in bfloat16 where
    the processor has instructions for it.

    Layers whose statistics are themselves quantized keep them: a step would be lost in their second rounding.
    """

    epochs: int = 4
    lr: float = 2e-3
    batch: int = 2
    amp: bool = False

    def __post_init__(self):
        if self.epochs < 1 or self.batch < 1 or self.lr <= 0:
            raise ValueError(f"tuning needs epochs and batch of at least 1 and a positive lr, found {self}")

    def model_ticks(self, windows: int) -> int:
        return self.epochs * windows

    def run_model(self, state: ModelState) -> None:
        model = state.model.requires_grad_(False)
        restore(model)  # what is tuned is the stored form
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        fixed = sum(layer.spec.stats is not None for layer in layers)
        if fixed:
            state.notes.append(f"{fixed} layers keep their quantized statistics: they are not tuned")
        tuned = [_Tuned(layer) for layer in layers if layer.spec.stats is None]
        gains = {name: _Relative(p.detach()) for name, p in model.named_parameters() if p.dim() == 1}
        deltas = [part.delta for each in tuned for part in each.parts.values()] + [g.delta for g in gains.values()]
        optimizer = torch.optim.AdamW(deltas, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.0)
        batches = -(-len(state.ids) // self.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.epochs * batches, pct_start=0.1
        )
        order = torch.Generator().manual_seed(state.seed)
        with ExitStack() as stack:
            for each in tuned:
                stack.enter_context(each)
            for epoch in range(1, self.epochs + 1):
                for pick in torch.randperm(len(state.ids), generator=order).split(self.batch):
                    optimizer.zero_grad()
                    loss = self._loss(state, pick.tolist(), gains)
                    if not torch.isfinite(loss):
                        raise ValueError("tuning met a loss that is NaN or Inf; use a smaller lr or leave it out")
                    loss.backward()
                    for _ in pick:
                        state.tick(f"tuning, epoch {epoch} of {self.epochs}, KL {loss.item():.3f}")
                    optimizer.step()
                    schedule.step()
        with torch.no_grad():
            for each in tuned:
                each.commit()
            for name, gain in gains.items():
                model.get_parameter(name).copy_(gain.value())

    def _loss(self, state: ModelState, windows: list[int], gains: dict[str, _Relative]) -> Tensor:
        ids_BT = state.ids[windows]
        values = {name: gain.value() for name, gain in gains.items()}
        with faster_products(ids_BT.device, self.amp):
            output = functional_call(state.model, values, kwargs={"input_ids": ids_BT, "use_cache": False})
        loss = torch.zeros(())
        for i, logits_TV in zip(windows, output.logits, strict=True):
            with torch.no_grad():
                target = state.original(i).float().log_softmax(-1)
            found = logits_TV.float().log_softmax(-1)
            loss = loss + F.kl_div(found, target, log_target=True, reduction="batchmean") / len(windows)
        return loss


class _Relative:
    """A tensor ``[G, width]`` (or a vector) that moves in units of the largest magnitude of each row (of itself)."""

    def __init__(self, start: Tensor):
        self.start = start.float()
        flat = self.start if start.dim() == 2 else self.start[:, None]
        self.unit = flat.abs().amax(1, keepdim=True).view(-1, *[1] * (start.dim() - 1))
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def value(self) -> Tensor:
        return self.start + self.unit * self.delta


class _Product(torch.autograd.Function):
    """``h W^T`` of a weight ``W = dense(*parts)`` that is decoded anew in the backward pass instead of kept."""

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


class _Tuned:
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

    def __enter__(self) -> _Tuned:
        self.layer.product = self.product
        return self

    def __exit__(self, *_) -> None:
        del self.layer.__dict__["product"]

    def product(self, x: Tensor) -> Tensor:
        h = fake_activation(x, self.layer.act, self.layer.act_params)
        y = _Product.apply(h, self._dense, *(part.value() for part in self.parts.values()))
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
