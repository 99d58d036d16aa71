"""explain: a recipe on a model in sentences, from the declarations of its steps and the edges of the model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lowbit.checkpoints.formats.base import parts_in_words
from lowbit.numerics import Fisher
from lowbit.plan.cache import cache_texts
from lowbit.plan.for_format import plan_for
from lowbit.plan.layers import PlannedLayer, planned_layers, ragged_groups
from lowbit.plan.model_plan import ModelPlan, base_name, edge_notes
from lowbit.recipes import Blockwise, Recipe, Stage, Train
from lowbit.steps import EdgeUse


@dataclass(frozen=True)
class Explanation:
    """What a recipe would do.

    Attributes:
        steps: a sentence or more for each step of a block and each stage that trains, in order.
        layers: as in a plan.
        notes: inputs of the blocks, attention, warnings, and what is left out.
    """

    steps: tuple[str, ...]
    layers: tuple[PlannedLayer, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"steps": list(self.steps), "layers": layers, "notes": list(self.notes)}


def explain(
    recipe: Recipe | str | Path | dict[str, Any],
    model: str | PathLike[str],
    *,
    format: str = "native",
    trust_remote_code: bool = False,
) -> Explanation:
    """What ``recipe`` would do to each layer of ``model``. Reads no weight.

    Args:
        recipe, model, format, trust_remote_code: as for :func:`lowbit.quantize`.

    Raises:
        ValueError: as :func:`lowbit.plan.plan`.
    """
    plan = plan_for(model, recipe, format, trust_remote_code=trust_remote_code)
    steps = tuple(" ".join(sentences) for stage in plan.recipe.stages for sentences in _stage(plan, stage))
    notes = (
        *_feed(plan),
        *_around(plan),
        *_attention(plan),
        *cache_texts(plan.recipe.scheme.cache),
        *_calibrated(plan),
        *plan.architecture.warnings,
        *_left_out(plan),
    )
    return Explanation(steps, planned_layers(plan), notes)


def _feed(plan: ModelPlan) -> Iterator[str]:
    if plan.recipe.reads_inputs or plan.recipe.needs_fisher:
        whose = "the original model gives" if plan.recipe.feed == "fp" else "the quantized blocks before it give"
        yield f"every block sees the hidden states that {whose} for the calibration text (feed: {plan.recipe.feed})"


def _calibrated(plan: ModelPlan) -> Iterator[str]:
    for stage in plan.recipe.cache_stages:
        parts = ", ".join(sorted(stage.cache_parts & plan.recipe.scheme.cache.calibrated)).replace("_", " ")
        yield (
            f"then the finished model reads the calibration text, and {type(stage.fit).__name__} of what its attention multiplies "
            f"gives its cache: {parts}"
        )


def _around(plan: ModelPlan) -> Iterator[str]:
    kept = parts_in_words(plan.description(layer) for *_, layer in plan.layers)
    if kept:
        yield f"beside their codes linears store, and apply when they run: {', '.join(kept)}"


def _attention(plan: ModelPlan) -> Iterator[str]:
    spec = plan.recipe.scheme.attention
    if spec is not None:
        floating, bits = spec.probability_bits is None, spec.probability_bits
        clusters = "static, one for each of the three" if spec.clusters is None else f"static, {spec.clusters} a head"
        ranges = f"ranges {clusters}" if spec.static else "a range for each token of each head"
        form = "" if spec.format is None else f" ({spec.format})"
        yield (
            f"attention multiplies queries, keys and values of {spec.bits} bits{form}, {ranges}; its "
            f"probabilities are {'floating' if floating else f'of {bits} bits'}"
        )


def _left_out(plan: ModelPlan) -> list[str]:
    return [*edge_notes(plan), *ragged_groups(plan)]


def _stage(plan: ModelPlan, stage: Stage) -> Iterator[Iterator[str]]:
    """The sentences of each step of a stage; a stage that trains is one step. What fits a cache is a note."""
    if isinstance(stage, Blockwise):
        yield from (_sentences(plan, step) for step in stage.steps)
    elif isinstance(stage, Train):
        yield _set(stage)


def _set(value: Any) -> Iterator[str]:
    """The summary of a step or a stage, and its settings."""
    yield f"{type(value).__name__}: {_summary(value)}"
    if settings := _settings(value, " = "):
        yield f"Here {', '.join(settings)}."


def _sentences(plan: ModelPlan, step: Any) -> Iterator[str]:
    """The step's summary and settings, its transforms and where they apply, and what it measures."""
    yield from _set(step)
    for use in step.transforms:
        yield from _where(plan, use)
    needs = sorted(_value(need) for need in step.needs if need.of_input)
    if needs:
        yield f"Measures {', '.join(needs)} of every input first."
    if Fisher() in step.needs:
        yield "Reads the Fisher information of every weight, from a backward pass over the whole model before the first block."


def _where(plan: ModelPlan, use: EdgeUse) -> Iterator[str]:
    """Where a transform is folded and where linears run it."""
    folded: dict[str, set[str]] = {}
    run: dict[str, set[str]] = {}
    for block in plan.blocks:
        for edge in use.legal_edges(block.resolved):
            folded.setdefault(base_name(edge.name), set()).add(block.name)
        for name in use.run_time_inputs(block.description):
            run.setdefault(base_name(name), set()).add(block.name)
    made = f"A {use.kind.value} by {_value(use.rule)}"
    if folded:
        yield f"{made} is folded into the weights on both sides of {_places(plan, folded)}."
    if run:
        yield f"{made} is run and stored by the linears that read {_places(plan, run)}."
    if not folded and not run:
        yield f"No {use.kind.value} is applied: no edge of this model can carry one there."


def _places(plan: ModelPlan, names: dict[str, set[str]]) -> str:
    total = len(plan.blocks)
    return ", ".join(
        name if len(blocks) == total else f"{name} (in {len(blocks)} blocks)" for name, blocks in names.items()
    )


def _summary(value: Any) -> str:
    """The first paragraph of the class's docstring, without markup."""
    text = " ".join((inspect.getdoc(type(value)) or "").split("\n\n")[0].split())
    return text.replace("``", "")


def _settings(value: Any, equals: str) -> list[str]:
    """The fields that are set: None and False are left out."""
    listed = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [f"{name}{equals}{_value(item)}" for name, item in listed if item is not None and item is not False]


def _value(value: Any) -> str:
    """A setting in short form; a frozen value by its name and settings."""
    if isinstance(value, tuple):
        return ", ".join(map(_value, value)) if len(value) == 1 else f"({', '.join(map(_value, value))})"
    if not dataclasses.is_dataclass(value):
        return str(value)
    settings = _settings(value, "=")
    return type(value).__name__ + (f"({', '.join(settings)})" if settings else "")
