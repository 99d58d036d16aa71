"""The stage Blockwise: a walk over every block once, in order, original weights in and packed weights out.

At no time does it hold more than one block of original weights, three arrays of activations (two streams, and one more
for what a block makes of the original stream), and what a step declared that it needs. A step may look ahead: then the next
original blocks are loaded before their turn, and one more array holds the original stream behind them.
A recipe that needs Fisher information begins with a pass of its own (:mod:`lowbit.stages.fisher`). Two streams run side by side:
``fp``, the original model's hidden states, and ``quant``, those of the blocks quantized so far. A recipe's ``feed`` says
which of them its steps see; the difference of the two is the damage done so far, measured at every block.

A recipe may rotate the residual stream (``RotateResidual``). Then both streams hold it rotated, and every block is folded
as soon as it is loaded: what steps, journal and comparison see is a model like any other.

A finished block is on disk before the next begins. On a repeated run finished blocks are not solved again: they are
read back and both streams pass through them, with the same operations in the same order, so that the rest of the run
(and its bytes) cannot differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lowbit.architectures import attention_modules, attention_spec, quantize_attention
from lowbit.checkpoints.description import ModelDescription, has_unfused_experts
from lowbit.checkpoints.shards import read_shard_header, read_tensor
from lowbit.modules import QuantLinear, cache_calibration, calibrate_cache, kept_weights, unmake_drafts
from lowbit.plan.model_plan import ModelPlan
from lowbit.plan.outside import OutsidePlan
from lowbit.solve import Solution
from lowbit.stages.block_cache import cache_layers, reading_cache
from lowbit.stages.fisher import FisherPass
from lowbit.stages.journal import file_sha256
from lowbit.stages.originals import Originals
from lowbit.stages.record import BlockRecord, install_packed, stored_tensors
from lowbit.stages.stream import Call, CannotStream
from lowbit.stages.streams import Streams
from lowbit.steps import Ahead, BlockIO, BlockState
from lowbit.steps.precision import products
from lowbit.surroundings import return_free_memory


class Elsewhere(Protocol):
    """Who solves blocks beside the walk (:mod:`lowbit.stages.spread`)."""

    def solutions(self, i: int) -> Mapping[str, Solution]:
        """The solutions of block i by path, when they are there; those that are missing the walk finds itself."""
        ...


class Broken(ValueError):
    """A block came out unusable (NaN, Inf): quantizing further would be a waste."""


@dataclass
class Walk(Streams):
    """One run over a model. See the module docstring; :meth:`run` does everything but the last files of a checkpoint.

    Attributes:
        elsewhere: who solves blocks beside the walk; None: nobody.
        records: of the blocks so far.
        fisher: the sensitivities of the blocks, where the recipe needs them.
    """

    elsewhere: Elsewhere | None = None

    def __post_init__(self):
        super().__post_init__()
        self._originals = Originals(self.plan, self.model)
        self.blocks = self._originals.blocks
        self.total = len(self.blocks)
        self.unfused_experts = has_unfused_experts(self.model)
        self.records: list[BlockRecord] = []
        self.fisher: FisherPass | None = None
        self._at, self._ticks, self._expected = 0, 0, 0  # the block at hand: number, done, about how many there will be

    def described(self, packed: OutsidePlan) -> ModelDescription:
        """What the checkpoint of the blocks so far stores, with what is ``packed`` outside of them."""
        layers = {name: layer for record in self.records for name, layer in record.modules.items()}
        return ModelDescription(
            layers={**layers, **packed.layers},
            attention={name: spec for record in self.records for name, spec in record.attention.items()},
            kv_calibration={name: spec for record in self.records for name, spec in record.cache.items()},
            residual=self.plan.residual,
            unfused_experts=self.unfused_experts,
            embeddings=packed.embeddings,
            tied_heads=packed.tied_heads,
        )

    def run(self) -> list[BlockRecord]:
        """Quantizes every block that the journal does not have yet. Raises what steps raise, and Broken."""
        self._check_finished()
        calls = self._calls()
        if calls is not None and self.recipe.needs_fisher:
            self.find_sensitivities(calls)
            if not self.recipe.reads_original:
                self.keep_watched()
        if calls is not None:
            self.turn()
        for i in range(self.total):
            self._at, self._ticks, self._expected = i, 0, self._ticks_of(i)
            call = None if calls is None else calls[i]
            record = self._resume(i, call) if i < len(self.section.finished) else self._quantize(i, calls)
            self.records.append(record)
            self.blocks[i] = nn.Identity()
            return_free_memory()
            self.progress(i + 1, self.total, f"block {i + 1} of {self.total}")
        if self.fisher is not None:
            self.fisher.remove()
        return self.records

    def _calls(self) -> list[Call] | None:
        """:meth:`start`, or None for a walk without windows."""
        try:
            return None if self.ids is None else self.start()
        except CannotStream:
            if not self.drawn:
                raise
            self.ids = None
            return None

    def _check_finished(self) -> None:
        """Forgets finished units from the first one on that is not what this walk writes: the journal was damaged."""
        for i, entry in enumerate(self.section.finished):
            if entry["file"] != self._shard(i) or not self._is_record(i, entry["record"]):
                self.section.forget(i)
                break

    def _is_record(self, i: int, data: dict[str, Any]) -> bool:
        """Whether ``data`` is a record of block i. The unit after the last block, what is outside, has none to check."""
        if i >= self.total:
            return i == self.total
        try:
            record = BlockRecord.from_dict(data)
            return record.name == self.plan.blocks[i].name and record.latents == self._latents_hash(i)
        except (AttributeError, KeyError, TypeError, ValueError):
            return False

    def originals(self) -> Iterator[tuple[BlockState, dict[str, Tensor]]]:
        """Each block as it is before the first step, with its inputs in the original model, and the Fisher information of
        the linears that the recipe quantizes (by path). Quantizes nothing and writes nothing that lasts."""
        calls = self.start(whole=True)
        self.find_sensitivities(calls)
        self.turn()
        assert self.fisher is not None
        for i, call in enumerate(calls):
            self._at, self._ticks, self._expected = i, 0, 3 * len(self.store["fp"])
            block = self._original(i, call).requires_grad_(False)
            yield self._state(i, block, calls), self.fisher.load(i)
            for stream in ("fp", "quant"):  # whichever the recipe's steps are fed with
                self.store[stream].copy_(self.store["next"])
            self.blocks[i] = nn.Identity()

    def find_sensitivities(self, calls: list[Call]) -> None:
        """Fisher information of every block that is still to be quantized, into files."""
        assert self.stream is not None and self.ids is not None
        linears = [list(block.formats) for block in self.plan.blocks]
        self.fisher = FisherPass(
            self.source,
            self.stream,
            calls,
            self.ids[: self.calibrated],
            linears,
            self.store,
            self.journal,
            self.progress,
        )
        self.fisher.run(self.store["fp"][: self.calibrated], range(len(self.section.finished), self.total))

    def _ticks_of(self, i: int) -> int:
        """About how many ticks block i will take: its streams, and what steps say of themselves."""
        if self.ids is None or not self._numbers:
            return sum(step.ticks(0, len(self.plan.blocks[i].formats)) for step in self.recipe.steps)
        streams = ("fp", "quant", *(["packed"] if self.has_packed_stream else []))
        ticks = sum(len(self._numbers[name]) for name in streams)
        if i < len(self.section.finished):
            return ticks
        windows, linears = (
            len(self.seen("quant" if self.recipe.feed == "quant" else "fp")),
            len(self.plan.blocks[i].formats),
        )
        further = len(self._behind_it(i)) * len(self._numbers["ahead"])
        return ticks + further + sum(step.ticks(windows, linears) for step in self.recipe.steps)

    def tick(self, what: str) -> None:
        self._ticks += 1
        part = min(0.99, self._ticks / max(1, self._expected))
        self.progress(self._at + part, self.total, f"block {self._at + 1} of {self.total}: {what}")

    def _original(self, i: int, call: Call | None) -> nn.Module:
        """Block i with its original weights, its linears drafts, in the basis of the stream; the original stream behind it is in
        ``next``."""
        self._originals.load(i, self.rotation)
        if call is not None:
            self.advance(call, self.blocks[i], "fp", "next")
        if self.recipe.scheme.attention is not None:  # from here on, for the steps and for what comes behind them
            for path in attention_modules(self.plan.blocks[i].resolved):
                quantize_attention(self.blocks[i].get_submodule(path), self.recipe.scheme.attention)
        self._originals.narrow(i)
        return self.blocks[i]

    def _behind_it(self, i: int) -> range:
        """Numbers of the blocks to which steps look ahead from block i."""
        return range(i + 1, min(i + 1 + self.recipe.looks_ahead, self.total))

    def _ahead(self, i: int, calls: list[Call]) -> Ahead | None:
        """The original blocks to which steps look ahead from block i, loaded, and the original stream behind them. They stay
        loaded until their turn comes."""
        numbers = self._behind_it(i)
        if not numbers:
            return None
        blocks = [self._originals.load(j, self.rotation).requires_grad_(False) for j in numbers]
        for w in self._numbers["ahead"]:
            self.hidden("ahead", w).copy_(self.hidden("next", w))
        for j, block in zip(numbers, blocks, strict=True):
            self.advance(calls[j], block, "ahead", "ahead")

        def run(hidden: Tensor, first: int) -> Tensor:
            for j, block in zip(numbers, blocks, strict=True):
                hidden = calls[j](block, hidden, first)
            return hidden

        return Ahead(run, self.seen("ahead"))

    def _quantize(self, i: int, calls: list[Call] | None) -> BlockRecord:
        call = None if calls is None else calls[i]
        block = self._original(i, call).requires_grad_(False)
        state = self._state(i, block, calls, None if self.fisher is None else self.fisher.load(i))
        name = state.name
        for other in state.resolved.other_matrices:
            state.note(f"{other} is a matrix that no role covers: it keeps its precision")
        for step in self.recipe.steps:
            step.run(state)
            return_free_memory()
        assert not state.drafts, f"{name}: {list(state.drafts)} left unquantized"
        unmake_drafts(block)
        packed = {f"{name}.{path}": m.description for path, m in block.named_modules() if isinstance(m, QuantLinear)}
        error = None if call is None else self._behind(block, call)
        specs = {f"{name}.{path}": attention_spec(m) for path, m in block.named_modules()}
        attends = {path: spec for path, spec in specs.items() if spec is not None}
        caches = {f"{name}.{path}": cache_calibration(m) for path, m in block.named_modules()}
        found = {path: calibration.spec for path, calibration in caches.items() if calibration is not None}
        if self.recipe.needs_latents:  # before the unit that names its hash
            self.journal.save(_latents_file(i), {f"{name}.{path}": w_OI for path, w_OI in state.latents.items()})
        latents = self._latents_hash(i)
        record = BlockRecord(name, error, state.records, state.notes, packed, attends, found, latents)
        self.section.write(self._shard(i), stored_tensors(block, name, self.plan.kept), record.to_dict())
        return record

    def _state(
        self, i: int, block: nn.Module, calls: list[Call] | None, fisher: dict[str, Tensor] | None = None
    ) -> BlockState:
        io = None
        if calls is not None:
            x, fp, y = (self.seen(name) for name in (self.recipe.feed, "fp", "next"))
            paired = len(fp) == len(x)
            fast = partial(products, x.device, self.recipe.compute)
            io = BlockIO(
                x,
                y if paired else None,
                calls[i],
                fp if paired else None,
                by_window=True,
                products=fast,
                ahead=self._ahead(i, calls),
            )
        solved = {} if self.elsewhere is None else self.elsewhere.solutions(i)
        own = self.plan.blocks[i]
        given = {path: self.given[name] for path in own.formats if (name := f"{own.name}.{path}") in self.given}
        turned = self.rotations.of_block(own.name)
        return block_state(
            self.plan, i, block, io, fisher, tick=self.tick, solved=solved, given=given, rotations=turned
        )

    def _resume(self, i: int, call: Call | None) -> BlockRecord:
        entry = self.section.finished[i]
        record = BlockRecord.from_dict(entry["record"])
        if call is None:
            return record
        block = self._original(i, call)
        unmake_drafts(block)
        tensors = self.section.tensors(i, f"{record.name}.")
        for path, spec in record.attention.items():
            quantize_attention(block.get_submodule(path.removeprefix(f"{record.name}.")), spec)
        for path, calibration in record.cache.items():
            calibrate_cache(block.get_submodule(path.removeprefix(f"{record.name}.")), calibration)
        install_packed(block, record.name, record.modules, tensors)
        self._behind(block, call)
        return record

    def _behind(self, block: nn.Module, call: Call) -> float:
        """Moves all streams behind the block; returns the relative squared difference of the two on the watched windows. Where
        blocks learn with a quantized cache, the quantized streams pass through it, so that the next block learns with its errors."""
        caches = cache_layers(self.plan, self._at, block) if self.recipe.simulates_cache else {}
        with kept_weights(block, self.store["quant"].shape[1]), reading_cache(block, caches):
            self.advance(call, block, "quant", "quant")
            if self.has_packed_stream:
                self.advance(call, block, "packed", "packed")
        self.store["fp"].copy_(self.store["next"])
        lost = kept = 0.0
        for w in self.watched:
            original = self.hidden("fp", w).double()
            lost += (self.hidden("quant", w) - original).square().sum().item()
            kept += original.square().sum().item()
        error = lost / kept if kept else lost
        if not error < float("inf"):
            raise Broken(f"{self.plan.blocks[len(self.records)].name}: hidden states behind it are NaN or Inf")
        return error

    def latents(self) -> dict[str, Tensor]:
        """What the codes of all packed linears in the blocks were rounded from, ``[O, I]`` float32, by name."""
        return read_latents(self.journal.directory, self.total)

    def _latents_hash(self, i: int) -> str:
        """Of the file of block i; empty where the recipe needs none, or it is not there."""
        path = self.journal.directory / _latents_file(i)
        return file_sha256(path) if self.recipe.needs_latents and path.is_file() else ""

    def _shard(self, i: int) -> str:
        return self.section.unit_name(i, self.total + 1)


def block_state(
    plan: ModelPlan,
    i: int,
    block: nn.Module,
    io: BlockIO | None = None,
    fisher: dict[str, Tensor] | None = None,
    **context: Any,
) -> BlockState:
    """The state of block i before the first step of the plan's recipe; ``context``: further fields of its context."""
    own, recipe = plan.blocks[i], plan.recipe
    return BlockState.of(
        own.name,
        block,
        own.resolved,
        dict(own.formats),
        io,
        fisher,
        seed=derived_seed(recipe.seed, i),
        store_dtype=plan.kept.dtype,
        dtypes={key: plan.kept.dtype_of(f"{own.name}.{key}") for key in own.module.state_dict()},
        rotated=plan.rotation is not None,
        reads_inputs=recipe.reads_inputs,
        caches=cache_layers(plan, i, block),
        keeps_latents=recipe.needs_latents,
        **context,
    )


def derived_seed(seed: int, block: int) -> int:
    """A seed for one block, independent of which blocks ran before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{block}".encode()).digest()[:4], "big")


def _latents_file(i: int) -> str:
    return f"latents-{i + 1:05d}.safetensors"


def read_latents(directory: Path, blocks: int) -> dict[str, Tensor]:
    """What the codes of all packed linears in the blocks were rounded from, ``[O, I]`` float32, by name."""
    headers = [read_shard_header(directory / _latents_file(i)) for i in range(blocks)]
    return {name: read_tensor(header) for block in headers for name, header in block.items()}
