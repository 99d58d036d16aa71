"""Checks which steps and formats work together: a decision of one step must hold while later steps run.

A recipe is checked before any work. The checks fold over the declarations of steps (:mod:`lowbit.steps.effects`) and
never ask for a step's class.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.architectures import Kind
from lowbit.modules import ActSpec, AttentionSpec
from lowbit.numerics import Fisher, RangeGrid, Spec
from lowbit.steps.effects import Freedom, MixOrder
from lowbit.steps.step import Step, names_of

_DISTURBED = {
    Freedom.CHANNEL_ORDER: "{late} transforms channels that {step} has put in order by then; put it first",
    Freedom.CHANNEL_BASIS: "{late} transforms channels that {step} has mixed by then; put it first, as in 'awq+quip'",
    Freedom.WEIGHT_RANGES: (
        "{step} chooses a range for every row or group, and {late} then mixes or reorders their channels; put {step} after "
        "{late}, or leave one of the two out"
    ),
    Freedom.CHANNEL_COPIES: "{late} transforms channels that {step} has split and merged by then; put it first",
    Freedom.CORRECTIONS: (
        "{late} transforms the inputs that the low-rank corrections before it were learned for; put it first, or learn no "
        "correction (rank 0)"
    ),
    Freedom.ROUNDING: "{step} decides how each weight is rounded, and {late} changes weights after it; put it first",
    Freedom.ATTENTION_RANGES: (
        "{late} transforms channels whose static ranges in attention are fixed by then; put it before {step}"
    ),
}
_STATIC_DISTURBED = "{late} transforms channels whose static activation ranges are fixed by then; put it before the step that fixes them"


def check_combination(weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
    """Refuses steps and formats that cannot work together.

    Args:
        weights, activations: the formats of a recipe's rules.
        steps: the recipe's steps, in order.

    Raises:
        ValueError: a conflict, and how to resolve it.
    """
    _check_weight_ranges(weights, steps)
    for step in reversed(steps):
        step.check(weights, activations, steps)
    _check_static([act for act in activations if act.static], steps)
    for i, step in enumerate(steps):
        if step.rotates_residual and i:
            raise ValueError(
                f"{names_of([step])} changes the model that every step works on, and {names_of(steps[:i])} would come before "
                "it; put it first, as in 'quarot+gptq'"
            )
    for freedom, message in _DISTURBED.items():
        for i, step in enumerate(steps):
            late = [each for each in steps[i + 1 :] if freedom in each.disturbs]
            if freedom in step.fixes and late:
                raise ValueError(message.format(step=names_of([step]), late=names_of(late)))
    _check_fisher(steps)


def check_attention_ranges(spec: AttentionSpec | None, steps: Sequence[Step]) -> None:
    """Raises ValueError if no step fixes static ranges of attention, or a step fixes ranges that do not exist."""
    static = spec is not None and spec.static
    choosing = [step for step in steps if Freedom.ATTENTION_RANGES in step.fixes]
    if static and not choosing:
        raise ValueError("static operands of attention need the step SetAttentionRange")
    if choosing and not static:
        raise ValueError(f"{names_of(choosing)} fixes ranges that attention's operands do not have here; leave it out")


def in_order(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Orders the steps of a mix, except its last step, so that every decision holds for the steps after it.

    Steps keep their order, with two exceptions. Steps that fix static ranges come last. Rotations at run time come
    right after the last step that transforms channels.
    """
    late = [step for step in steps if step.mix_order is MixOrder.AFTER_TRANSFORMS]
    others = sorted((step for step in steps if step not in late), key=lambda step: step.mix_order)
    at = max((i + 1 for i, step in enumerate(others) if step.kinds), default=0)
    return (*others[:at], *late, *others[at:])


def _check_weight_ranges(weights: Sequence[Spec], steps: Sequence[Step]) -> None:
    fixed = frozenset[Freedom]().union(*(step.fixes for step in steps))
    for spec in weights:
        if Freedom.WEIGHT_RANGES in fixed and not isinstance(spec.grid, RangeGrid):
            raise ValueError(f"a clipping is chosen, and {spec.grid} is not placed by a range")
        if Freedom.ROUNDING in fixed and not spec.settles:
            raise ValueError("learned rounding needs scales that are stored as they are, not quantized again")


def _check_static(static: Sequence[ActSpec], steps: Sequence[Step]) -> None:
    """Checks that every static range is fixed and that no later step transforms its channels."""
    for act in static:
        placing = [i for i, step in enumerate(steps) if step.places_input(act)]
        if not placing:
            raise ValueError(
                "static activations need the step SetActivationRange or SearchActivationRange, or another that fixes their "
                "ranges"
            )
        late = [step for step in steps[placing[-1] + 1 :] if Freedom.INPUT_RANGES in step.disturbs]
        if late:
            raise ValueError(_STATIC_DISTURBED.format(late=names_of(late)))


def _check_fisher(steps: Sequence[Step]) -> None:
    reading = [step for step in steps if Fisher() in step.needs]
    mixing = [step for step in steps if step.kinds & {Kind.SHIFT, Kind.ROTATE, Kind.SPLIT}]
    if reading and mixing:
        raise ValueError(
            f"{names_of(reading)} needs Fisher information, which is known for every weight by itself and is lost when a step "
            f"shifts or rotates channels, as {names_of(mixing)} does here. Leave it out, or solve by another method"
        )
