"""The contract of a step: declarations that others read, and the work on one block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from lowbit.modules import ActSpec, StoredRotation
from lowbit.numerics import Spec, Statistic
from lowbit.steps.effects import BlockDescription, Effects, Freedom
from lowbit.transforms import Seeded

if TYPE_CHECKING:
    from lowbit.steps.state import BlockState

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True, eq=False)
class RunSizes:
    """Sizes from which steps estimate their memory.

    Attributes:
        block: the block, with its layers as they will be stored.
        shapes: ``(O, I)`` of all its linears, by path.
        samples, seq_len: number of calibration windows, and tokens of each.
        hidden: width of the residual stream.
        shares: share of the tokens that reach a linear, by path; 1 for others.
    """

    block: BlockDescription
    shapes: Mapping[str, tuple[int, int]]
    samples: int
    seq_len: int
    hidden: int
    shares: Mapping[str, float]

    def tokens(self, windows: int | None = None) -> int:
        """Tokens in the first ``windows`` calibration windows; None: in all."""
        return (self.samples if windows is None else min(windows, self.samples)) * self.seq_len

    @cached_property
    def window_bytes(self) -> float:
        """Bytes of the inputs and outputs of all linears for one window, in float32."""
        values = sum(sum(shape) * self.shares.get(path, 1.0) for path, shape in self.shapes.items())
        return self.seq_len * values * FLOAT

    @property
    def quantized_weights(self) -> int:
        """The number of weights to be quantized."""
        return sum(prod(self.shapes[path]) for path in self.block.layers)

    @cached_property
    def first_readers(self) -> list[str]:
        """The first reader to be quantized of each shared input that has one."""
        inputs = (
            [path for path in shared.readers if path in self.block.layers]
            for shared in self.block.resolved.shared_inputs
        )
        return [readers[0] for readers in inputs if readers]

    @property
    def pass_bytes(self) -> float:
        """Bytes of :attr:`window_bytes` on each thread, while windows pass, twice: the allocator keeps about as much again
        of what a thread frees. 0 without calibration tokens."""
        return 2 * self.window_bytes * min(self.samples, torch.get_num_threads()) if self.tokens() else 0

    def input_bytes(self, needs: Iterable[Statistic], path: str) -> int:
        """Bytes of the statistics of the input that linear ``path`` reads. 0 without calibration tokens."""
        return sum(need.nbytes(self.tokens(), self.shapes[path][1]) for need in needs) if self.tokens() else 0

    def batch_bytes(self, needs: Iterable[Statistic]) -> int:
        """Bytes of the largest statistic of a batch that is made before it is added to the others."""
        apart = [need for need in needs if not need.adds_in_place]
        return max((self.input_bytes([need], path) for need in apart for path in self.first_readers), default=0)

    def statistics_bytes(self, needs: Iterable[Statistic]) -> int:
        """Bytes of the statistics of all shared inputs, and of a batch's. 0 without calibration tokens."""
        needs = tuple(needs)
        return sum(self.input_bytes(needs, path) for path in self.first_readers) + self.batch_bytes(needs)

    def judged_bytes(self, modules: Iterable[str], windows: int | None) -> float:
        """Bytes of the inputs and outputs of ``modules`` over calibration windows.

        Args:
            modules: paths of linears, or of modules that read and write the residual stream.
            windows: number of windows; None: all.
        """
        width = sum(self.shares.get(p, 1.0) * sum(self.shapes.get(p, (self.hidden, self.hidden))) for p in modules)
        return self.tokens(windows) * width * FLOAT


class Step(Effects):
    """One step of a recipe.

    Subclasses are frozen dataclasses. They define :meth:`run` and override the declarations that apply.
    """

    @property
    def learns(self) -> bool:
        """Whether it computes gradients."""
        return False

    @property
    def adapts(self) -> bool:
        """Whether it leaves low-rank terms beside codes, which training can move."""
        return Freedom.CORRECTIONS in self.fixes

    @property
    def reads_inputs(self) -> bool:
        """Whether its result depends on the linears' inputs on the calibration text."""
        return any(need.of_input for need in self.needs)

    @property
    def reads_original(self) -> bool:
        """Whether it reads the original model's hidden states: ``y`` or ``x_fp`` of :class:`~lowbit.steps.block_io.BlockIO`."""
        return any(need.paired for need in self.needs)

    @property
    def looks_ahead(self) -> int:
        """The number of original blocks behind the one at hand that it runs: ``ahead`` of :class:`~lowbit.steps.block_io.BlockIO`."""
        return 0

    @property
    def rotates_residual(self) -> bool:
        """Whether :meth:`residual_rotation` returns one.

        Such a step changes the model for all other steps, so it comes first.
        """
        return False

    def residual_rotation(self, width: int, seed: int) -> Seeded | StoredRotation:
        """The rotation of a residual stream of ``width`` channels, folded into every block before the first step."""
        raise NotImplementedError

    @property
    def reads_rotations(self) -> bool:
        """Whether it applies rotations that a stage before has learned."""
        return False

    def places_weight(self, spec: Spec) -> bool:
        """Whether it chooses a range for each granule of weights in this format."""
        return Freedom.WEIGHT_RANGES in self.fixes

    def places_input(self, act: ActSpec) -> bool:
        """Whether it fixes the static range of inputs in this format."""
        return Freedom.INPUT_RANGES in self.fixes

    @property
    def one_input_range(self) -> bool:
        """Whether it gives each input one range, even an input with clusters of channels."""
        return False

    def check(self, weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
        """Raises ValueError if it cannot work on these formats, or among ``steps``, all steps of the recipe."""

    @property
    def upper_bound(self) -> str:
        """A sentence for the report if :meth:`describe` gives the largest possible result; else empty."""
        return ""

    def memory(self, sizes: RunSizes) -> float:
        """Bytes that it holds on one block, in addition to its statistics and one window's activations."""
        return 0

    def peak(self, sizes: RunSizes) -> float:
        """Bytes that one block needs at most while the step runs, in addition to the block."""
        return sizes.statistics_bytes(self.needs) + sizes.pass_bytes + self.memory(sizes)

    def ticks(self, windows: int, linears: int) -> int:
        """The approximate number of ticks on a block of ``linears`` linears, to estimate the remaining time."""
        return 0

    def run(self, state: BlockState) -> None:
        """Does the work on one block, in place."""
        raise NotImplementedError


def names_of(steps: Iterable[Any]) -> str:
    """The class names of steps, for a message."""
    return ", ".join(type(step).__name__ for step in steps)
