"""LowRankTerms: trains the low-rank terms beside frozen codes (LoRA on a packed base, QLoRA).

The packed weight is decoded again in the backward pass, not kept, and no gradient of the size of a weight is ever formed: a
step costs what the base costs, and the memory of a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import kernels
from lowbit.modules import QuantLinear, restore
from lowbit.numerics import LowRank, Spec, serializable, straight_through
from lowbit.training.trainable import Group, Start
from lowbit.training.trained_linear import DecodedProduct, TrainedLinear, TrainedModel


@serializable
@dataclass(frozen=True)
class LowRankTerms:
    """The low-rank terms of all packed linears; everything else stays (QLoRA, arXiv:2305.14314, section 3).

    The layer adds ``b a`` to its weight. What moves is ``a`` and ``b / scale``, so that ``scale`` is peft's ``lora_alpha / r``. Both are
    rounded to float16, in which they are stored, in every forward; gradients pass the rounding.

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
    def needs_packed(self) -> bool:
        return True

    @property
    def needs_latents(self) -> bool:
        return False

    @property
    def needs_adapters(self) -> bool:
        return True

    @property
    def floats_per_weight(self) -> int:
        return 0

    def check(self, weights: Sequence[Spec]) -> None:
        """A term stands beside every format."""

    def parameters(self, model: nn.Module, start: Start) -> TrainedModel:
        restore(model)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.is_tied]
        linears = [_Linear(layer, self) for layer in layers if _numbers(layer)]
        return TrainedModel(model, linears, {}, [Group([leaf for each in linears for leaf in each.leaves])], [])


def _numbers(layer: QuantLinear) -> list[int]:
    """Which of the layer's side terms are low-rank ones."""
    return [i for i, part in enumerate(layer.description.side_terms) if part.type == LowRank.__name__]


class _Linear(TrainedLinear):
    """A packed linear whose low-rank terms are leaves: a and b / scale of each, in turn."""

    def __init__(self, layer: QuantLinear, how: LowRankTerms):
        super().__init__(layer)
        self.how, self.numbers = how, _numbers(layer)
        terms = [layer.side_terms[i] for i in self.numbers]
        pairs = [(term.a.float().clone(), term.b.float() / how.scale) for term in terms if isinstance(term, LowRank)]
        self.leaves = [nn.Parameter(value) for pair in pairs for value in pair]
        self.others = [term for i, term in enumerate(layer.side_terms) if i not in self.numbers]

    def values(self) -> list[Tensor]:
        scaled = [leaf if i % 2 == 0 else self.how.scale * leaf for i, leaf in enumerate(self.leaves)]
        return [straight_through(value.half().float(), value) for value in scaled]

    def product(self, x: Tensor) -> Tensor:
        values = self.values()
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if self.layer.act is None and not self._drops:  # one product serves all, as in the reference
            y = _Product.apply(x, self._terms, self._base, *values)
            assert isinstance(y, Tensor)
            return y
        y = DecodedProduct.apply(self.read(x), self._frozen)
        assert isinstance(y, Tensor)
        if self.layer.act is not None:
            for term in self._terms(*values):
                if not isinstance(term, LowRank):
                    y = y + term.apply(x, self.layer.shape[0])
        seen = F.dropout(x, self.how.dropout) if self._drops else x
        for a_RI, b_OR in pairs:
            y = y + (seen @ a_RI.to(x.dtype).T) @ b_OR.to(x.dtype).T
        return y

    @property
    def _drops(self) -> bool:
        """Only where gradients are asked for: a measurement sees the model that is stored."""
        return self.how.dropout > 0 and torch.is_grad_enabled()

    def _terms(self, *values: Tensor) -> list[Any]:
        """All side terms in the order in which the layer adds them, the trained ones made of ``values``."""
        terms = list(self.layer.side_terms)
        for i, a_RI, b_OR in zip(self.numbers, values[::2], values[1::2], strict=True):
            terms[i] = LowRank(a_RI, b_OR)
        return terms

    def _base(self) -> Tensor:
        """The decoded codes ``[O, I]`` float32, without side terms."""
        return kernels.decode_packed(self.layer._tensors(), self.layer.spec, self.layer.shape)

    def _frozen(self) -> Tensor:
        """What does not move, as far as it multiplies the (quantized) input: codes, and other side terms without ``act``."""
        return kernels.with_side_terms(self._base(), () if self.layer.act is not None else tuple(self.others))

    @torch.no_grad()
    def commit(self) -> None:
        values = self.values()
        for i, a_RI, b_OR in zip(self.numbers, values[::2], values[1::2], strict=True):
            self.layer.get_buffer(f"side{i}_a").copy_(a_RI)
            self.layer.get_buffer(f"side{i}_b").copy_(b_OR)


class _Product(torch.autograd.Function):
    """``h W^T`` for ``W = base() + terms(*values)``, decoded again in the backward pass, with gradients for ``h`` and the factors."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, terms: Callable[..., Any], base: Callable[[], Tensor], *values: Tensor) -> Tensor:
        device = h.device.type
        h = h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h
        ctx.terms, ctx.base = terms, base
        ctx.save_for_backward(h, *values)
        return F.linear(h, kernels.with_side_terms(base(), tuple(terms(*values))).to(h.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        h, *values = ctx.saved_tensors
        weight = kernels.with_side_terms(ctx.base(), tuple(ctx.terms(*values))).to(g.dtype)
        g_TO, h_TI = g.flatten(0, -2), h.flatten(0, -2)
        of_values: list[Tensor] = []
        for a_RI, b_OR in zip(values[::2], values[1::2], strict=True):
            a, b = a_RI.to(g.dtype), b_OR.to(g.dtype)
            of_values += [((g_TO @ b).T @ h_TI).to(a_RI.dtype), (g_TO.T @ (h_TI @ a.T)).to(b_OR.dtype)]
        return g @ weight, None, None, *of_values
