"""Training of terms that packed linears add to their frozen codes: low-rank ones (QLoRA), kept columns (OWQ's weak-column tuning).

The packed weight is decoded again in the backward pass, not kept, and no gradient of the size of a weight is ever formed: a
step costs what the base costs, and the memory of a few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import kernels
from lowbit.modules import QuantLinear, restore
from lowbit.numerics import KeptColumns, LowRank, SideTerm, serializable, straight_through
from lowbit.training.trainable import Group, Start, Trainable
from lowbit.training.trained_linear import DecodedProduct, TrainedLinear, TrainedModel

_Scales = Mapping[type, Mapping[str, float]]
"""Of each kind of term that is trained, the tensors that move, and what multiplies each of them."""


class _SideTerms(Trainable):
    """What the choices of this module have in common. All tensors move as float32 and are rounded to float16, in which they are
    stored, in every forward; gradients pass the rounding."""

    dropout: float = 0.0

    @property
    def scales(self) -> _Scales:
        raise NotImplementedError

    def parameters(self, model: nn.Module, start: Start) -> TrainedModel:
        restore(model)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.is_tied]
        linears = [each for layer in layers if (each := _Linear(layer, self.scales, self.dropout)).leaves]
        return TrainedModel(model, linears, {}, [Group([leaf for each in linears for leaf in each.leaves])], [])


@serializable
@dataclass(frozen=True)
class LowRankTerms(_SideTerms):
    """The low-rank terms of all packed linears; everything else stays (QLoRA, arXiv:2305.14314, section 3).

    The layer adds ``b a`` to its weight. What moves is ``a`` and ``b / scale``, so that ``scale`` is peft's ``lora_alpha / r``.

    Args:
        scale: size of the steps of b beside those of a.
        dropout: share of the input channels that the terms do not see in a training step (LoRA's dropout).
    """

    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self):
        if self.scale <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"scale is positive and dropout a share from 0 to below 1, found {self}")

    @property
    def needs_adapters(self) -> bool:
        return True

    @property
    def scales(self) -> _Scales:
        return {LowRank: {"a": 1.0, "b": self.scale}}


@serializable
@dataclass(frozen=True)
class KeptColumnValues(_SideTerms):
    """The columns of weights that packed linears keep in float16; everything else stays (weak-column tuning of OWQ,
    arXiv:2306.02272, section 3.3)."""

    @property
    def scales(self) -> _Scales:
        return {KeptColumns: {"value": 1.0}}


class _Linear(TrainedLinear):
    """A packed linear with leaves for tensors of its side terms, as ``scales`` says.

    Attributes:
        places: of each leaf the number of its term, the name of its tensor, and its scale.
    """

    def __init__(self, layer: QuantLinear, scales: _Scales, dropout: float):
        super().__init__(layer)
        self.dropout = dropout
        kinds = [
            next((kind for kind in scales if kind.__name__ == part.type), None) for part in layer.description.side_terms
        ]
        terms = layer.side_terms
        self.places = [
            (i, name, scale) for i, kind in enumerate(kinds) if kind is not None for name, scale in scales[kind].items()
        ]
        self.leaves = [nn.Parameter(getattr(terms[i], name).float() / scale) for i, name, scale in self.places]

    def values(self) -> list[Tensor]:
        scaled = [leaf * scale for leaf, (_, _, scale) in zip(self.leaves, self.places, strict=True)]
        return [straight_through(value.half().float(), value) for value in scaled]

    def product(self, x: Tensor) -> Tensor:
        if self.layer.act is None and not self._drops:  # one product serves all, as in the reference
            y = _Product.apply(x, self, *self.values())
            assert isinstance(y, Tensor)
            return y
        terms = self.terms(*self.values())
        trained = {i for i, _, _ in self.places}
        frozen = () if self.layer.act is not None else tuple(t for i, t in enumerate(terms) if i not in trained)
        y = DecodedProduct.apply(self.read(x), lambda: kernels.with_side_terms(self.base(), frozen))
        assert isinstance(y, Tensor)
        for i, term in enumerate(terms):
            if i in trained:
                y = y + term.apply(F.dropout(x, self.dropout) if self._drops else x, self.layer.shape[0])
            elif self.layer.act is not None:
                y = y + term.apply(x, self.layer.shape[0])
        return y

    @property
    def _drops(self) -> bool:
        """Only where gradients are asked for: a measurement sees the model that is stored."""
        return self.dropout > 0 and torch.is_grad_enabled()

    def terms(self, *values: Tensor) -> list[SideTerm]:
        """All side terms in the order in which the layer adds them, the trained ones made of ``values``."""
        terms: list[Any] = list(self.layer.side_terms)
        for (i, name, _), value in zip(self.places, values, strict=True):
            terms[i] = replace(terms[i], **{name: value})
        return terms

    def base(self) -> Tensor:
        """The decoded codes ``[O, I]`` float32, without side terms."""
        return kernels.decode_packed(self.layer._tensors(), self.layer.spec, self.layer.shape)

    @torch.no_grad()
    def commit(self) -> None:
        for (i, name, _), value in zip(self.places, self.values(), strict=True):
            self.layer.get_buffer(f"side{i}_{name}").copy_(value)


class _Product(torch.autograd.Function):
    """``h W^T`` for the codes and side terms of a linear, decoded again in the backward pass, with gradients for ``h`` and for the
    trained tensors; those are gradients of the terms' own products, which are small."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, linear: _Linear, *values: Tensor) -> Tensor:
        device = h.device.type
        h = h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h
        ctx.linear = linear
        ctx.save_for_backward(h, *values)
        return F.linear(h, kernels.with_side_terms(linear.base(), tuple(linear.terms(*values))).to(h.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        linear: _Linear = ctx.linear
        h, *values = ctx.saved_tensors
        leaves = [value.detach().requires_grad_() for value in values]
        trained = {i for i, _, _ in linear.places}
        with torch.enable_grad():
            terms = linear.terms(*leaves)
            y = sum(term.apply(h.detach(), linear.layer.shape[0]) for i, term in enumerate(terms) if i in trained)
        assert isinstance(y, Tensor)
        of_values = torch.autograd.grad(y, leaves, g.to(y.dtype))
        weight = kernels.with_side_terms(linear.base(), tuple(linear.terms(*values)))
        return g @ weight.to(g.dtype), None, *of_values
