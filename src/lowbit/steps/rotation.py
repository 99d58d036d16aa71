"""Rotations, folded into weights where the model can carry them and run by the linears elsewhere.

The two steps go together. :class:`RotateResidual` rotates the stream between blocks once for the whole model, so the
outputs of norms are rotated at no cost. :class:`RotateInputs` rotates every other input. From values to the output
projection it folds, head by head; the rest (after an MLP's activation; everything, if the stream cannot be rotated)
runs at run time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lowbit.architectures import Kind, ResolvedBlock, ResolvedEdge, ResolvedResidual
from lowbit.modules import StoredRotation
from lowbit.numerics import serializable
from lowbit.steps.effects import TRANSFORMING, BlockDescription, Freedom, MixOrder
from lowbit.steps.state import BlockState
from lowbit.steps.step import Step
from lowbit.transforms import RandomHadamard, Rotate, Seeded

_HEADS = "v_o"


@serializable
@dataclass(frozen=True)
class RotateResidual(Step):
    """One random Hadamard rotation of the residual stream, or a learned one, folded into every block before its first step.

    The gains of norms move into the weights after them. All other steps see the rotated model, so this step comes
    first. The walk, which holds the blocks, folds the rotation and rotates the stream before the first block and back
    after the last. Where the architecture's norms do not commute with a rotation, nothing is rotated and the report
    says why.

    Args:
        learned: the rotation is the one that a stage before found (SpinQuant, arXiv:2405.16406). The model stores it.
    """

    learned: bool = False

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({Kind.ROTATE})

    @property
    def reads_rotations(self) -> bool:
        return self.learned

    @property
    def rotates_residual(self) -> bool:
        return True

    def residual_rotation(self, width: int, seed: int) -> Seeded | StoredRotation:
        return StoredRotation(width) if self.learned else drawn_residual(width, seed)

    def run(self, state: BlockState) -> None:
        if not state.context.rotated:
            state.note(
                f"the residual stream is not rotated: {state.resolved.residual.fixed or 'another block forbids it'}"
            )


@serializable
@dataclass(frozen=True)
class RotateInputs(Step):
    """Hadamard rotations of every input that a rotated residual stream does not cover (QuaRot, arXiv:2404.00456).

    Rotations at run time are random signs and a Hadamard matrix, stored as a seed. Linears that read the same input
    share one.

    Args:
        heads: how the input of the output projection is rotated. ``"folded"``: each head by itself, folded into values
            and projection where an edge carries it. ``"all"``: all heads together, at run time. ``"learned"``: folded, and the
            rotation is the one that a stage before found (SpinQuant, arXiv:2405.16406).
    """

    heads: Literal["folded", "all", "learned"] = "folded"

    @property
    def reads_rotations(self) -> bool:
        return self.heads == "learned"

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({Kind.ROTATE})

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.CHANNEL_BASIS})

    @property
    def disturbs(self) -> frozenset[Freedom]:
        return TRANSFORMING - {Freedom.CHANNEL_COPIES} | {Freedom.WEIGHT_RANGES}

    @property
    def mix_order(self) -> MixOrder:
        return MixOrder.AFTER_TRANSFORMS

    def describe(self, block: BlockDescription) -> BlockDescription:
        transformed = [path for path, layer in block.layers.items() if layer.pre]
        edges = self._folded(block.resolved, block.layers, transformed)
        for _, readers in rotated_at_run_time(block.resolved, block.layers, block.rotated, edges):
            layers = {path: block.layers[path] for path in readers}
            block = block.changed(
                {path: layer.running(RandomHadamard(0, layer.shape[1])) for path, layer in layers.items()}
            )
        return block

    def run(self, state: BlockState) -> None:
        drafts = state.drafts
        edges = self._folded(state.resolved, drafts, {path for path, draft in drafts.items() if draft.pre})
        for edge in edges:
            learned = self.heads == "learned"
            rotation = state.context.rotations[edge.name] if learned else drawn_heads(edge, state.seed)
            state.commit(edge, rotation, Kind.ROTATE)
        for name, readers in rotated_at_run_time(state.resolved, drafts, state.context.rotated, edges):
            width = drafts[readers[0]].weight.shape[1]
            for path in readers:
                state.transform(path, drawn_input(name, width, state.seed))

    def _folded(
        self, resolved: ResolvedBlock, formats: Iterable[str], transformed: Iterable[str]
    ) -> list[ResolvedEdge]:
        return [] if self.heads == "all" else folded_heads(resolved, formats, transformed)


def folded_heads(
    resolved: ResolvedBlock, formats: Iterable[str], transformed: Iterable[str] = ()
) -> list[ResolvedEdge]:
    """Edges across which heads are rotated: from values to projections that are among the quantized linears ``formats`` and do not
    transform their input yet."""
    wanted = set(formats) - set(transformed)
    return [
        edge
        for edge in resolved.edges
        if edge.name == _HEADS and Kind.ROTATE in edge.carries and wanted >= {p.module for p in edge.consumers}
    ]


def rotated_at_run_time(
    resolved: ResolvedBlock, formats: Iterable[str], rotated: bool, folded: Iterable[ResolvedEdge]
) -> Iterator[tuple[str, list[str]]]:
    """The name of each input that is rotated at run time, and its readers that are to be quantized.

    Args:
        resolved: the table on a block.
        formats: paths of the linears to be quantized.
        rotated: whether the residual stream is rotated.
        folded: edges across which heads are rotated.
    """
    done = {name for edge in folded for name in edge.inputs} | (resolved.residual.inputs if rotated else set())
    chosen = set(formats)
    for shared in resolved.shared_inputs:
        readers = [path for path in shared.readers if path in chosen]
        if readers and shared.name not in done:
            yield shared.name, readers


def drawn_residual(width: int, seed: int) -> Seeded:
    """A random Hadamard rotation of a residual stream; ``seed`` is the recipe's. Learning starts with it, too."""
    return RandomHadamard(seed_of(seed, "residual", "") >> 31, width)  # 32 bits: every JSON reader holds it


def drawn_heads(edge: ResolvedEdge, seed: int) -> Rotate:
    """A random Hadamard rotation of each head at ``edge``; ``seed`` is the block's. Learning starts with it, too."""
    assert edge.within is not None
    return Rotate.hadamard(edge.within, seed_of(seed, "heads", edge.name))


def drawn_input(name: str, width: int, seed: int) -> RandomHadamard:
    """The rotation of the input ``name`` at run time; ``seed`` is the block's."""
    return RandomHadamard(seed_of(seed, "input", name), width)


def residual_rotation(
    steps: Sequence[Step], blocks: Iterable[ResolvedResidual], width: int, seed: int
) -> Seeded | StoredRotation | None:
    """The rotation of the residual stream through ``blocks``, or None if no step has one or a block forbids it.

    Args:
        steps: all steps of a recipe.
        blocks: the residual tables of all blocks.
        width: channels of the stream.
        seed: the recipe's seed.
    """
    step = next((step for step in steps if step.rotates_residual), None)
    return None if step is None or any(block.fixed for block in blocks) else step.residual_rotation(width, seed)


def seed_of(block: int, side: str, name: str) -> int:
    """A seed of 63 bits: a hash of a seed, a side and a name."""
    return int.from_bytes(hashlib.sha256(f"{block}/{side}/{name}".encode()).digest()[:8], "big") >> 1
