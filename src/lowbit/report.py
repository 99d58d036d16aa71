"""What a run measured, and the judgement of it: whether the result is broken, and what the user should know."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowbit.generation import Quality
from lowbit.numerics import to_dict
from lowbit.plan.outside import OutsidePlan
from lowbit.recipes import Recipe
from lowbit.stages.record import BlockRecord
from lowbit.steps import LayerRecord

MAX_KL = 2.0
"""Mean KL divergence (nats a token) from the original beyond which a model counts as broken."""
MAX_ZEROED = 0.1
"""Share of a layer's groups that may come out all zero, as those of channels that no token activates do."""


@dataclass(frozen=True)
class QuantizeReport:
    """What came out, as measured.

    Attributes:
        out: the checkpoint's directory; None where nothing finished was written.
        asked_bits: mean width of a code, over the weights of the quantized linears: what the recipe asks for.
        bits_per_weight: all stored bits of the quantized linears over their weights.
        model_bits_per_weight: all stored bits of the checkpoint over the model's parameters; 0 where nothing was written.
        bytes: of the checkpoint's weight files.
        source_bytes: of the original's weights as the user has them: its tensors, or the GGUF file.
        kl, top1_agreement: against the original; None where its blocks cannot run one at a time.
        measured_on: what ``kl`` and ``top1_agreement`` were measured on.
        cache_bits: bits for each number of a long sequence's keys and values, everything stored counted; None: not quantized.
        outside_cost: nats a token that packing the embedding and the head costs; None: not packed, or not measured.
        coverage: share of the weights in the blocks' matrices that are quantized.
        layers, blocks: records in the order of the walk; ``error`` is a relative squared output error.
        problems: why the result counts as broken; empty for a good one.
        warnings: what the user should know and may accept.
        generated_text: the report on the calibration text, where a model wrote it.
    """

    out: Path | None
    recipe: Recipe = field(repr=False)
    calibration: str
    asked_bits: float
    bits_per_weight: float
    model_bits_per_weight: float
    bytes: int
    source_bytes: int
    kl: float | None
    top1_agreement: float | None
    measured_on: str
    coverage: float
    outside_cost: float | None
    blocks: tuple[BlockRecord, ...] = field(repr=False)  # a line for each layer
    cache_bits: float | None = None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    generated_text: Quality | None = None

    @property
    def layers(self) -> list[LayerRecord]:
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def worst_layers(self) -> list[LayerRecord]:
        """Layers by falling output error."""
        return sorted((x for x in self.layers if x.error is not None), key=lambda x: x.error or 0.0, reverse=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        written = {} if self.generated_text is None else {"generated_text": self.generated_text.to_dict()}
        return written | {
            "out": None if self.out is None else str(self.out),
            "recipe": to_dict(self.recipe),
            "calibration": self.calibration,
            "asked_bits": self.asked_bits,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "bytes": self.bytes,
            "source_bytes": self.source_bytes,
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
            "measured_on": self.measured_on,
            "coverage": self.coverage,
            "cache_bits": self.cache_bits,
            "outside_cost": self.outside_cost,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "layers": [
                {
                    "name": x.name,
                    "role": x.role,
                    "bits_per_weight": x.bits_per_weight,
                    "error": x.error,
                    "notes": list(x.notes),
                }
                for x in self.layers
            ],
            "block_errors": [block.error for block in self.blocks],
        }


class BrokenModel(ValueError):
    """The guard's refusal. ``report`` says what was measured."""

    def __init__(self, message: str, report: QuantizeReport | None = None):
        super().__init__(message)
        self.report = report


def losses(report: QuantizeReport, max_kl: float) -> list[tuple[float, str]]:
    """Outputs too far from the original's: for each what was measured, which may be NaN, and a sentence."""
    found = []
    if report.kl is not None and not report.kl <= max_kl:
        text = f"the mean KL divergence from the original is {report.kl:.3g} nats a token, over the limit {max_kl:g}"
        found.append((report.kl, text))
    for layer in report.layers:
        if layer.error is not None and not layer.error < 1.0:
            found.append((layer.error, f"{layer.name} keeps nothing of its output (relative error {layer.error:.3g})"))
    return found


def other_problems(report: QuantizeReport, max_bits: float) -> list[str]:
    """More stored bits than allowed, and layers that lost whole groups."""
    found = []
    if report.bits_per_weight > max_bits:
        found.append(f"{report.bits_per_weight:.3f} bits a weight are stored, over the limit {max_bits:g}")
    lost = (layer for layer in report.layers if layer.zeroed > MAX_ZEROED)
    return found + [f"{layer.name}: {layer.zeroed:.0%} of its groups came out all zero" for layer in lost]


def refusal(report: QuantizeReport, partial: str) -> str:
    """Why the result is refused, and what to do. ``partial``: the directory that keeps the finished blocks."""
    worst = ", ".join(f"{x.name} ({x.error:.3g})" for x in report.worst_layers[:5])
    return (
        f"the result is broken: {'; '.join(report.problems[:5])}. Layers with the largest relative output error: {worst}. "
        "Likely remedies: more bits or smaller groups for these layers (overrides), a calibrated method such as one that "
        "corrects errors as it goes, or more calibration text. Nothing finished was written; "
        f"{partial} keeps the blocks: repeat with --allow-broken to write the checkpoint all the same"
    )


def beyond_asked(stored: float, asked: float) -> tuple[str, ...]:
    """A warning if tables, scales and kept weights make the codes a small part of what is stored."""
    if stored <= asked + 1 and stored <= 1.25 * asked:
        return ()
    return (
        f"{stored:.2f} bits a weight are stored where {asked:g} were asked: scales, tables and kept weights take the rest; "
        "larger groups or another method store less",
    )


def larger_than_source(weights: int, source: int, packed: OutsidePlan, dtype: torch.dtype) -> str:
    """The warning about weight files of more bytes than the original's."""
    stored = {"embedding": packed.embeddings, "head": packed.layers or packed.tied_heads}
    kept = [f"the {what}" for what, layers in stored.items() if not layers]
    verb = "stay" if len(kept) > 1 else "stays"
    stays = f"{' and '.join(kept)} {verb} in {str(dtype).removeprefix('torch.')}, and " if kept else ""
    return (
        f"the weight files take {weights:,} bytes, more than the original's {source:,}: {stays}the original may be quantized "
        "already"
    )


def grouped(notes: list[str], blocks: Container[str]) -> list[str]:
    """Notes that differ only in the layer's name, as one line with a count; experts are counted too."""
    by_text: dict[str, list[str]] = {}
    for note in notes:
        name, _, text = note.partition(": ")
        by_text.setdefault(text, []).append(name)
    return [f"{_several(names, blocks)}: {text}" for text, names in by_text.items()]


def _several(names: list[str], blocks: Container[str]) -> str:
    """The first of ``names`` and how many follow. Experts are modules with a number for a name, inside a block."""
    owners = {name.rpartition(".")[0] for name in names}
    experts = sum(owner.rpartition(".")[2].isdecimal() and owner not in blocks for owner in owners)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}{f' (of {experts} experts)' if experts > 1 else ''}"
