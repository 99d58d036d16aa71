"""The hidden states of a model's windows before and behind the block at hand: what Blockwise passes from block to block.

Shapes: T token, d channel of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.architectures import IMPLEMENTATION
from lowbit.modules import StoredRotation, turned
from lowbit.parallel import each
from lowbit.plan.model_plan import ModelPlan
from lowbit.plan.outside import OutsidePlan
from lowbit.plan.streams import MEASURED, stream_windows, watched_windows
from lowbit.progress import Progress, silent
from lowbit.stages.journal import Journal
from lowbit.stages.outside import narrowed_outside, pack_outside, replaced
from lowbit.stages.store import ActivationStore
from lowbit.stages.stream import Call, Stream, outside
from lowbit.steps.precision import products
from lowbit.training import LearnedRotations
from lowbit.transforms import Rotate, Seeded


@dataclass
class Streams:
    """Up to five arrays of hidden states, each of the windows that something reads (:func:`stream_windows` names them).

    Args:
        plan: the model and the recipe, checked.
        ids: calibration windows ``[N, T]``, or None for a recipe that needs none.
        ram_limit: bytes of activations kept in memory; beyond it they live in memory-mapped files in ``scratch``.
        drawn: ``ids`` are no text but tokens to compare by; a model whose blocks cannot run one at a time goes without.
        held_out: the number of windows at the end of ``ids`` that no step sees: the result is measured on them.
        given: squares of the inputs of linears (:class:`~lowbit.numerics.SquareSum`) that were gathered elsewhere, by name; they
            count instead of those of ``ids``.
        learned: the rotations that a stage before has learned, set before blocks are loaded; None: none has.
    """

    plan: ModelPlan
    ids: Tensor | None
    journal: Journal
    ram_limit: int = 2**32
    scratch: Path | None = None
    progress: Progress = silent
    drawn: bool = False
    held_out: int = 0
    given: Mapping[str, Tensor] = field(default_factory=dict)
    learned: LearnedRotations | None = None

    def __post_init__(self):
        self.source, self.recipe, self.architecture = self.plan.source, self.plan.recipe, self.plan.architecture
        attends = None if self.recipe.scheme.attention is None else IMPLEMENTATION
        self.model: PreTrainedModel = self.source.skeleton(unfuse=True, attn_implementation=attends)
        self.section = self.journal.section(self.recipe.walk_number)
        self.store = ActivationStore(self.ram_limit, self.scratch or self.journal.directory / "scratch")
        self.stream: Stream | None = None
        self._numbers: dict[str, range] = {}  # the windows of each array

    @property
    def rotation(self) -> Seeded | Rotate | None:
        """The rotation of the residual stream; None: it is not rotated. Raises as :attr:`rotations`."""
        planned = self.plan.rotation
        if not isinstance(planned, StoredRotation):
            return planned
        assert self.rotations.residual is not None
        return Rotate(self.rotations.residual)

    @property
    def rotations(self) -> LearnedRotations:
        """What a stage before has learned.

        Raises:
            ValueError: the recipe applies learned rotations, and none were learned.
        """
        if self.learned is None and self.recipe.reads_rotations:
            raise ValueError(
                f"recipe {self.recipe.name!r} learns its rotations in a whole run alone; use lowbit quantize, or a recipe with "
                "rotations that are drawn"
            )
        return self.learned or LearnedRotations()

    @property
    def calibrated(self) -> int:
        """Windows that steps see."""
        return 0 if self.ids is None else len(self.ids) - self.held_out

    @property
    def watched(self) -> range:
        """Windows that the result is measured on."""
        return range(0) if self.ids is None else watched_windows(self.calibrated, self.held_out, self.ids.shape[1])

    @property
    def measured(self) -> slice:
        """Positions of each watched window at which logits are compared: evenly spaced, from the middle of the first gap.

        Logits cost more than a block.
        """
        tokens = 0 if self.ids is None else len(self.watched) * self.ids.shape[1]
        stride = min(4, max(1, tokens // MEASURED))
        return slice(stride // 2, None, stride)

    @property
    def has_packed_stream(self) -> bool:
        """Whether a third stream, ``packed``, begins at the packed embedding. The finished model's logits come from it."""
        return bool(self.plan.outside.embeddings)

    def start(self, *, whole: bool = False) -> list[Call]:
        """Fills both streams with the first block's inputs; returns every block's arguments.

        A stream has the windows that something reads: all of them, or those that the result is measured on. ``whole``: all.
        """
        assert self.ids is not None
        self._numbers = stream_windows(
            self.recipe,
            self.calibrated,
            self.held_out,
            self.ids.shape[1],
            original=whole or self.recipe.needs_fisher,
        )
        if whole:
            self._numbers["quant"] = self._numbers["fp"]
        self.stream = Stream(self.model, self.architecture)

        def take(w: int, hidden: Tensor) -> None:
            if w == 0:
                for name in ("fp", "quant", "next", *(["ahead"] if self._numbers["ahead"] else [])):
                    self.store.allocate(name, (len(self._numbers[name]), *hidden.shape[1:]), torch.float32)
            for name in ("fp", "quant"):
                if w in self._numbers[name]:
                    self.hidden(name, w).copy_(hidden)

        entered = self.ids[: max(numbers.stop for numbers in self._numbers.values())]
        calls = self.stream.enter_windows(self.source, entered, take, self.store.keep)
        if self.plan.kept.narrows:
            self._enter_again("quant", OutsidePlan())
        if self.has_packed_stream:  # steps do not see it: blocks do not depend on how the embedding is packed
            first = self.hidden("quant", self.watched.start)
            self.store.allocate("packed", (len(self.watched), *first.shape[1:]), torch.float32)
            self._enter_again("packed", OutsidePlan(self.plan.outside.embeddings))
        return calls

    def hidden(self, name: str, w: int) -> Tensor:
        """Window w of the stream ``name``, ``[1, T, d]``: a view."""
        i = self._numbers[name].index(w)
        return self.store[name][i : i + 1]

    def seen(self, name: str) -> Tensor:
        """The windows of a stream that steps may see, ``[N, T, d]``."""
        numbers = self._numbers[name]
        return self.store[name][: max(0, min(numbers.stop, self.calibrated) - numbers.start)]

    def _enter_again(self, stream: str, packed: OutsidePlan) -> None:
        """Fills a stream as a finished model begins that has ``packed`` embeddings and keeps other tensors as planned."""
        assert self.stream is not None and self.ids is not None
        names = outside(self.model, self.architecture, only_base=True)
        self.source.load(self.model, names)
        with replaced(self.model, pack_outside(self.model, packed), self.narrowed(packed)):
            for w in self._numbers[stream]:
                hidden, _ = self.stream.enter(self.ids[w : w + 1])
                self.hidden(stream, w).copy_(hidden)
        self.source.release_tensors(self.model, names)

    def narrowed(self, packed: OutsidePlan) -> dict[str, Tensor]:
        """Tensors outside the blocks that are loaded, not in ``packed``, and stored in a narrower dtype: as stored."""
        return narrowed_outside(self.model, self.kept_outside(packed), self.plan.kept)

    def kept_outside(self, packed: OutsidePlan) -> list[str]:
        """Tensors outside the blocks that are not in ``packed``."""
        modules = {*packed.stored, *packed.tied_heads}
        return [key for key in outside(self.model, self.architecture) if key.rpartition(".")[0] not in modules]

    def keep_watched(self) -> None:
        """Keeps of the original stream what the result is measured on, where only Fisher information needed the rest."""
        for name in ("fp", "next"):
            kept = self.store[name][self.watched.start : self.watched.stop].clone()
            self.store.free(name)
            self.store.allocate(name, kept.shape, kept.dtype).copy_(kept)
            self._numbers[name] = self.watched

    def turn(self) -> None:
        """All streams, as the first block was to read them, rotated."""
        if self.rotation is None:
            return
        for name in ("fp", "quant", *(["packed"] if self.has_packed_stream else [])):
            for w in self._numbers[name]:
                self.hidden(name, w).copy_(turned(self.hidden(name, w), self.rotation))

    @torch.no_grad()
    def advance(self, call: Call, block: nn.Module, source: str, target: str) -> None:
        """Runs ``block`` on the windows of a stream; its outputs are those of ``target``."""
        numbers, device = self._numbers[source], self.store[source].device

        def run(i: int) -> None:
            w = numbers[i]  # the windows that are measured on are exact, whatever is fast
            with products(device, "float32" if w in self.watched else self.recipe.compute):
                self.hidden(target, w).copy_(call(block, self.hidden(source, w), w))

        each(len(numbers), run, lambda: self.tick("running"))

    def tick(self, what: str) -> None:
        """One window, or another piece of ``what`` a step does, is done."""

    def logits_of(self, ids_1T: Tensor, hidden_1Td: Tensor) -> Tensor:
        """Logits ``[T, V]`` of one window from a stream behind the last block; what is outside the blocks must be loaded."""
        assert self.stream is not None
        if self.rotation is not None:
            hidden_1Td = turned(hidden_1Td, self.rotation.inverse())
        return self.stream.logits(ids_1T, hidden_1Td)

    def close(self) -> None:
        self.store.close()
