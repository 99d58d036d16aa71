"""Incoherence: run-time rotations on both sides of a linear, so that no weight and no input channel stands out.

A rotation of the residual stream is shared by the whole model, and few edges inside a block can carry one
(:mod:`lowbit.steps.rotation`). Here each linear runs its own rotations. They are stored as seeds: 128 bits for each
linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lowbit.architectures import Kind
from lowbit.modules import serialize_transforms
from lowbit.numerics import serializable
from lowbit.steps.effects import TRANSFORMING, BlockDescription, Freedom, LayerDescription
from lowbit.steps.rotation import seed_of
from lowbit.steps.state import BlockState
from lowbit.steps.step import Step
from lowbit.transforms import Kronecker, RandomHadamard, Seeded

_KINDS: dict[str, type[Seeded]] = {"kronecker": Kronecker, "hadamard": RandomHadamard}


@serializable
@dataclass(frozen=True)
class Incoherence(Step):
    """Replaces each weight W by ``U W V^T``; the linear then computes ``U^T (U W V^T) V x`` (QuIP, arXiv:2307.13304).

    U and V are random rotations of the kind ``transform``. Linears that read the same input share V, so they share
    statistics. Each linear has its own U. Seeds follow from the block's seed and the names of the input and the linear.
    Put scales, shifts and permutations across edges before this step.
    """

    transform: Literal["kronecker", "hadamard"] = "hadamard"

    def __post_init__(self):
        if self.transform not in _KINDS:
            raise ValueError(f"a rotation is one of {', '.join(_KINDS)}, found {self.transform!r}")

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({Kind.ROTATE})

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.CHANNEL_BASIS})

    @property
    def disturbs(self) -> frozenset[Freedom]:
        return TRANSFORMING - {Freedom.CHANNEL_COPIES}  # the rotation follows them

    def describe(self, block: BlockDescription) -> BlockDescription:
        return block.changed({path: self._rotated(layer) for path, layer in block.layers.items()})

    def _rotated(self, layer: LayerDescription) -> LayerDescription:
        (rows, columns), rotation = layer.shape, _KINDS[self.transform]
        post = serialize_transforms.describe("post", [rotation(0, rows).inverse()])
        return replace(layer.running(rotation(0, columns)), post=(*post, *layer.post))

    def run(self, state: BlockState) -> None:
        rotation = _KINDS[self.transform]
        drafts = state.drafts
        for shared in state.resolved.shared_inputs:
            for path in (reader for reader in shared.readers if reader in drafts):
                rows, columns = drafts[path].weight.shape
                of_input = rotation(seed_of(state.seed, "input", shared.name), columns)
                state.transform(path, of_input, rotation(seed_of(state.seed, "output", path), rows))
