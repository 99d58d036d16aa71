"""Which steps and formats go together: what one step decides has to hold while later ones run.

A recipe is checked before any work, so that a mix that cannot be says so at once. A new step that chooses ranges, orders or
roundings adds what it needs of the steps around it here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lowbit.architectures import Kind
from lowbit.modules import ActSpec, AttentionSpec
from lowbit.numerics import Fisher, Float, PerChannel, PerTensor, RangeGrid, Spec, arity
from lowbit.steps import (
    ClipShares,
    Cluster,
    FitActivation,
    Incoherence,
    Learn,
    LearnedStepSizes,
    LowRankCorrection,
    RotateInputs,
    RotateResidual,
    Rounding,
    SearchActivationRange,
    SearchClip,
    SearchFloat,
    SearchReassembly,
    SetActivationRange,
    SetAttentionRange,
    Step,
)


def check_combination(weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
    """
    Args:
        weights, activations: the formats of a recipe's rules.
        steps: its steps; the last solves.

    Raises:
        ValueError: what cannot be done together, and what to do instead.
    """
    _check_weights(weights, steps)
    static = [act for act in activations if act.static]
    if static:
        _check_static(static, steps)
    _check_clusters(weights, activations, steps)
    for i, step in enumerate(steps):
        if isinstance(step, Incoherence | RotateInputs) and (late := _transforming(steps[i + 1 :])):
            raise ValueError(
                f"{_named(late)} transforms channels that {_name(step)} has mixed by then; put it first, as in 'awq+quip'"
            )
        if isinstance(step, RotateResidual) and i:
            raise ValueError(
                f"RotateResidual changes the model that every step works on, and {_named(steps[:i])} would come before it; put "
                "it first, as in 'quarot+gptq'"
            )
        if isinstance(step, RotateInputs) and (early := [each for each in steps[:i] if _clips(each)]):
            raise ValueError(
                f"{_named(early)} chooses a range for every row or group, and RotateInputs then mixes their channels; leave one of "
                "the two out"
            )
        _check_inputs_kept(step, _transforming(steps[i + 1 :]))
    mixing = [step for step in steps if _kinds(step) & {Kind.SHIFT, Kind.ROTATE, Kind.SPLIT}]
    if mixing and any(Fisher() in step.needs for step in steps):
        raise ValueError(
            "Solve needs Fisher information, which is known for every weight by itself and is lost when a step shifts or "
            f"rotates channels, as {_named(mixing)} does here. Leave it out, or solve by another method"
        )


def in_order(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of several recipes, but for the last, in an order in which what one decides holds for those behind it.

    As they come, but that linears rotate their inputs once all that can be folded is, and that static ranges are fixed last.
    """
    late = [step for step in steps if isinstance(step, RotateInputs)]
    others = sorted((step for step in steps if step not in late), key=fixes_ranges)
    at = max((i + 1 for i, step in enumerate(others) if _kinds(step)), default=0)
    return (*others[:at], *late, *others[at:])


def fixes_ranges(step: Step) -> bool:
    """Whether the step chooses static ranges, of activations or of attention's operands, which is true of the block as it is then."""
    refines = isinstance(step, Learn) and all(isinstance(maker, LearnedStepSizes) for maker in step.makers)
    return refines or isinstance(step, SetActivationRange | SearchActivationRange | SetAttentionRange)


def _check_weights(weights: Sequence[Spec], steps: Sequence[Step]) -> None:
    solver = steps[-1].solver  # pyright: ignore[reportAttributeAccessIssue]
    clipped, placed = any(map(_clips, steps)), any(isinstance(step, SearchFloat) for step in steps)
    for spec in weights:
        if clipped and not isinstance(spec.grid, RangeGrid):
            raise ValueError(f"a clipping is chosen, and {spec.grid} is not placed by a range")
        if spec.stats is not None and any(_rounds(step) for step in steps):
            raise ValueError("learned rounding needs scales that are stored as they are, not quantized again")
        solver.check(spec, clipped or (placed and isinstance(spec.grid, Float)))


def _check_static(static: Sequence[ActSpec], steps: Sequence[Step]) -> None:
    """Static ranges have to be chosen, and no step may transform the channels afterwards."""
    searched = all(isinstance(act.spec.grid, Float) for act in static)
    choosers = (SetActivationRange, SearchActivationRange, FitActivation, SearchFloat)[: 4 if searched else 3]
    chosen = [i for i, step in enumerate(steps) if isinstance(step, choosers)]
    if not chosen:
        raise ValueError(f"static activations need the step {' or '.join(each.__name__ for each in choosers)}")
    grains = {str(act.spec.granularity) for act in static if not isinstance(act.spec.granularity, PerTensor)}
    if grains and any(isinstance(step, SearchActivationRange) for step in steps):
        raise ValueError(
            f"SearchActivationRange clips tokens where one range serves the whole input, not {', '.join(sorted(grains))}; use "
            "PerTensor() or SetActivationRange"
        )
    late = _transforming(steps[chosen[-1] + 1 :])
    if late:
        raise ValueError(
            f"{_named(late)} transforms channels whose static activation ranges are fixed by then; put it before the step that "
            "fixes them"
        )


def check_attention_ranges(spec: AttentionSpec | None, steps: Sequence[Step]) -> None:
    """Raises ValueError where static ranges of attention's operands are not chosen, are chosen for nothing, or too early."""
    static = spec is not None and spec.static
    chosen = [i for i, step in enumerate(steps) if isinstance(step, SetAttentionRange)]
    if static and not chosen:
        raise ValueError("static operands of attention need the step SetAttentionRange")
    if chosen and not static:
        raise ValueError("SetAttentionRange fixes ranges that attention's operands do not have here; leave it out")
    if chosen and (late := _transforming(steps[chosen[-1] + 1 :])):
        raise ValueError(
            f"{_named(late)} transforms channels whose static ranges in attention are fixed by then; put it before "
            "SetAttentionRange"
        )


def _check_clusters(weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
    """What an order by clusters needs of the formats, and of the steps around it."""
    at = next((i for i, step in enumerate(steps) if isinstance(step, Cluster)), None)
    if at is None:
        return
    if not any(act.static for act in activations):
        raise ValueError(
            "Cluster gives static activations a range for each cluster, and activations here are dynamic or not quantized; "
            "make them static, or leave it out"
        )
    whole = [step for step in steps if isinstance(step, SearchActivationRange | FitActivation)]
    pairs = sorted({str(act.spec.grid) for act in activations if arity(act.spec.grid) > 1})
    if whole or pairs:
        raise ValueError(
            f"Cluster gives every cluster of channels a range of its own, which {', '.join([*pairs, *map(_name, whole)])} cannot; "
            "leave one of the two out"
        )
    if late := _transforming(steps[at + 1 :]):
        raise ValueError(f"{_named(late)} transforms channels that Cluster has put in order by then; put it first")
    if early := [step for step in steps[:at] if _clips(step)]:
        raise ValueError(
            f"{_named(early)} chooses a range for every row or group, and Cluster then changes the order of rows and columns; "
            "put it behind Cluster, or leave it out"
        )
    grouped = any(not isinstance(spec.granularity, PerChannel | PerTensor) for spec in weights)
    if grouped and steps[-1].solver.moves_groups:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            "Cluster puts input channels in an order, and Solve, with order='act', in another; use order='group' or "
            "static_groups=true"
        )


def _check_inputs_kept(step: Step, later: Sequence[Step]) -> None:
    """What ``step`` decides for a linear and its input holds while ``later`` steps leave that input and its weight alone."""
    for each in later:
        if isinstance(step, SearchReassembly) and not isinstance(each, Incoherence | RotateInputs):
            raise ValueError(
                f"{_name(each)} transforms channels that SearchReassembly has split and merged by then; put it first"
            )
        if _corrects(step):
            raise ValueError(
                f"{_name(each)} transforms the inputs that the low-rank corrections before it were learned for; put it first, "
                "or learn no correction (rank 0)"
            )
        if _rounds(step) and isinstance(each, SearchReassembly):
            raise ValueError(
                f"Learn decides how each weight is rounded, and {_name(each)} changes weights after it; put it first"
            )


def _clips(step: Step) -> bool:
    learns = isinstance(step, Learn) and any(isinstance(maker, ClipShares | Rounding) for maker in step.makers)
    return learns or isinstance(step, SearchClip)


def _rounds(step: Step) -> bool:
    return isinstance(step, Learn) and any(isinstance(maker, Rounding) for maker in step.makers)


def _corrects(step: Step) -> bool:
    """Whether the step leaves low-rank corrections beside the weights."""
    return isinstance(step, Learn) and any(
        isinstance(maker, LowRankCorrection) and not maker.fold for maker in step.makers
    )


def _transforming(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if _kinds(step)]


def _kinds(value: Any) -> set[Kind]:
    """The kinds of transform that a step, or a value in its fields, declares."""
    kinds = {value.kind} if isinstance(getattr(value, "kind", None), Kind) else set()
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        for part in item if isinstance(item, tuple) else (item,):
            if dataclasses.is_dataclass(part):
                kinds |= _kinds(part)
    return kinds


def _named(steps: Sequence[Step]) -> str:
    return ", ".join(map(_name, steps))


def _name(step: Step) -> str:
    return type(step).__name__
