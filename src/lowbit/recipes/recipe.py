"""Recipes: what is stored, and the steps that choose it.

A recipe is a :class:`Scheme` (formats by rule) and a tuple of steps. A method is a function from options to a recipe; a
mix takes the steps of several methods and solves once, at the end. A YAML file (:mod:`lowbit.recipes`), a name with
options and Python all end in the same validated :class:`Recipe`, whose ``to_dict`` is what the journal and the model card record.

The core never asks which method made a recipe: all that it acts on is declared in the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, field_validator

from lowbit.numerics import Fisher, to_dict
from lowbit.scheme import Frozen, Override, Scheme, validated
from lowbit.steps import Freedom, ModelStep, Step
from lowbit.steps.combination import check_attention_ranges, check_combination


class Recipe(Frozen):
    """A scheme and the steps that fill it.

    Attributes:
        name: what to call it in reports.
        scheme: what is stored.
        steps: in order, on every block; ``Solve`` comes last and once.
        feed: the inputs that steps see: ``"quant"``, from the quantized blocks before, or ``"fp"``, from the original.
        seed: of everything random; each block derives its own.
        model_steps: in order, once, on the whole packed model after its last block.
    """

    name: str
    scheme: Scheme
    steps: tuple[Any, ...]
    feed: Literal["fp", "quant"] = "quant"
    seed: int = 0
    model_steps: tuple[Any, ...] = ()

    @field_validator("model_steps")
    @classmethod
    def _are_model_steps(cls, steps: tuple[Any, ...]) -> tuple[ModelStep, ...]:
        for step in steps:
            if not isinstance(step, ModelStep):
                raise ValueError(f"{step!r} is not a step of model scope such as Tune(...)")
            _check_types(step, type(step).__name__)
        return steps

    @field_validator("steps")
    @classmethod
    def _are_steps(cls, steps: tuple[Any, ...]) -> tuple[Step, ...]:
        for step in steps:
            if hasattr(type(step), "run"):  # first, because what a step needs may hang on a field of a wrong type
                _check_types(step, type(step).__name__)
            if not isinstance(step, Step):
                raise ValueError(f"{step!r} is not a step such as Solve(...)")
        solves = [i for i, step in enumerate(steps) if Freedom.CODES in step.fixes]
        if solves != [len(steps) - 1]:
            raise ValueError(
                f"a recipe has one Solve, as its last step; found {[type(step).__name__ for step in steps]}"
            )
        return steps

    def model_post_init(self, _: Any) -> None:
        weights = [rule.weight for rule in self.scheme.rules if rule.weight is not None]
        activations = [rule.activation for rule in self.scheme.rules if rule.activation is not None]
        try:
            check_combination(weights, activations, self.steps)
            check_attention_ranges(self.scheme.attention, self.steps)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @property
    def reads_inputs(self) -> bool:
        """Whether a step asks what the calibration text makes of the inputs of linears."""
        return bool(self.model_steps) or any(step.reads_inputs for step in self.steps)

    @property
    def learns(self) -> bool:
        """Whether a step follows gradients."""
        return bool(self.model_steps) or any(step.learns for step in self.steps)

    @property
    def needs_calibration(self) -> bool:
        return self.reads_inputs or self.needs_fisher

    @property
    def needs_fisher(self) -> bool:
        """Whether a step asks for Fisher information, which takes a backward pass over the whole model first."""
        return any(Fisher() in step.needs for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :func:`from_plain` reads back to an equal recipe."""
        return {
            "name": self.name,
            "feed": self.feed,
            "seed": self.seed,
            "scheme": [
                {"match": rule.match, "skip": True}
                if rule.skip
                else {"match": rule.match, "weight": to_dict(rule.weight), "activation": to_dict(rule.activation)}
                for rule in self.scheme.rules
            ],
            "steps": [to_dict(step) for step in self.steps],
            **({"attention": to_dict(self.scheme.attention)} if self.scheme.attention else {}),
            **({"model_steps": [to_dict(step) for step in self.model_steps]} if self.model_steps else {}),
        }

    def with_overrides(self, overrides: Iterable[Mapping[str, Any]]) -> Recipe:
        """This recipe with rules added; see :class:`Override` for their keys."""
        base = next((rule for rule in self.scheme.rules if rule.weight is not None), None)
        if base is None:
            raise ValueError(f"{self.name}: no rule of the scheme has a weight format, so nothing would be quantized")
        added = tuple(validated(Override, entry).rule(base) for entry in overrides)
        return self if not added else rebuilt(self, scheme=self.scheme.with_rules(*added))


def _check_types(value: Any, where: str) -> None:
    """Raises ValueError where a field of a step, or of a value in it, has another type than it declares.

    Dataclasses do not check: a pattern given where a list of patterns is meant would be taken letter by letter.
    """
    strict = ConfigDict(arbitrary_types_allowed=True, strict=True)
    hints = get_type_hints(type(value))
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), f"{where}.{field.name}"
        try:
            TypeAdapter(hints[field.name], config=strict).validate_python(item)
        except ValidationError as error:
            raise ValueError(f"{name}: {error.errors()[0]['msg']}, found {item!r}") from error
        for part in item if isinstance(item, tuple) else (item,):
            if dataclasses.is_dataclass(part):
                _check_types(part, f"{name}.{type(part).__name__}")


def rebuilt(recipe: Recipe, **changes: Any) -> Recipe:
    """A copy that is validated again (pydantic's own model_copy is not)."""
    return Recipe(**{**{name: getattr(recipe, name) for name in Recipe.model_fields}, **changes})
