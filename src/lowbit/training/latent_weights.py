"""LatentWeights: quantization-aware training of all weights of packed linears.

Each linear computes with a latent float32 weight that is rounded anew in every forward, as its format stores it. Gradients
pass the rounding straight through. What is stored is the latent rounded once more, so training sees the very model that
the checkpoint holds. The latent is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.caches import CacheGradients
from lowbit.modules import QuantLinear, fake_activation, restore
from lowbit.numerics import (
    Field,
    Fit,
    Fixed,
    Int,
    MinMax,
    QTensor,
    RangeGrid,
    Spec,
    fake_quantize,
    limited,
    quantize,
    serializable,
    straight_through,
)
from lowbit.training.relative import Relative, gains_of
from lowbit.training.trainable import Group, Start, Trainable
from lowbit.training.trained_linear import TrainedLinear, TrainedModel

_SMALLEST = 1e-2
"""Share of its start that a learned step size keeps at least: a scale must stay above zero."""


@serializable
@dataclass(frozen=True)
class LatentWeights(Trainable):
    """The weights of all packed linears in the blocks, rounded straight through. Embedding and head are not trained.

    The latent starts at the weight that the Blockwise stage rounded, with its transforms folded in and clipped to the range
    that a step searched for it, so that training goes on where a search ended.

    Args:
        ranges: places the grid on the latent in each forward (LLM-QAT, arXiv:2305.17888); None: scales are parameters that
            start at the stored ones (LSQ, arXiv:1902.08153); zero points that are codes stay.
        through_ranges: gradients also reach the values that set a range, in weights, dynamic activations and a quantized cache;
            False: a range counts as constant.
        range_rate: learning rate of learned scales, in units of their start, as a multiple of the stage's. Zero points that
            are real numbers move in steps of the grid.
        gains: also train the gains and biases of norms, in units of their start.
        gain_rate: their learning rate, as a multiple of the stage's.
        limit: LLM-QAT's code gives no gradient to values of at least this magnitude (2), although it does not clip them: to
            weights on symmetric grids of 3 bits or more, to inputs that are quantized, and to keys and values that a cache of
            symmetric integers packs. None: all have gradients.
    """

    ranges: Fit | None = MinMax()
    through_ranges: bool = True
    range_rate: float = 1.0
    gains: bool = False
    limit: float | None = None
    gain_rate: float = 1.0

    def __post_init__(self):
        for name, rate in (("range_rate", self.range_rate), ("gain_rate", self.gain_rate)):
            if rate <= 0:
                raise ValueError(f"{name} is a positive multiple of the learning rate, found {rate}")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit is a positive magnitude or None, found {self.limit}")

    @property
    def needs_latents(self) -> bool:
        return True

    @property
    def floats_per_weight(self) -> int:
        return 6  # the latent as it started and as it is, its gradient, two moments, the best so far

    @property
    def cache_gradients(self) -> CacheGradients:
        return CacheGradients(self.limit, self.through_ranges)

    def check(self, weights: Sequence[Spec]) -> None:
        for spec in weights:
            if not isinstance(spec.grid, RangeGrid):
                raise ValueError(
                    f"LatentWeights rounds weights anew in each step, and {spec.grid} is not placed by a range; choose another "
                    "grid, or train StoredFloats"
                )
            why_not = None if self.ranges is None else self.ranges.why_not(spec.grid)
            if why_not is not None:
                raise ValueError(f"LatentWeights: {why_not}; choose other ranges or another grid")

    def parameters(self, model: nn.Module, start: Start) -> TrainedModel:
        restore(model)  # codes in their canonical form, which commit writes
        linears = []
        for name, latent in start.latents.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantLinear) and latent.shape == layer.shape, name
            linears.append(_Linear(layer, latent, self))
        gains = gains_of(model, start) if self.gains else {}
        groups = [
            Group([each.latent for each in linears]),
            Group([part.delta for each in linears for part in each.parts.values()], self.range_rate),
            Group([gain.delta for gain in gains.values()], self.gain_rate),
        ]
        return TrainedModel(model, linears, gains, groups, [])


class _Linear(TrainedLinear):
    """A packed linear that multiplies by its latent weight, rounded."""

    def __init__(self, layer: QuantLinear, latent: Tensor, how: LatentWeights):
        super().__init__(layer)
        self.how, self.latent = how, nn.Parameter(latent.float().clone())
        self.parts: dict[str, _Part] = {}
        self.fixed: dict[str, Tensor] = {}
        if how.ranges is None:
            stored = layer.qtensor().params._asdict()
            fields = layer.spec.grid.fields
            self.parts = {each.name: _Part(stored[each.name], each) for each in fields if each.bits is None}
            self.fixed = {each.name: stored[each.name] for each in fields if each.bits is not None}
        grid = layer.spec.grid
        limited = how.limit is not None and isinstance(grid, Int) and grid.symmetric and grid.bits >= 3
        self.limit = how.limit if limited else None

    def values(self) -> list[Tensor]:
        return [self.latent, *(part.value() for part in self.parts.values())]

    def weight(self, *values: Tensor) -> Tensor:
        latent, *parts = values
        return fake_quantize(
            limited(latent, self.limit), self.layer.spec, self._fit(parts), through_fit=self.how.through_ranges
        )

    @torch.no_grad()
    def quantized(self) -> QTensor:
        latent, *parts = self.values()
        fit = self._fit(parts)
        assert fit is not None
        return quantize(latent.detach(), self.layer.spec, fit)

    def read(self, x: Tensor) -> Tensor:
        act = self.layer.act
        if act is None:
            return x
        x = limited(x, self.how.limit)
        if act.static or self.how.through_ranges:
            return fake_activation(x, act, self.layer.act_params)
        return straight_through(fake_activation(x.detach(), act, None), x)

    def _fit(self, parts: Sequence[Tensor]) -> Fit | Fixed:
        if self.how.ranges is not None:
            return self.how.ranges
        return Fixed(self.layer.spec.grid.kind(**self.fixed, **dict(zip(self.parts, parts, strict=True))))


class _Part(Relative):
    """A learned parameter of a grid, in units of its granule's start, or in levels of the grid where it counts these.

    Args:
        start: the stored one, ``[G, width]``.
        field: what it is.
    """

    def __init__(self, start: Tensor, field: Field):
        super().__init__(start)
        self.in_levels = field.in_levels
        if self.in_levels:  # it may be zero
            self.unit = torch.ones_like(self.unit)

    def value(self) -> Tensor:
        """A step size keeps its sign: it does not reach zero."""
        value = super().value()
        if self.in_levels:
            return value
        least = _SMALLEST * self.start
        return torch.where(self.start < 0, torch.minimum(value, least), torch.maximum(value, least))
