"""The format of one linear: what is stored of its weight, and how its input is quantized."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.modules.activation import ActSpec
from lowbit.numerics import Spec


@dataclass(frozen=True)
class LinearFormat:
    """How one linear will be stored and how its input is quantized at run time (None: not at all)."""

    weight: Spec
    act: ActSpec | None = None

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raises ValueError where a linear ``[O, I]`` of that shape cannot have this format."""
        self.weight.check_shape(shape)
        if self.act is not None:
            self.act.spec.check_shape((1, shape[1]))
