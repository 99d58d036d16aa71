"""StoredFloats: trains what a packed model stores in floating point; its codes stay frozen.

Scales, table values, binary bases, kept weights and the gains of norms are stored as numbers anyway, so training them
costs no bit. Codes never change, so the packed model itself is trained, not a stand-in.

The whole model is in memory once, with gradients for these few numbers. Weights are decoded again in the backward pass,
not kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.modules import QuantLinear, restore
from lowbit.numerics import QTensor, serializable
from lowbit.training.relative import Relative, gains_of
from lowbit.training.trainable import Group, Start, Trainable
from lowbit.training.trained_linear import TrainedLinear, TrainedModel


@serializable
@dataclass(frozen=True)
class StoredFloats(Trainable):
    """All floating parameters of packed linears, and the gains and biases of norms.

    Every number moves in units of its granule's largest magnitude, so one relative learning rate serves scales, tables
    and gains. Layers with quantized statistics keep them: their second rounding would swallow the steps.

    Args:
        gains: also train the gains and biases of norms.
    """

    gains: bool = True

    def parameters(self, model: nn.Module, start: Start) -> TrainedModel:
        restore(model)  # the stored form is trained
        layers = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.is_tied]
        fixed = sum(layer.spec.stats is not None for layer in layers)
        notes = [f"{fixed} layers keep their quantized statistics: they are not tuned"] if fixed else []
        linears = [_Linear(layer) for layer in layers if layer.spec.stats is None]
        gains = gains_of(model, start) if self.gains else {}
        leaves = [part.delta for each in linears for part in each.parts.values()]
        return TrainedModel(model, linears, gains, [Group(leaves + [gain.delta for gain in gains.values()])], notes)


class _Linear(TrainedLinear):
    """A packed linear whose floating parameters are leaves."""

    def __init__(self, layer: QuantLinear):
        super().__init__(layer)
        q = layer.qtensor()
        self.codes = q.codes
        fixed = {field.name for field in layer.spec.grid.fields if field.bits is not None}
        self.fixed = {name: value for name, value in q.params._asdict().items() if name in fixed}
        self.parts = {
            name: Relative(value)
            for name, value in q.params._asdict().items()
            if name not in fixed and value is not None
        }

    def values(self) -> list[Tensor]:
        return [part.value() for part in self.parts.values()]

    def weight(self, *values: Tensor) -> Tensor:
        spec = self.layer.spec
        params = spec.grid.kind(**self.fixed, **dict(zip(self.parts, values, strict=True)))
        codes_GK = spec.granularity.split(self.codes)
        return spec.granularity.join(spec.grid.decode(codes_GK, params), self.layer.shape)

    def quantized(self) -> QTensor:
        values = dict(zip(self.parts, self.values(), strict=True))
        return QTensor.fitted(self.codes, self.layer.spec.grid.kind(**self.fixed, **values), self.layer.spec)
