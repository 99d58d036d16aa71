"""Recipes: what is stored, and the steps that choose it.

A recipe is a :class:`Scheme` (formats by rule) and a tuple of steps. A method is a function from options to a recipe; a
mix takes the steps of several methods and solves once, at the end. A YAML file (:mod:`lowbit.recipes`), a name with
options and Python all end in the same validated :class:`Recipe`, whose ``to_dict`` is what the journal and the model card record.

The core never asks which method made a recipe: all that it acts on is declared in the recipe.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, field_validator, validate_call

from lowbit.numerics import Fisher, nearest, to_dict
from lowbit.scheme import Frozen, Override, Rule, Scheme, plain_message, validated
from lowbit.steps import Learn, ModelStep, SetAttentionRange, Solve, Step
from lowbit.steps.combination import check_attention_ranges, check_combination, in_order


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
        solves = [i for i, step in enumerate(steps) if isinstance(step, Solve)]
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
        learns = any(isinstance(step, Learn | SetAttentionRange) for step in self.steps) or bool(self.model_steps)
        return learns or any(need.of_input for step in self.steps for need in step.needs)

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


# The registry of methods


@dataclass(frozen=True)
class Method:
    """A published method: its name, where it is from, and the function from options to a recipe."""

    name: str
    family: str
    paper: str
    summary: str
    build: Callable[..., Recipe]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.build).parameters)

    def recipe(self, **options: Any) -> Recipe:
        for key in options:
            if key not in self.options:
                raise ValueError(f"method {self.name!r} has no option {key!r}{nearest(key, list(self.options))}")
        try:
            return self.build(**options)
        except ValidationError as error:
            raise ValueError(f"method {self.name!r}: {plain_message(error)}") from error

    def describe(self) -> dict[str, Any]:
        """What ``lowbit methods`` prints."""
        recipe = self.recipe()
        learns = any(isinstance(step, Learn) for step in recipe.steps) or bool(recipe.model_steps)
        needs = {type(need).__name__ for step in recipe.steps for need in step.needs}
        return {
            "name": self.name,
            "family": self.family,
            "paper": self.paper,
            "summary": self.summary,
            "needs": sorted(needs) + (["gradients"] if learns else []),
            "options": {key: to_dict(p.default) for key, p in self.options.items()},
        }


METHODS: dict[str, Method] = {}
ALIASES: dict[str, str] = {}
"""Short names of methods; none may hold a ``+``, which mixes."""


def method(name: str, *, family: str, paper: str, alias: str | None = None):
    """Decorator that registers a function from options to a recipe; its options are validated by their annotations."""

    def register(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
        assert name not in METHODS, f"two methods are called {name}"
        if alias is not None:
            assert alias not in METHODS and alias not in ALIASES, f"two methods are called {alias}"
            ALIASES[alias] = name
        summary = (inspect.getdoc(build) or "").split("\n")[0]
        METHODS[name] = Method(name, family, paper, summary, validate_call(build))
        return METHODS[name].build

    return register


def recipe(name: str, **options: Any) -> Recipe:
    """The recipe of method ``name``, or a mix ``"a+b"``: the steps of a, then those of b, solved once as b solves.

    Options go to every method of the mix that has them.

    Raises:
        ValueError: an unknown method or option (with the nearest known), a value of the wrong type, a mix that cannot be.
    """
    parts = []
    name = "+".join(ALIASES.get(part, part) for part in name.split("+"))
    for part in name.split("+"):
        if part not in METHODS:
            raise ValueError(f"no method {part!r}{nearest(part, [*METHODS, *ALIASES])}")
        parts.append(METHODS[part])
    if len(parts) == 1:
        return parts[0].recipe(**options)
    known = {key for part in parts for key in part.options}
    for key in options:
        if key not in known:
            raise ValueError(f"none of the methods in {name!r} has an option {key!r}{nearest(key, sorted(known))}")
    return mix(name, [part.recipe(**{k: v for k, v in options.items() if k in part.options}) for part in parts])


def mix(name: str, recipes: Iterable[Recipe]) -> Recipe:
    """One recipe of several: all steps in order, with the Solve, the weight format and the feed of the last one.

    Steps that fix ranges of static activations come after all others, which may still transform the channels, and rotations
    that linears run themselves after all that is folded. Activations are quantized, and attention's operands are, as the first
    recipe that does so says; where it takes no channels out at run time and a later one does, so
    does the mix.

    Raises:
        ValueError: a recipe before the last that would leave no trace, or a step that would be done twice.
    """
    *firsts, last = recipes
    for each in firsts:
        if len(each.steps) == 1 and not each.model_steps and not each.scheme.quantizes_activations:
            raise ValueError(
                f"{each.name!r} only says how weights are rounded, and in {name!r} {last.name!r} does that: leave "
                f"{each.name!r} out, or put it last"
            )
    before = [step for recipe in (*firsts, last) for step in recipe.steps[:-1]]
    steps = (*in_order(before), last.steps[-1])
    for step in steps:
        if steps.count(step) > 1:
            raise ValueError(f"{name!r} would do {type(step).__name__} twice; leave one of the methods out")
    acts = [rule.activation for each in (*firsts, last) for rule in each.scheme.rules if rule.activation is not None]
    threshold = next((each.threshold for each in acts if each.threshold), 0.0)
    whole = tuple(step for recipe in (*firsts, last) for step in recipe.model_steps)
    quantized = next((each for each in (*firsts, last) if each.scheme.quantizes_activations), last)
    try:
        inputs = tuple(_taking_out(rule, threshold) for rule in quantized.scheme.rules)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    attends = next((each.scheme.attention for each in (*firsts, last) if each.scheme.attention), None)
    scheme = Scheme(rules=_joined(name, last.scheme.rules, inputs), attention=attends)
    try:
        return Recipe(name=name, scheme=scheme, steps=steps, feed=last.feed, seed=last.seed, model_steps=whole)
    except ValidationError as error:
        raise ValueError(plain_message(error)) from error


def _taking_out(rule: Rule, threshold: float) -> Rule:
    """``rule`` whose activations take out the channels over ``threshold``, where they do not take out any yet."""
    act = rule.activation
    if rule.skip or act is None or act.threshold or not threshold:
        return rule
    return Rule(match=rule.match, weight=rule.weight, activation=replace(act, threshold=threshold))


def _joined(name: str, weights: tuple[Rule, ...], activations: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules with the weight formats of the first and the activation formats of the second; of each, the last match counts."""
    if weights == activations:
        return weights
    inputs = [("*", None), *((rule.match, rule.activation) for rule in activations if not rule.skip)]
    first = max(i for i, (match, _) in enumerate(inputs) if match == "*")  # nothing before it is ever looked at
    return tuple(
        rule if rule.skip else Rule(match=_both(name, rule.match, match), weight=rule.weight, activation=activation)
        for rule in weights
        for match, activation in (inputs[first:] if not rule.skip else inputs[:1])
    )


def _both(name: str, a: str, b: str) -> str:
    """A match for what both match."""
    if b == "*" or a == b:
        return a
    if a != "*":
        raise ValueError(
            f"{name!r} has one recipe's weight formats for {a!r} and another's activation formats for {b!r}, which no one rule "
            "can say; write the rules into a recipe file"
        )
    return b
