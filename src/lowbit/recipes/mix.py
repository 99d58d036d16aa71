"""Mixes: one recipe from several, solved once, at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lowbit.recipes.recipe import Recipe
from lowbit.recipes.stages import Blockwise
from lowbit.scheme import FormatRule, Scheme
from lowbit.steps.combination import in_order


def mix(name: str, recipes: Iterable[Recipe]) -> Recipe:
    """One recipe from several, with all steps in order.

    Solve, weight format, feed and compute are those of the last recipe that has steps.

    Steps that fix static activation ranges follow all steps that transform channels. Rotations at run time follow all
    folded transforms. The Blockwise stages become one; stages that learn rotations for it come before, all others
    follow in order. Formats of activations and of
    attention come from the first recipe that has them, those of the KV cache, with the stages that calibrate it, from the one
    that has some. If those activations take out no channels at run time and another recipe's do, the mix takes out channels too.

    Raises:
        ValueError: a recipe before the last that would have no effect, a step that would run twice, or two different formats of
            the KV cache.
    """
    recipes = tuple(recipes)
    solving = [recipe for recipe in recipes if recipe.steps]
    attention = next((each.scheme.attention for each in recipes if each.scheme.attention), None)
    caches = [each for each in recipes if each.scheme.cache]
    caching = caches[0] if caches else None
    for each in caches[1:]:
        if each.scheme.cache != caches[0].scheme.cache:
            raise ValueError(
                f"{caches[0].name!r} and {each.name!r} both say how the KV cache is held, and differ: leave one out"
            )
    kv, kv_overrides = (None, ()) if caching is None else (caching.scheme.kv, caching.scheme.kv_overrides)
    others = [
        stage for each in recipes for stage in each.stages if not (isinstance(stage, Blockwise) or stage.of_cache)
    ]
    first, later = ([stage for stage in others if stage.finds_rotations is early] for early in (True, False))
    later += () if caching is None else caching.cache_stages
    if not solving:
        return Recipe(name, Scheme(attention=attention, kv=kv, kv_overrides=kv_overrides), tuple(later))
    *firsts, last = solving
    for each in firsts:
        if len(each.steps) == 1 and len(each.stages) == 1 and not each.scheme.quantizes_activations:
            raise ValueError(
                f"{each.name!r} only says how weights are rounded, and in {name!r} {last.name!r} does that: leave "
                f"{each.name!r} out, or put it last"
            )
    steps = (*in_order([step for each in solving for step in each.steps[:-1]]), last.steps[-1])
    for step in steps:
        if steps.count(step) > 1:
            raise ValueError(f"{name!r} would do {type(step).__name__} twice; leave one of the methods out")
    acts = [rule.activation for each in solving for rule in each.scheme.rules if rule.activation is not None]
    threshold = next((each.threshold for each in acts if each.threshold), 0.0)
    quantized = next((each for each in solving if each.scheme.quantizes_activations), last)
    try:
        inputs = tuple(_taking_out(rule, threshold) for rule in quantized.scheme.rules)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    scheme = Scheme(_joined(name, last.scheme.rules, inputs), attention, kv, kv_overrides=kv_overrides)
    return Recipe(name, scheme, (*first, Blockwise(steps, last.feed, last.compute), *later), last.seed)


def _taking_out(rule: FormatRule, threshold: float) -> FormatRule:
    """``rule`` whose activations take out channels over ``threshold``, unless they take out some already."""
    act = rule.activation
    if rule.skip or act is None or act.threshold or not threshold:
        return rule
    return replace(rule, activation=replace(act, threshold=threshold))


def _joined(name: str, weights: tuple[FormatRule, ...], activations: tuple[FormatRule, ...]) -> tuple[FormatRule, ...]:
    """Rules that join the weight formats of ``weights`` with the input formats of ``activations``.

    In both, the last rule that matches a layer counts.
    """
    if weights == activations:
        return weights
    inputs = [("*", None), *((rule.match, rule.activation) for rule in activations if not rule.skip)]
    first = max(i for i, (match, _) in enumerate(inputs) if match == "*")  # later rules override all before it
    return tuple(
        rule
        if rule.skip
        else FormatRule(match=_both(name, rule.match, match), weight=rule.weight, activation=activation)
        for rule in weights
        for match, activation in (inputs[first:] if not rule.skip else inputs[:1])
    )


def _both(name: str, a: str, b: str) -> str:
    """A match for the layers that both patterns match."""
    if b == "*" or a == b:
        return a
    if a != "*":
        raise ValueError(
            f"{name!r} has one recipe's weight formats for {a!r} and another's activation formats for {b!r}, which no one rule "
            "can say; write the rules into a recipe file"
        )
    return b
