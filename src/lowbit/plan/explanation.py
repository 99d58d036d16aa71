"""explain: a recipe on a model in sentences, derived from what its steps declare and from the edges that the model has."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lowbit.numerics import Fisher
from lowbit.plan.layers import PlannedLayer, planned_layers, ragged_groups
from lowbit.plan.survey import EdgeUse, Survey, base_name, edge_notes, edge_uses, edges_of, survey
from lowbit.recipes import Recipe


@dataclass(frozen=True)
class Explanation:
    """What a recipe would do. ``steps``: in order, for every block. ``layers``: as in a plan. ``notes``: what it would not do."""

    steps: tuple[str, ...]
    layers: tuple[PlannedLayer, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"steps": list(self.steps), "layers": layers, "notes": list(self.notes)}


def explain(recipe: Recipe | str | Path | dict[str, Any], model: str | PathLike[str]) -> Explanation:
    """What ``recipe`` would do to each layer of ``model``, without reading a weight. Raises as :func:`lowbit.plan.plan`."""
    found = survey(model, recipe)
    steps = tuple(" ".join(_sentences(found, step)) for step in found.recipe.steps)
    notes = (*_feed(found), *_attention(found), *found.architecture.warnings, *_left_out(found))
    return Explanation(steps, planned_layers(found), notes)


def _feed(found: Survey) -> Iterator[str]:
    if found.recipe.needs_calibration:
        whose = "the original model gives" if found.recipe.feed == "fp" else "the quantized blocks before it give"
        yield f"every block sees the hidden states that {whose} for the calibration text (feed: {found.recipe.feed})"


def _attention(found: Survey) -> Iterator[str]:
    spec = found.recipe.scheme.attention
    if spec is not None:
        floating, bits = spec.probability_bits is None, spec.probability_bits
        clusters = "static, one for each of the three" if spec.clusters is None else f"static, {spec.clusters} a head"
        ranges = f"ranges {clusters}" if spec.static else "a range for each token of each head"
        form = "" if spec.format is None else f" ({spec.format})"
        yield (
            f"attention multiplies queries, keys and values of {spec.bits} bits{form}, {ranges}; its "
            f"probabilities are {'floating' if floating else f'of {bits} bits'}"
        )


def _left_out(found: Survey) -> list[str]:
    return [*edge_notes(found), *ragged_groups(found)]


def _sentences(found: Survey, step: Any) -> Iterator[str]:
    """What the step is, its settings, the transforms it makes and where, and what it must measure."""
    yield f"{type(step).__name__}: {_summary(step)}"
    settings = _settings(step, " = ")
    if settings:
        yield f"Here {', '.join(settings)}."
    for use in edge_uses(step):
        yield _where(found, use)
    needs = sorted(_value(need) for need in step.needs if need.of_input)
    if needs:
        yield f"Measures {', '.join(needs)} of every input first."
    if Fisher() in step.needs:
        yield "Reads the Fisher information of every weight, from a backward pass over the whole model before the first block."


def _where(found: Survey, use: EdgeUse) -> str:
    names: dict[str, set[str]] = {}
    for block in found.blocks:
        for edge, name, why_not in edges_of(use, block):
            if edge is not None and not why_not:
                names.setdefault(base_name(name), set()).add(block.name)
    if not names:
        return f"No {use.kind.value} is applied: no edge of this model can carry one there."
    total = len(found.blocks)
    places = [name if len(blocks) == total else f"{name} (in {len(blocks)} blocks)" for name, blocks in names.items()]
    return f"A {use.kind.value} by {_value(use.rule)} is folded into the weights on both sides of {', '.join(places)}."


def _summary(value: Any) -> str:
    """The first sentence of a docstring, as a reader without the source wants it."""
    text = " ".join((inspect.getdoc(type(value)) or "").split("\n\n")[0].split())
    return text.replace("``", "")


def _settings(value: Any, equals: str) -> list[str]:
    """The fields that say something: what is off or left open is not listed."""
    listed = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [f"{name}{equals}{_value(item)}" for name, item in listed if item is not None and item is not False]


def _value(value: Any) -> str:
    """A setting in short: a frozen value by its name and settings."""
    if isinstance(value, tuple):
        return ", ".join(map(_value, value)) if len(value) == 1 else f"({', '.join(map(_value, value))})"
    if not dataclasses.is_dataclass(value):
        return str(value)
    settings = _settings(value, "=")
    return type(value).__name__ + (f"({', '.join(settings)})" if settings else "")
