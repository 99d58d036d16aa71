"""What a step is: declarations, which others read, and the work itself, on one block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from lowbit.modules import ActSpec
from lowbit.numerics import Spec, Statistic
from lowbit.steps.effects import BlockDescription, Effects, Freedom
from lowbit.transforms import Seeded

if TYPE_CHECKING:
    from lowbit.steps.state import BlockState

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True, eq=False)
class RunSizes:
    """The sizes on which the memory of a step depends.

    Attributes:
        block: the block, with its layers as they will be stored.
        shapes: ``(O, I)`` of all its linears, by path.
        samples, seq_len: calibration windows and their tokens.
        hidden: width of the residual stream.
        shares: the share of the tokens that a linear sees, by path; 1 where it is not named.
    """

    block: BlockDescription
    shapes: Mapping[str, tuple[int, int]]
    samples: int
    seq_len: int
    hidden: int
    shares: Mapping[str, float]

    def tokens(self, windows: int | None = None) -> int:
        """Tokens of the first ``windows`` calibration windows (None: of all)."""
        return (self.samples if windows is None else min(windows, self.samples)) * self.seq_len

    @cached_property
    def window_bytes(self) -> float:
        """Inputs and outputs of all linears for one window."""
        values = sum(sum(shape) * self.shares.get(path, 1.0) for path, shape in self.shapes.items())
        return self.seq_len * values * FLOAT

    @property
    def quantized_weights(self) -> int:
        """How many weights are to be quantized."""
        return sum(prod(self.shapes[path]) for path in self.block.layers)

    @cached_property
    def first_readers(self) -> list[str]:
        """The first linear to be quantized of each shared input that has one."""
        inputs = (
            [path for path in shared.readers if path in self.block.layers]
            for shared in self.block.resolved.shared_inputs
        )
        return [readers[0] for readers in inputs if readers]

    def statistics_bytes(self, needs: Iterable[Statistic]) -> int:
        """What is kept of the block's shared inputs, and the largest item once more. Nothing without tokens."""
        if not self.tokens():
            return 0
        widths = [self.shapes[path][1] for path in self.first_readers]
        sizes = [need.nbytes(self.tokens(), width) for need in needs for width in widths]
        return sum(sizes) + max(sizes, default=0)

    def judged_bytes(self, modules: Iterable[str], windows: int | None) -> float:
        """Inputs and outputs of ``modules``, linears or modules that read and write the stream, over calibration windows."""
        width = sum(self.shares.get(p, 1.0) * sum(self.shapes.get(p, (self.hidden, self.hidden))) for p in modules)
        return self.tokens(windows) * width * FLOAT


class Step(Effects):
    """One step of a recipe. Subclasses are frozen dataclasses; they override what applies to them, and :meth:`run`."""

    @property
    def learns(self) -> bool:
        """Whether it follows gradients."""
        return False

    @property
    def reads_inputs(self) -> bool:
        """Whether it depends on what the calibration text makes of the inputs of linears."""
        return any(need.of_input for need in self.needs)

    @property
    def rotates_residual(self) -> bool:
        """Whether :meth:`residual_rotation` gives one. Such a step changes the model that all others see, and comes first."""
        return False

    def residual_rotation(self, width: int, seed: int) -> Seeded:
        """The rotation of the residual stream of ``width`` channels, which is folded into every block before its first step."""
        raise NotImplementedError

    def places_weight(self, spec: Spec) -> bool:
        """Whether it chooses a range for each granule of weights in this format."""
        return Freedom.WEIGHT_RANGES in self.fixes

    def places_input(self, act: ActSpec) -> bool:
        """Whether it fixes the static range of inputs in this format."""
        return Freedom.INPUT_RANGES in self.fixes

    @property
    def one_input_range(self) -> bool:
        """Whether it gives an input one range, whatever clusters of channels it has."""
        return False

    def check(self, weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
        """Raises ValueError where it cannot work on these formats among ``steps``, those of the whole recipe."""

    @property
    def upper_bound(self) -> str:
        """Where :meth:`describe` gives the largest that can come out, a sentence that says so; else empty."""
        return ""

    def memory(self, sizes: RunSizes) -> float:
        """Bytes it keeps on one block, besides the statistics it needs and one window's activations."""
        return 0

    def ticks(self, windows: int, linears: int) -> int:
        """About how often a run on a block of that many linears ticks: only to estimate the time that is left."""
        return 0

    def run(self, state: BlockState) -> None:
        """Does the work on one block, in place."""
        raise NotImplementedError


def names_of(steps: Iterable[Any]) -> str:
    """The class names of steps, for a message."""
    return ", ".join(type(step).__name__ for step in steps)
