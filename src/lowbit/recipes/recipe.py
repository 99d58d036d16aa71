"""Recipes: what is stored, and the stages that choose it.

A recipe is a :class:`Scheme` (formats by rule) and a tuple of stages. A method is a function from options to a recipe; a
mix takes the steps of several methods and solves once, at the end. A YAML file (:mod:`lowbit.recipes`), a name with
options and Python all end in the same validated :class:`Recipe`; its plain form (:func:`lowbit.numerics.to_dict`) is what the
journal and the model card record.

The core never asks which method made a recipe: all that it acts on is declared in the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowbit.modules.kv_spec import unsupported
from lowbit.numerics import check_types, from_dict, untagged
from lowbit.recipes.stages import Blockwise, Stage
from lowbit.scheme import Override, Scheme


@untagged
@dataclass(frozen=True)
class Recipe:
    """A scheme and the stages that fill it.

    Attributes:
        name: what to call it in reports.
        scheme: what is stored.
        stages: in order, each from the model that the one before left; none where the scheme is only a KV cache format.
        seed: of everything random; each block derives its own.
    """

    name: str
    scheme: Scheme
    stages: tuple[Any, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise ValueError(f"{stage!r} is not a stage such as Blockwise((Solve(...),)) or Train(...)")
        check_types(self)
        try:
            for i, stage in enumerate(self.stages):
                stage.check(self.scheme, self.stages[:i])
            if not self.stages and (self.scheme.rules or self.scheme.attention or not self.scheme.kv):
                raise ValueError(
                    "a recipe has a stage, such as Blockwise((Solve(...),)), or only a KV cache format; found neither"
                )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @classmethod
    def blockwise(
        cls, name: str, scheme: Scheme, steps: Iterable[Any], feed: Literal["fp", "quant"] = "quant", seed: int = 0
    ) -> Recipe:
        """The recipe of one :class:`Blockwise` stage, as most are."""
        return cls(name, scheme, (Blockwise(tuple(steps), feed),), seed)

    @property
    def steps(self) -> tuple[Any, ...]:
        """The steps on every block: those of the Blockwise stage; none without one."""
        return () if self._blockwise is None else self._blockwise.steps

    @property
    def feed(self) -> Literal["fp", "quant"]:
        """The inputs that the steps see."""
        return "quant" if self._blockwise is None else self._blockwise.feed

    @property
    def _blockwise(self) -> Blockwise | None:
        return next((stage for stage in self.stages if isinstance(stage, Blockwise)), None)

    @property
    def reads_inputs(self) -> bool:
        """Whether a stage asks what the calibration text makes of the inputs of linears."""
        return any(stage.reads_inputs for stage in self.stages)

    @property
    def learns(self) -> bool:
        """Whether a stage follows gradients."""
        return any(stage.learns for stage in self.stages)

    @property
    def needs_calibration(self) -> bool:
        return self.reads_inputs or self.needs_fisher

    @property
    def needs_fisher(self) -> bool:
        """Whether a stage asks for Fisher information, which takes a backward pass over the whole model first."""
        return any(stage.needs_fisher for stage in self.stages)

    def check_runs(self) -> None:
        """Raises ValueError where this version cannot carry the recipe out."""
        if self.scheme.kv is not None:
            raise ValueError(unsupported(self.scheme.kv, f"recipe {self.name!r}"))

    def with_blockwise(self, **changes: Any) -> Recipe:
        """This recipe with other ``steps`` or another ``feed`` of its Blockwise stage."""
        stages = (replace(stage, **changes) if isinstance(stage, Blockwise) else stage for stage in self.stages)
        return replace(self, stages=tuple(stages))

    def with_overrides(self, overrides: Iterable[Mapping[str, Any]]) -> Recipe:
        """This recipe with rules added; see :class:`Override` for their keys."""
        entries = [from_dict(dict(entry), Override) for entry in overrides]
        base = next((rule for rule in self.scheme.rules if rule.weight is not None), None)
        if entries and base is None:
            raise ValueError(f"{self.name}: no rule of the scheme has a weight format, so there is none to override")
        added = tuple(entry.rule(base) for entry in entries)
        return self if not added else replace(self, scheme=self.scheme.with_rules(*added))
