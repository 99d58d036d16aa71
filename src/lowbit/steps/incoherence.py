"""Incoherence: rotations at run time on both sides of a linear, so that no weight and no input channel stands out.

A rotation of the residual stream is shared by the whole model, and one between two linears of a block is legal at few edges
(:mod:`lowbit.steps.rotation`). Here each linear runs its own, stored as seeds: 128 bits a linear, at any width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lowbit.architectures import Kind
from lowbit.modules import PartDescription, serialize_transforms
from lowbit.numerics import Statistic, serializable
from lowbit.steps.rotation import seed_of
from lowbit.steps.state import BlockState
from lowbit.transforms import Kronecker, RandomHadamard, Seeded

_KINDS: dict[str, type[Seeded]] = {"kronecker": Kronecker, "hadamard": RandomHadamard}


@serializable
@dataclass(frozen=True)
class Incoherence:
    """Replaces each weight W by ``U W V^T``: its linear computes ``U^T (U W V^T) V x`` (QuIP, arXiv:2307.13304).

    U and V are random rotations of the given kind. Linears that read one input rotate it alike, so that they share its
    statistics, and could share the work; each has an output rotation of its own. Seeds follow from the block's seed and the
    names of the input and the linear. Scales, shifts and permutations across edges have to come before this step.
    """

    transform: Literal["kronecker", "hadamard"] = "hadamard"
    kind: ClassVar[Kind] = Kind.ROTATE

    def __post_init__(self):
        if self.transform not in _KINDS:
            raise ValueError(f"a rotation is one of {', '.join(_KINDS)}, found {self.transform!r}")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset()

    def ticks(self, windows: int, linears: int) -> int:
        return 0

    def described(self, rows: int, columns: int) -> tuple[tuple[PartDescription, ...], tuple[PartDescription, ...]]:
        """The transforms of the input and of the output that this step adds to a packed linear of that shape."""
        rotation = _KINDS[self.transform]
        return (
            serialize_transforms.describe("pre", [rotation(0, columns)]),
            serialize_transforms.describe("post", [rotation(0, rows).inverse()]),
        )

    def run(self, state: BlockState) -> None:
        rotation = _KINDS[self.transform]
        drafts = state.drafts
        for shared in state.resolved.shared_inputs:
            for path in (reader for reader in shared.readers if reader in drafts):
                rows, columns = drafts[path].weight.shape
                of_input = rotation(seed_of(state.seed, "input", shared.name), columns)
                state.transform(path, of_input, rotation(seed_of(state.seed, "output", path), rows))
