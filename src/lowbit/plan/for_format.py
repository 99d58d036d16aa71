"""A recipe whose result a file format holds: the format's own number formats in place of the recipe's, and the check before work."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowbit.checkpoints.fold_residual import without_residual
from lowbit.checkpoints.formats import FileFormat, find_format
from lowbit.checkpoints.formats.base import TensorRole
from lowbit.numerics import Spec
from lowbit.plan.compatibility import model_description, new_biases
from lowbit.plan.kept import KeepDtype
from lowbit.plan.model_plan import ModelPlan, lay_over, plan_model
from lowbit.recipes import Recipe
from lowbit.scheme import FormatRule, Outside


def plan_for(
    model: str | PathLike[str] | PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    format: str = "native",
    *,
    keep_dtype: KeepDtype = "auto",
    trust_remote_code: bool = False,
) -> ModelPlan:
    """:func:`plan_model`, with the number formats of the file format ``format`` where it has some.

    Raises:
        ValueError: as :func:`plan_model`, an unknown format, and a recipe that has no place in it.
    """
    file_format = find_format(format)
    plan = plan_model(model, recipe, keep_dtype=keep_dtype, trust_remote_code=trust_remote_code)
    changed = recipe_for(plan, file_format)
    return plan if changed is plan.recipe else lay_over(plan.source, changed, keep_dtype)


def recipe_for(plan: ModelPlan, file_format: FileFormat) -> Recipe:
    """The recipe of ``plan``, with the formats that ``file_format`` gives to each matrix of the model, where it gives some.
    An embedding or head that would be packed only because it costs little stays as it is where the format has no place for it.

    Raises:
        ValueError: it has formats of its own, and the recipe quantizes activations or says the formats of some matrices.
    """
    specs = file_format.specs(_tensors(plan), plan.source.config)
    scheme = plan.recipe.scheme
    if specs is None and not file_format.holds_tables and scheme.outside is None and plan.outside:
        return replace(plan.recipe, scheme=replace(scheme, outside=Outside()))
    if specs is None:
        return plan.recipe
    if scheme.quantizes_activations:
        raise ValueError(f"{file_format.title} does not describe activations; leave activation_bits out")
    if len(scheme.rules) > 1 or scheme.outside is not None:
        raise ValueError(
            f"{file_format.title} gives every matrix its bits and groups here, and recipe {plan.recipe.name!r} says those of some "
            "layers itself; leave its overrides out, or name the format without an option"
        )
    rules = _rules(plan, specs)
    table, head = next(iter(plan.architecture.embed), None), plan.architecture.head
    outside = Outside(specs.get(table or ""), specs.get(head or ""))
    return replace(plan.recipe, scheme=replace(scheme, rules=rules, outside=outside))


def _rules(plan: ModelPlan, specs: Mapping[str, Spec]) -> tuple[FormatRule, ...]:
    """A rule for each role with its most frequent format, then rules for the blocks where it has another."""
    usual, others = [], []
    for role in dict.fromkeys(plan.linears.values()):
        names = [name for name, each in plan.linears.items() if each == role]
        most = Counter(specs.get(name) for name in names).most_common(1)[0][0]
        usual.append(_rule(role, most))
        different: dict[tuple[str, Spec | None], list[str]] = {}
        for name in names:
            number, _, path = name.removeprefix(f"{plan.architecture.blocks}.").partition(".")
            if specs.get(name) != most:
                different.setdefault((path, specs.get(name)), []).append(number)
        for (path, spec), blocks in different.items():
            for start in range(0, len(blocks), _NUMBERS):
                numbers = "|".join(map(re.escape, blocks[start : start + _NUMBERS]))
                others.append(_rule(rf"re:\.({numbers})\.{re.escape(path)}$", spec))
    return *usual, *others


_NUMBERS = 64
"""Blocks in one rule, which is a pattern of limited length."""


def _rule(match: str, spec: Spec | None) -> FormatRule:
    return FormatRule(match, skip=True) if spec is None else FormatRule(match, spec)


def why_not(plan: ModelPlan, file_format: FileFormat) -> str | None:
    """The reason why ``file_format`` cannot hold what the recipe of ``plan`` makes; None where it can."""
    config = plan.source.config
    description = model_description(plan)
    if not file_format.turns_residual:
        description = without_residual(description, config)
    reason = file_format.why_not(description, new_biases(plan), config)
    return reason or file_format.why_not_files(plan.source.path, config)


def stand_ins(plan: ModelPlan, file_format: FileFormat) -> list[str]:
    """What to know of number formats that stand in for those that the option of ``file_format`` names; empty where none does."""
    sentence = file_format.stand_ins(_tensors(plan), plan.source.config)
    return [] if sentence is None else [sentence]


def _tensors(plan: ModelPlan) -> list[TensorRole]:
    found = [
        TensorRole(f"{block.name}.{path}", role, number, block.shapes[path][1])
        for number, block in enumerate(plan.blocks)
        for path, role in block.resolved.linears.items()
    ]
    tied: Any = plan.model.all_tied_weights_keys
    for role, name in (("embedding", next(iter(plan.architecture.embed), None)), ("head", plan.architecture.head)):
        if name is not None and f"{name}.weight" not in tied:
            found.append(TensorRole(name, role, 0, plan.model.get_submodule(name).get_parameter("weight").shape[1]))
    return found
