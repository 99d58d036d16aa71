"""StoredFloats: trains what a packed model stores in floating point; its codes stay frozen.

Scales, table values, binary bases, kept weights and the gains of norms are stored as numbers anyway, so training them
costs no bit. Codes never change, so the packed model itself is trained, not a stand-in.

The whole model is in memory once, with gradients for these few numbers. Weights are decoded again in the backward pass,
not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    and gains. Where scales are codes themselves, such as those of llama.cpp's K types, the scales of these codes move.

    Args:
        gains: also train the gains and biases of norms.
    """

    gains: bool = True

    def parameters(self, model: nn.Module, start: Start) -> TrainedModel:
        restore(model)  # the stored form is trained
        linears = [_Linear(m) for m in model.modules() if isinstance(m, QuantLinear) and not m.is_tied]
        gains = gains_of(model, start) if self.gains else {}
        leaves = [part.delta for each in linears for part in each.floats.all_parts()]
        return TrainedModel(model, linears, gains, [Group(leaves + [gain.delta for gain in gains.values()])], [])


class _Linear(TrainedLinear):
    """A packed linear whose floating parameters are leaves."""

    def __init__(self, layer: QuantLinear):
        super().__init__(layer)
        self.floats = _Floats(layer.qtensor())

    def values(self) -> list[Tensor]:
        return [part.value() for part in self.floats.all_parts()]

    def weight(self, *values: Tensor) -> Tensor:
        return self.floats.holding(iter(values)).dequantize()

    def quantized(self) -> QTensor:
        return self.floats.holding(iter(self.values()), as_stored=True)


class _Floats:
    """The floating parameters of a quantized tensor. Those that are stored as codes are a quantized tensor themselves."""

    def __init__(self, q: QTensor):
        self.q = q
        floating = [field for field in q.spec.grid.fields if field.bits is None]
        self.coded = {field: _Floats(q.second[field.name]) for field in floating if field.name in q.second}
        self.parts = {f.name: Relative(getattr(q.params, f.name)) for f in floating if f not in self.coded}

    def all_parts(self) -> Iterator[Relative]:
        """Of this level, then of those below, as :meth:`holding` takes their values."""
        yield from self.parts.values()
        for each in self.coded.values():
            yield from each.all_parts()

    def holding(self, values: Iterator[Tensor], *, as_stored: bool = False) -> QTensor:
        """The same codes with these values, which gradients reach; ``as_stored``: rounded to storage, without gradients."""
        q, spec = self.q, self.q.spec
        params = q.params._replace(**{name: next(values) for name in self.parts})
        if as_stored and self.parts:
            params = spec.as_stored(params, spec.granularity.param_shape(q.shape)[1])
        second = {field.name: each.holding(values, as_stored=as_stored) for field, each in self.coded.items()}
        restored = {field.name: spec.from_second(second[field.name], field) for field in self.coded}
        return QTensor(q.codes, params._replace(**restored), spec, second, q.mean)
