"""Ways to quantize a model that were measured, with the sizes that they have in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import torch

from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.source import ModelSource
from lowbit.modules import KVFormats
from lowbit.plan import Plan, plan
from lowbit.plan.cache import cache_bytes, calibration_bytes
from lowbit.progress import Progress
from lowbit.recipes import kv_recipe
from lowbit.reporting.comparisons import front
from lowbit.reporting.measured import Measured, MeasuredCache, MeasuredRow

ENGINES: dict[str, tuple[str, ...]] = {
    "lowbit": ("native",),
    "vllm": ("compressed-tensors",),
    "llama.cpp": ("gguf:q8_0", "gguf:q6_k", "gguf:q5_k_m", "gguf:q4_k_m", "gguf:q3_k_m", "gguf:q2_k"),
}
"""The file formats that each engine is given, those that lose least first."""


@dataclass(frozen=True)
class Choice:
    """One way to quantize the model.

    Attributes:
        row: the measurement it stands on.
        file_format: of the result.
        cache: how keys and values are held; None: as the model computes them.
        weight_bytes, cache_bytes: what they take in the model at hand.
        quantizing_bytes: of memory while quantizing, an estimate.
    """

    row: MeasuredRow
    file_format: str
    cache: MeasuredCache | None
    weight_bytes: int
    cache_bytes: int
    quantizing_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    @property
    def loss(self) -> float:
        """Nats a token, as measured."""
        return loss_of(self.row, self.cache)

    @property
    def bound(self) -> bool:
        """Whether more was rounded where it was measured, so that the loss is an upper bound."""
        bits = preset_bits(self.file_format)
        return bits > self.row.asked or (bits > 0 and self.row.quantizes_inputs)


@dataclass(eq=False)
class Search:
    """Choices for one model and engine: with fewer bits in a preset's name, then by growing loss. Each way to quantize weights is
    planned once, when its turn comes; of a preset only the best that the format can hold, because all have its size."""

    source: ModelSource
    model: str | PathLike[str]
    engine: str
    tokens: int
    rows: Sequence[MeasuredRow]
    known: Measured
    progress: Progress

    def __post_init__(self) -> None:
        self.plans: dict[tuple[str, str], Plan | None] = {}
        self.reasons: list[str] = []
        self.unable: set[str] = set()  # rows that no preset can hold
        half = self.engine != "lowbit" and self.source.dtype.itemsize > 2
        self.dtype = (
            torch.float16 if half else self.source.dtype
        )  # other engines hold float32 models' caches in 16 bits

    def choices(self) -> Iterator[Choice]:
        ways = [(row, file_format) for file_format in ENGINES[self.engine] for row in self._rows(file_format)]
        pairs = [(row, file_format, each) for row, file_format in ways for each in self.caches]
        pairs.sort(key=lambda pair: (-preset_bits(pair[1]), loss_of(pair[0], pair[2]), pair[2] is not None))
        done: dict[str, str] = {}
        for row, file_format, cache in pairs:
            preset = ":" in file_format
            if preset and (done.get(file_format, row.label) != row.label or row.label in self.unable):
                continue
            planned = self._plan(row, file_format, len(ways))
            if planned is None:
                self.unable |= {row.label} if preset else set()
                continue
            done[file_format] = row.label
            held = self.cache_bytes(cache, self.tokens)
            yield Choice(row, file_format, cache, planned.bytes_out, held, planned.peak_ram_bytes)

    def _rows(self, file_format: str) -> Sequence[MeasuredRow]:
        """The rows that a result in ``file_format`` can stand on."""
        if file_format == "native":  # holds them all: those that others beat in size and loss are never the best
            return [self.rows[i] for i in front([(row.bits, max(0.0, row.loss)) for row in self.rows])]
        if bits := preset_bits(file_format):  # with fewer bits than the preset's, a row bounds its loss
            return [row for row in self.rows if row.method is not None and row.asked <= bits]
        return self.rows

    @cached_property
    def caches(self) -> Sequence[MeasuredCache | None]:
        """Ways to hold keys and values that the engine and the model can have."""
        if self.engine != "lowbit":
            return (None,)
        known = self.known.caches
        found: list[MeasuredCache | None] = [None]
        for i in front([(each.bits, max(0.0, each.loss)) for each in known]):
            try:
                self.cache_bytes(known[i], self.tokens)
            except ValueError as error:
                self.reasons.append(f"--kv {known[i].name}: {error}")
            else:
                found.append(known[i])
        return found

    def cache_bytes(self, cache: MeasuredCache | None, tokens: int) -> int:
        """Bytes of keys and values of one sequence, with what a checkpoint carries for them; 0 where nothing is known."""
        formats = KVFormats() if cache is None else kv_recipe(cache.name).scheme.cache
        held = cache_bytes(self.source.config, formats, tokens, self.dtype)
        return 0 if held is None else held + calibration_bytes(self.source.config, formats)

    def _plan(self, row: MeasuredRow, file_format: str, total: int) -> Plan | None:
        """What quantizing would give; None if the model or the format cannot have it."""
        key = (row.label, file_format)
        if key not in self.plans:
            self.progress(len(self.plans), total, row.label)
            self.plans[key] = None
            try:
                planned = plan(
                    self.model,
                    row.in_format(file_format),
                    context=self.tokens,
                    format=file_format,
                    trust_remote_code=self.source.trust_remote_code,
                )
            except ValueError as error:
                self.reasons.append(f"{row.label}: {error}")
                return None
            verdict = planned.compatibility.get(find_format(file_format).title, "yes")
            if verdict.startswith("yes"):
                self.plans[key] = planned
            else:
                self.reasons.append(f"{row.label}: {verdict.removeprefix('no: ')}")
        return self.plans[key]


def loss_of(row: MeasuredRow, cache: MeasuredCache | None) -> float:
    return max(0.0, row.loss) + (0.0 if cache is None else max(0.0, cache.loss))


def preset_bits(file_format: str) -> int:
    """The bits in the name of a preset; 0 for formats that are not one."""
    found = re.search(r":q(\d)", file_format)
    return int(found[1]) if found else 0
