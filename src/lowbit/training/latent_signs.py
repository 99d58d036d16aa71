"""LatentSigns: quantization-aware training of weights that are signs, and of the scales around them (OneBit).

Each linear multiplies by the signs of a latent float32 weight. The latent starts small and of one magnitude, because its size
means nothing but how far a sign is from flipping: the sizes of weights are in the scales. The latent is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.modules import QuantLinear, restore
from lowbit.numerics import QTensor, Sign, Spec, Unfitted, fake_quantize, quantize, serializable, straight_through
from lowbit.training.relative import Relative, gains_of
from lowbit.training.trainable import Group, Start, Trainable
from lowbit.training.trained_linear import TrainedLinear, TrainedModel
from lowbit.transforms import Scale

_SMALLEST = 1e-2
"""Share of its start that a trained scale keeps at least: its reciprocal is stored."""


@serializable
@dataclass(frozen=True)
class LatentSigns(Trainable):
    """The signs of all packed linears in the blocks, and the scales of their inputs and outputs (OneBit, arXiv:2402.11295,
    section 3.4). Embedding and head are not trained.

    Args:
        start: magnitude of all latent weights before the first step.
        scale_rate: learning rate of the scales, in units of their start, as a multiple of the stage's; 0: they stay.
        gains: also train the gains and biases of norms, in units of their start.
    """

    start: float = 0.01
    scale_rate: float = 1.0
    gains: bool = True

    def __post_init__(self):
        if self.start <= 0 or self.scale_rate < 0:
            raise ValueError(f"start is a positive magnitude and scale_rate 0 or more, found {self}")

    @property
    def floats_per_weight(self) -> int:
        return 5  # the latent, its gradient, two moments, the best so far

    def check(self, weights: Sequence[Spec]) -> None:
        for spec in weights:
            if not isinstance(spec.grid, Sign):
                raise ValueError(f"LatentSigns trains signs, Spec(Sign(), PerTensor()), not weights in {spec.grid}")

    def parameters(self, model: nn.Module, start: Start) -> TrainedModel:
        restore(model)  # codes in their canonical form, which commit writes
        layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        layers = {name: m for name, m in layers.items() if isinstance(m.spec.grid, Sign)}
        linears = [_Linear(layer, self.start) for layer in layers.values()]
        scales = {
            f"{name}.{key}": _Scale(layer.get_buffer(key)) for name, layer in layers.items() for key in _scales(layer)
        }
        scales = scales if self.scale_rate else {}
        gains = gains_of(model, start) if self.gains else {}
        groups = [
            Group([each.latent for each in linears]),
            Group([scale.delta for scale in scales.values()], self.scale_rate),
            Group([gain.delta for gain in gains.values()]),
        ]
        return TrainedModel(model, linears, {**gains, **scales}, groups, [])


def _scales(layer: QuantLinear) -> Iterator[str]:
    """The buffers of ``layer`` that scale its input or output."""
    for place, parts in (("pre", layer.description.pre), ("post", layer.description.post)):
        yield from (f"{place}{i}_s" for i, part in enumerate(parts) if part.type == Scale.__name__)


class _Linear(TrainedLinear):
    """A packed linear that multiplies by the signs of its latent weight."""

    def __init__(self, layer: QuantLinear, start: float):
        super().__init__(layer)
        self.latent = nn.Parameter(layer.qtensor().dequantize() * start)

    def values(self) -> list[Tensor]:
        return [self.latent]

    def weight(self, *values: Tensor) -> Tensor:
        return fake_quantize(values[0], self.layer.spec)

    @torch.no_grad()
    def quantized(self) -> QTensor:
        return quantize(self.latent.detach(), self.layer.spec, Unfitted())


class _Scale(Relative):
    """What a layer multiplies its channels by, trained in units of its start. The layer stores and divides by the reciprocal.

    Args:
        divisor: the stored reciprocals.
    """

    def __init__(self, divisor: Tensor):
        super().__init__(1 / divisor.float(), divisor.dtype)

    def value(self) -> Tensor:
        """The reciprocals now, rounded to their storage; gradients pass the rounding."""
        least = _SMALLEST * self.start.abs()
        factor = torch.maximum((self.start + self.unit * self.delta) * self.start.sign(), least) * self.start.sign()
        assert self.dtype is not None
        kept = torch.finfo(self.dtype)
        size = factor.abs().clamp(1 / kept.max, 1 / kept.tiny)
        divisor = factor.sign() / size
        return straight_through(divisor.to(self.dtype).float(), divisor)
