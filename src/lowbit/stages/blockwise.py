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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.architectures import (
    IMPLEMENTATION,
    attention_modules,
    attention_spec,
    block_modules,
    quantize_attention,
    rotate_residual,
    simulated_layers,
)
from lowbit.caches import PackedCache, PackedLayer, calibrated_coordinates
from lowbit.checkpoints.description import ModelDescription, has_unfused_experts
from lowbit.checkpoints.shards import read_shard_header, read_tensor
from lowbit.decoding.packed_cache import key_biases, rules_for_biases
from lowbit.modules import (
    QuantLinear,
    cache_calibration,
    calibrate_cache,
    kept_weights,
    make_drafts,
    turned,
    unmake_drafts,
)
from lowbit.numerics import narrowed
from lowbit.numerics.divergence import kl_and_agreement
from lowbit.parallel import each
from lowbit.plan.model_plan import ModelPlan
from lowbit.plan.outside import OutsidePlan
from lowbit.plan.streams import MEASURED, stream_windows, watched_windows
from lowbit.progress import Progress, silent
from lowbit.stages.fisher import FisherPass
from lowbit.stages.journal import Journal, file_sha256
from lowbit.stages.outside import narrowed_outside, pack_outside, replaced
from lowbit.stages.record import BlockRecord, as_stored, install_packed
from lowbit.stages.store import ActivationStore
from lowbit.stages.stream import Call, CannotStream, Stream, outside
from lowbit.steps import Ahead, BlockIO, BlockState
from lowbit.steps.precision import products
from lowbit.surroundings import return_free_memory
from lowbit.transforms import Seeded

_COST_STRIDE = 2
"""What a packed embedding costs is measured at every position of this number: a mean, whose limit is twice what is usual."""


class Broken(ValueError):
    """A block came out unusable (NaN, Inf): quantizing further would be a waste."""


@dataclass
class Walk:
    """One run over a model. See the module docstring; :meth:`run` does everything but the last files of a checkpoint.

    Args:
        plan: the model and the recipe, checked.
        ids: calibration windows ``[N, T]``, or None for a recipe that needs none.
        ram_limit: bytes of activations kept in memory; beyond it they live in memory-mapped files in ``scratch``.
        drawn: ``ids`` are no text but tokens to compare by; a model whose blocks cannot run one at a time goes without.
        held_out: the number of windows at the end of ``ids`` that no step sees: the result is measured on them.
    """

    plan: ModelPlan
    ids: Tensor | None
    journal: Journal
    ram_limit: int = 2**32
    scratch: Path | None = None
    progress: Progress = silent
    drawn: bool = False
    held_out: int = 0

    def __post_init__(self):
        self.source, self.recipe, self.architecture = self.plan.source, self.plan.recipe, self.plan.architecture
        attends = None if self.recipe.scheme.attention is None else IMPLEMENTATION
        self.model: PreTrainedModel = self.source.skeleton(unfuse=True, attn_implementation=attends)
        self.section = self.journal.section(0)  # Blockwise comes first
        self.blocks = block_modules(self.model, self.architecture)
        self.total = len(self.blocks)
        self.rotation = self.plan.rotation
        self.unfused_experts = has_unfused_experts(self.model)
        self.store = ActivationStore(self.ram_limit, self.scratch or self.journal.directory / "scratch")
        self.records: list[BlockRecord] = []
        self.stream: Stream | None = None
        self.fisher: FisherPass | None = None
        self._numbers: dict[str, range] = {}  # the windows of each array of activations
        self._loaded: set[int] = set()  # blocks that have their original weights
        self.packs_outside = False
        self._outside: dict[str, nn.Module] = {}
        self.outside_cost: float | None = None
        self._at, self._ticks, self._expected = 0, 0, 0  # the block at hand: number, done, about how many there will be

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
    def packed_outside(self) -> OutsidePlan:
        """What is packed outside of the blocks: all of the plan's, or nothing, as :meth:`settle_outside` decided."""
        return self.plan.outside if self.packs_outside else OutsidePlan()

    @property
    def description(self) -> ModelDescription:
        """What the checkpoint of the blocks so far stores."""
        packed = self.packed_outside
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

    # Streams

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

    def _enter_again(self, stream: str, packed: OutsidePlan) -> None:
        """Fills a stream as a finished model begins that has ``packed`` embeddings and keeps other tensors as planned."""
        assert self.stream is not None and self.ids is not None
        names = outside(self.model, self.architecture, only_base=True)
        self.source.load(self.model, names)
        with replaced(self.model, pack_outside(self.model, packed), self._narrowed(packed)):
            for w in self._numbers[stream]:
                hidden, _ = self.stream.enter(self.ids[w : w + 1])
                self.hidden(stream, w).copy_(hidden)
        self.source.release_tensors(self.model, names)

    def _narrowed(self, packed: OutsidePlan) -> dict[str, Tensor]:
        """Tensors outside the blocks that are loaded, not in ``packed``, and stored in a narrower dtype: as stored."""
        return narrowed_outside(self.model, self._kept_outside(packed), self.plan.kept)

    def _kept_outside(self, packed: OutsidePlan) -> list[str]:
        """Tensors outside the blocks that are not in ``packed``."""
        modules = {*packed.stored, *packed.tied_heads}
        return [key for key in outside(self.model, self.architecture) if key.rpartition(".")[0] not in modules]

    def _keep_watched(self) -> None:
        """Keeps of the original stream what the result is measured on, where only Fisher information needed the rest."""
        for name in ("fp", "next"):
            kept = self.store[name][self.watched.start : self.watched.stop].clone()
            self.store.free(name)
            self.store.allocate(name, kept.shape, kept.dtype).copy_(kept)
            self._numbers[name] = self.watched

    def _turn_streams(self) -> None:
        """All streams, as the first block was to read them, rotated."""
        if self.rotation is None:
            return
        for name in ("fp", "quant", *(["packed"] if self.has_packed_stream else [])):
            for w in self._numbers[name]:
                self.hidden(name, w).copy_(turned(self.hidden(name, w), self.rotation))

    @torch.no_grad()
    def _advance(self, call: Call, block: nn.Module, source: str, target: str) -> None:
        """Runs ``block`` on the windows of a stream; its outputs are those of ``target``."""
        numbers, device = self._numbers[source], self.store[source].device

        def run(i: int) -> None:
            w = numbers[i]  # the windows that are measured on are exact, whatever is fast
            with products(device, "float32" if w in self.watched else self.recipe.compute):
                self.hidden(target, w).copy_(call(block, self.hidden(source, w), w))

        each(len(numbers), run, lambda: self._tick("running"))

    # Blocks

    def run(self) -> list[BlockRecord]:
        """Quantizes every block that the journal does not have yet. Raises what steps raise, and Broken."""
        self._check_finished()
        calls = self._calls()
        if calls is not None and self.recipe.needs_fisher:
            self.find_sensitivities(calls)
            if not self.recipe.reads_original:
                self._keep_watched()
        if calls is not None:
            self._turn_streams()
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
        self._turn_streams()
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
            len(self._seen("quant" if self.recipe.feed == "quant" else "fp")),
            len(self.plan.blocks[i].formats),
        )
        further = len(self._behind_it(i)) * len(self._numbers["ahead"])
        return ticks + further + sum(step.ticks(windows, linears) for step in self.recipe.steps)

    def _tick(self, what: str) -> None:
        self._ticks += 1
        part = min(0.99, self._ticks / max(1, self._expected))
        self.progress(self._at + part, self.total, f"block {self._at + 1} of {self.total}: {what}")

    def _original(self, i: int, call: Call | None) -> nn.Module:
        """Block i with its original weights, its linears drafts, in the basis of the stream; the original stream behind it is in
        ``next``."""
        self._load(i)
        if call is not None:
            self._advance(call, self.blocks[i], "fp", "next")
        if self.recipe.scheme.attention is not None:  # from here on, for the steps and for what comes behind them
            for path in attention_modules(self.plan.blocks[i].resolved):
                quantize_attention(self.blocks[i].get_submodule(path), self.recipe.scheme.attention)
        self._narrow(i)
        return self.blocks[i]

    def _load(self, i: int) -> nn.Module:
        """Block i with its original weights, its linears drafts, in the basis of the stream; at once if it is loaded already."""
        if i not in self._loaded:
            self.source.load_into(self.model, self.plan.blocks[i].name)
            make_drafts(self.blocks[i], self.plan.blocks[i].resolved.linears)
            if self.rotation is not None:
                self._fold(i, self.rotation)
            self._loaded.add(i)
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
        blocks = [self._load(j).requires_grad_(False) for j in numbers]
        for w in self._numbers["ahead"]:
            self.hidden("ahead", w).copy_(self.hidden("next", w))
        for j, block in zip(numbers, blocks, strict=True):
            self._advance(calls[j], block, "ahead", "ahead")

        def run(hidden: Tensor, first: int) -> Tensor:
            for j, block in zip(numbers, blocks, strict=True):
                hidden = calls[j](block, hidden, first)
            return hidden

        return Ahead(run, self._seen("ahead"))

    @torch.no_grad()
    def _narrow(self, i: int) -> None:
        """Rounds what stays unquantized as it will be stored, so that steps and streams see it."""
        plan, kept = self.plan.blocks[i], self.plan.kept
        packed = {f"{path}.weight" for path in plan.formats}
        state = self.blocks[i].state_dict() if kept.narrows else {}
        for key, value in state.items():
            if key not in packed and value.is_floating_point():
                value.copy_(narrowed(f"{plan.name}.{key}", value, kept.dtype_of(f"{plan.name}.{key}")))

    def _fold(self, i: int, rotation: Seeded) -> None:
        """Rotates the residual stream of block i. What stays unquantized is rounded to the dtype that it had."""
        plan = self.plan.blocks[i]
        packed = {f"{path}.weight" for path in plan.formats}
        parameters = dict(self.blocks[i].named_parameters())
        with torch.no_grad():
            for key, value in rotate_residual(plan.resolved.residual, rotation, parameters).items():
                stored = self.source.dtype_of(f"{plan.name}.{key}")
                parameters[key].copy_(value if key in packed else value.to(stored))

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
        self.section.write(self._shard(i), self._tensors(block, name), record.to_dict())
        return record

    def _state(
        self, i: int, block: nn.Module, calls: list[Call] | None, fisher: dict[str, Tensor] | None = None
    ) -> BlockState:
        plan, io = self.plan.blocks[i], None
        if calls is not None:
            x, fp, y = (self._seen(name) for name in (self.recipe.feed, "fp", "next"))
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
        return BlockState.of(
            plan.name,
            block,
            plan.resolved,
            dict(plan.formats),
            io,
            fisher,
            seed=derived_seed(self.recipe.seed, i),
            store_dtype=self.plan.kept.dtype,
            dtypes={key: self.plan.kept.dtype_of(f"{plan.name}.{key}") for key in plan.module.state_dict()},
            tick=self._tick,
            rotated=self.rotation is not None,
            reads_inputs=self.recipe.reads_inputs,
            caches=self._caches(i, block),
            keeps_latents=self.recipe.needs_latents,
        )

    def _caches(self, i: int, block: nn.Module) -> dict[str, PackedLayer]:
        """Empty layers of the cache of block i, by path of its attention module, in formats that fit its keys."""
        formats, config = self.recipe.scheme.cache, self.source.config
        if not formats:
            return {}
        name = self.plan.blocks[i].name
        named = {j: key for j, key in key_biases(config).items() if key.startswith(f"{name}.")}
        parameters = dict(block.named_parameters())
        biases = {j: parameters.get(key.removeprefix(f"{name}.")) for j, key in named.items()}
        rules = rules_for_biases(config, biases, formats.kv, formats.overrides)
        layers = PackedCache(config, formats.kv, (*formats.overrides, *rules)).packed_layers
        numbers = {
            path: getattr(block.get_submodule(path), "layer_idx", None)
            for path in attention_modules(self.plan.blocks[i].resolved)
        }
        return {path: layers[j] for path, j in numbers.items() if j in layers and layers[j].packs}

    def _seen(self, name: str) -> Tensor:
        """The windows of a stream that steps may see, ``[N, T, d]``."""
        numbers = self._numbers[name]
        return self.store[name][: max(0, min(numbers.stop, self.calibrated) - numbers.start)]

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

    @contextmanager
    def _reading_cache(self, block: nn.Module) -> Iterator[None]:
        """While open, the block at hand attends as if each token were decoded from the cache that its steps have read."""
        caches = self._caches(self._at, block) if self.recipe.simulates_cache else {}
        if not caches:
            yield
            return
        layers: dict[int, PackedLayer] = {}
        for path, layer in caches.items():
            module: Any = block.get_submodule(path)
            found = cache_calibration(module)
            coordinates = (None, None) if found is None else calibrated_coordinates(layer.spec, found)
            layers[module.layer_idx] = layer.with_coordinates(*coordinates)
        with simulated_layers(block, layers):
            yield

    def _behind(self, block: nn.Module, call: Call) -> float:
        """Moves all streams behind the block; returns the relative squared difference of the two on the watched windows. Where
        blocks learn with a quantized cache, the quantized streams pass through it, so that the next block learns with its errors."""
        with kept_weights(block, self.store["quant"].shape[1]), self._reading_cache(block):
            self._advance(call, block, "quant", "quant")
            if self.has_packed_stream:
                self._advance(call, block, "packed", "packed")
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

    def _tensors(self, block: nn.Module, name: str) -> dict[str, Tensor]:
        """What the block stores: packed buffers as they are, everything else in the dtype that it is kept in."""
        packed = as_stored(block)

        def stored(key: str, value: Tensor) -> Tensor:
            if key.rpartition(".")[0] in packed or not value.is_floating_point():
                return value
            return narrowed(f"{name}.{key}", value, self.plan.kept.dtype_of(f"{name}.{key}"))

        return {f"{name}.{key}": stored(key, value.detach()) for key, value in block.state_dict().items()}

    def latents(self) -> dict[str, Tensor]:
        """What the codes of all packed linears in the blocks were rounded from, ``[O, I]`` float32, by name."""
        return read_latents(self.journal.directory, self.total)

    def _latents_hash(self, i: int) -> str:
        """Of the file of block i; empty where the recipe needs none, or it is not there."""
        path = self.journal.directory / _latents_file(i)
        return file_sha256(path) if self.recipe.needs_latents and path.is_file() else ""

    def _shard(self, i: int) -> str:
        return self.section.unit_name(i, self.total + 1)

    # After the last block

    def settle_outside(self) -> None:
        """Decides whether the embedding and the head are packed: not if that costs more than the recipe's limit."""
        plan = self.plan.outside
        if len(self.section.finished) > self.total:
            record = self.section.finished[self.total]["record"]
            self.packs_outside, self.outside_cost = bool(record.get("packs_outside")), record.get("outside_cost")
            return
        self.packs_outside = bool(plan)
        if plan and self.ids is not None:
            self.outside_cost = self._cost_of_outside()
            self.packs_outside = plan.limit is None or self.outside_cost < plan.limit

    def _cost_of_outside(self) -> float:
        """Nats a token by which the packed embedding and head move the quantized model.

        Measured from the quantized model, not as a difference of two distances from the original: errors of blocks and of
        embeddings are independent, and their chance products are larger than what is measured.
        """
        assert self.stream is not None and self.ids is not None
        cost = 0.0
        with self.stream.loaded_outside(self.source):
            modules, rest = self._pack_outside(), self._narrowed(self.plan.outside)
            unpacked = self._narrowed(OutsidePlan())
            for w in self.watched:
                ids = self.ids[w : w + 1, ::_COST_STRIDE]
                plain = self.hidden("quant", w)[:, ::_COST_STRIDE]
                packed = self.hidden("packed", w)[:, ::_COST_STRIDE] if self.has_packed_stream else plain
                with replaced(self.model, {}, unpacked):
                    before = self.logits_of(ids, plain)
                with replaced(self.model, modules, rest):
                    kl_T, _ = kl_and_agreement(before, self.logits_of(ids, packed))
                    cost += kl_T.mean().item()
        return cost / len(self.watched)

    def _pack_outside(self) -> dict[str, nn.Module]:
        """What the plan packs outside of the blocks, packed once; its weights must be loaded the first time."""
        if not self._outside:
            self._outside = pack_outside(self.model, self.plan.outside)
        return self._outside

    def write_rest(self) -> None:
        """Stores everything outside the blocks, packed as :meth:`settle_outside` decided or as it was."""
        if len(self.section.finished) > self.total:
            return
        packed = self.packed_outside
        tied = set(self.model.all_tied_weights_keys)
        plain = [key for key in self._kept_outside(packed) if key not in tied]
        self.source.load(self.model, plain, dtype=None)
        state = self.model.state_dict()
        tensors = {key: narrowed(key, state[key], self.plan.kept.dtype_of(key)) for key in plain}
        if packed and not self._outside:
            for name in packed.stored:
                self.source.load_into(self.model, name)
        for name, module in (self._pack_outside() if packed else {}).items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        record = {"packs_outside": self.packs_outside, "outside_cost": self.outside_cost} if self.plan.outside else {}
        self.section.write(self._shard(self.total), tensors, record)
        self.source.release_tensors(self.model, outside(self.model, self.architecture))

    def logits(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``(ids [T], original logits [M, V], quantized logits [M, V])`` of the windows :attr:`watched`, at the positions
        :attr:`measured`."""
        assert self.stream is not None and self.ids is not None
        stream = "packed" if self.packs_outside and self.has_packed_stream else "quant"
        with self.stream.loaded_outside(self.source):
            modules = self._pack_outside() if self.packs_outside else {}
            rest = self._narrowed(self.packed_outside)
            for w in self.watched:
                ids, at = self.ids[w : w + 1], self.measured
                original = self.logits_of(ids[:, at], self.hidden("fp", w)[:, at])
                with replaced(self.model, modules, rest):
                    quantized = self.logits_of(ids[:, at], self.hidden(stream, w)[:, at])
                yield ids[0], original, quantized

    def logits_of(self, ids_1T: Tensor, hidden_1Td: Tensor) -> Tensor:
        """Logits ``[T, V]`` of one window from a stream behind the last block; what is outside the blocks must be loaded."""
        assert self.stream is not None
        if self.rotation is not None:
            hidden_1Td = turned(hidden_1Td, self.rotation.inverse())
        return self.stream.logits(ids_1T, hidden_1Td)

    def close(self) -> None:
        self.store.close()


def derived_seed(seed: int, block: int) -> int:
    """A seed for one block, independent of which blocks ran before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{block}".encode()).digest()[:4], "big")


def _latents_file(i: int) -> str:
    return f"latents-{i + 1:05d}.safetensors"


def read_latents(directory: Path, blocks: int) -> dict[str, Tensor]:
    """What the codes of all packed linears in the blocks were rounded from, ``[O, I]`` float32, by name."""
    headers = [read_shard_header(directory / _latents_file(i)) for i in range(blocks)]
    return {name: read_tensor(header) for block in headers for name, header in block.items()}
