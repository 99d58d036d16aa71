"""Rotations that are folded where the model can take them, and run by the linears themselves where it cannot.

Two steps, which go together. :class:`RotateResidual` turns the stream between the blocks, once for the whole model, so that
what norms give is rotated for nothing. :class:`RotateInputs` sees to every other input: in each head, from values to output
projection, by folding; the rest (behind the activation of an MLP; everything, where the stream cannot be rotated) at run time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowbit.architectures import Kind, ResolvedBlock, ResolvedEdge, ResolvedResidual
from lowbit.modules import PartDescription, serialize_transforms
from lowbit.numerics import Statistic, serializable
from lowbit.steps.state import BlockState
from lowbit.transforms import RandomHadamard, Rotate, Seeded

_HEADS = "v_o"


@serializable
@dataclass(frozen=True)
class RotateResidual:
    """One random Hadamard rotation of the residual stream, folded into every block before its first step.

    The gains of norms go into the weights behind them. It is a property of the model that all other steps see, so it comes
    first; who holds the blocks (the walk) folds it and turns the stream before the first block and behind the last. Where the
    architecture's norms do not commute with a rotation, the report says why, and nothing is rotated by this step.
    """

    kind: ClassVar[Kind] = Kind.ROTATE

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset()

    def ticks(self, windows: int, linears: int) -> int:
        return 0

    def rotation(self, width: int, seed: int) -> Seeded:
        """That of a stream of so many channels, by the recipe's seed."""
        return RandomHadamard(seed_of(seed, "residual", "") >> 31, width)  # of 32 bits: every reader of JSON holds it

    def run(self, state: BlockState) -> None:
        if not state.context.rotated:
            state.note(
                f"the residual stream is not rotated: {state.resolved.residual.fixed or 'another block forbids it'}"
            )


@serializable
@dataclass(frozen=True)
class RotateInputs:
    """Hadamard rotations of every input that a rotated residual stream does not reach (QuaRot, arXiv:2404.00456).

    heads: of what the output projection reads, "folded", each head by itself, into values and projection, where an edge
    carries it; or "all", all heads together at run time. Everything else is rotated at run time, by random signs and a Hadamard
    matrix that are stored as a seed; linears that read one input rotate it alike.
    """

    heads: Literal["folded", "all"] = "folded"
    kind: ClassVar[Kind] = Kind.ROTATE

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset()

    def ticks(self, windows: int, linears: int) -> int:
        return 0

    def run(self, state: BlockState) -> None:
        drafts = state.drafts
        edges = list(self._folded(state.resolved, drafts, {path for path, draft in drafts.items() if draft.pre}))
        for edge in edges:
            assert edge.within is not None
            state.commit(edge, Rotate.hadamard(edge.within, seed_of(state.seed, "heads", edge.name)), Kind.ROTATE)
        for name, readers in self._rotated(state.resolved, drafts, state.context.rotated, edges):
            width = drafts[readers[0]].weight.shape[1]
            for path in readers:
                state.transform(path, RandomHadamard(seed_of(state.seed, "input", name), width))

    def described(
        self, resolved: ResolvedBlock, path: str, columns: int, formats: Iterable[str], rotated: bool
    ) -> tuple[PartDescription, ...]:
        """What the description of the packed linear at ``path`` gains by this step, of those in ``formats``."""
        edges = list(self._folded(resolved, formats, ()))
        runs = any(path in readers for _, readers in self._rotated(resolved, formats, rotated, edges))
        return serialize_transforms.describe("pre", [RandomHadamard(0, columns)]) if runs else ()

    def _folded(
        self, resolved: ResolvedBlock, formats: Iterable[str], transformed: Iterable[str]
    ) -> Iterator[ResolvedEdge]:
        """Edges from values to projections that are to be quantized and do not transform their input themselves yet."""
        wanted = set(formats) - set(transformed)
        for edge in resolved.edges if self.heads == "folded" else ():
            if edge.name == _HEADS and Kind.ROTATE in edge.carries and wanted >= {p.module for p in edge.consumers}:
                yield edge

    @staticmethod
    def _rotated(
        resolved: ResolvedBlock, formats: Iterable[str], rotated: bool, folded: Iterable[ResolvedEdge]
    ) -> Iterator[tuple[str, list[str]]]:
        """Name and readers, those to be quantized, of each input that is rotated at run time."""
        done = {name for edge in folded for name in edge.inputs} | (resolved.residual.inputs if rotated else set())
        chosen = set(formats)
        for shared in resolved.shared_inputs:
            readers = [path for path in shared.readers if path in chosen]
            if readers and shared.name not in done:
                yield shared.name, readers


def residual_step(steps: Iterable[Any], blocks: Iterable[ResolvedResidual]) -> RotateResidual | None:
    """The step that rotates the stream through these blocks, if one does and every block lets it."""
    found = next((step for step in steps if isinstance(step, RotateResidual)), None)
    return None if found is None or any(block.fixed for block in blocks) else found


def seed_of(block: int, side: str, name: str) -> int:
    """63 bits that differ for every block, side and name."""
    return int.from_bytes(hashlib.sha256(f"{block}/{side}/{name}".encode()).digest()[:8], "big") >> 1
