"""Recipes: what is stored, and the stages that choose it.

A recipe is a :class:`Scheme` (formats by rule) and a tuple of stages. A method is a function from options to a recipe.
A mix takes the steps of several methods and solves once, at the end. YAML files (:mod:`lowbit.recipes`), names with
options and Python all give the same validated :class:`Recipe`. Its plain form (:func:`lowbit.numerics.to_dict`) is
recorded in the journal and the model card.

The core never asks which method made a recipe: it acts only on what the recipe declares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowbit.modules import KVFormats
from lowbit.numerics import check_types, from_dict, untagged
from lowbit.recipes.stages import Blockwise, Stage, Train
from lowbit.scheme import Outside, Override, Scheme
from lowbit.steps.precision import Compute


@untagged
@dataclass(frozen=True)
class Recipe:
    """A scheme and the stages that fill it.

    Attributes:
        name: its name in reports.
        scheme: what is stored.
        stages: in order; each starts from the model that the one before left. Without one that changes weights the scheme is
            only a format of the KV cache.
        seed: of everything random; each block derives its own.

    Raises:
        ValueError: stages that cannot fill the scheme or follow each other; nothing to do.
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
            after_cache = [stage for i, stage in enumerate(self.stages) if any(s.of_cache for s in self.stages[:i])]
            if moved := next((stage for stage in after_cache if not stage.of_cache), None):
                raise ValueError(
                    f"{type(moved).__name__} would change the model whose cache was calibrated before: put it first"
                )
            if any(s.finds_rotations for s in self.stages) and self._blockwise is None:
                raise ValueError("a stage learns rotations, and no stage Blockwise applies them")
            lengths = {stage.seq_len for stage in self.stages if isinstance(stage, Train) and stage.tokens}
            if len(lengths) > 1:
                raise ValueError("stages of training read one text, so they have one seq_len; found several")
            if not self.changes_weights and (self.scheme.rules or self.scheme.attention or not self.scheme.cache):
                raise ValueError(
                    "a recipe has a stage, such as Blockwise((Solve(...),)), or only a KV cache format; found neither"
                )
            found = frozenset[str]().union(*(stage.cache_parts for stage in self.stages))
            if missing := sorted(self.scheme.cache.calibrated - found):
                raise ValueError(
                    f"the format of the cache has what only calibration finds ({', '.join(missing)}), and no stage of the recipe "
                    "finds it: add a stage that does, or name a method for caches"
                )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @classmethod
    def blockwise(
        cls, name: str, scheme: Scheme, steps: Iterable[Any], feed: Literal["fp", "quant"] = "quant", seed: int = 0
    ) -> Recipe:
        """A recipe with one :class:`Blockwise` stage, as most are."""
        return cls(name, scheme, (Blockwise(tuple(steps), feed),), seed)

    @property
    def steps(self) -> tuple[Any, ...]:
        """The steps of the Blockwise stage; empty without one."""
        return () if self._blockwise is None else self._blockwise.steps

    @property
    def feed(self) -> Literal["fp", "quant"]:
        """The inputs that steps see: ``"quant"`` or ``"fp"``."""
        return "quant" if self._blockwise is None else self._blockwise.feed

    @property
    def compute(self) -> Compute:
        """The type of products while calibration text passes through the blocks."""
        return "auto" if self._blockwise is None else self._blockwise.compute

    @property
    def walk_number(self) -> int:
        """The number of the Blockwise stage; 0 without one."""
        return next((i for i, stage in enumerate(self.stages) if isinstance(stage, Blockwise)), 0)

    @property
    def _blockwise(self) -> Blockwise | None:
        return next((stage for stage in self.stages if isinstance(stage, Blockwise)), None)

    @property
    def changes_weights(self) -> bool:
        """Whether a stage packs or trains weights; if none does, they stay as they are."""
        return any(not stage.of_cache for stage in self.stages)

    @property
    def cache_stages(self) -> tuple[Any, ...]:
        """The stages that calibrate the cache."""
        return tuple(stage for stage in self.stages if stage.of_cache)

    @property
    def reads_inputs(self) -> bool:
        """Whether a stage depends on the linears' inputs on the calibration text."""
        return any(stage.reads_inputs for stage in self.stages)

    @property
    def reads_original(self) -> bool:
        """Whether a stage compares with what the original model computes from the calibration text."""
        return any(stage.reads_original for stage in self.stages)

    @property
    def simulates_cache(self) -> bool:
        """Whether blocks learn with the cache that the scheme says."""
        return self._blockwise is not None and bool(self.scheme.cache and self._blockwise.cache_parts)

    @property
    def reads_rotations(self) -> bool:
        """Whether steps apply rotations that a stage before has learned."""
        return self._blockwise is not None and self._blockwise.reads_rotations

    @property
    def looks_ahead(self) -> int:
        """The number of original blocks behind the one at hand that steps run."""
        return 0 if self._blockwise is None else self._blockwise.looks_ahead

    @property
    def learns(self) -> bool:
        """Whether a stage computes gradients."""
        return any(stage.learns for stage in self.stages)

    @property
    def reads_text(self) -> bool:
        """Whether something depends on what the model computes from the calibration text: linears' inputs, or the cache."""
        return self.reads_inputs or bool(self.cache_stages)

    @property
    def needs_calibration(self) -> bool:
        """Whether a run needs calibration text."""
        return self.reads_text or self.needs_fisher

    @property
    def needs_fisher(self) -> bool:
        """Whether a stage needs Fisher information, which takes a backward pass over the whole model first."""
        return any(stage.needs_fisher for stage in self.stages)

    @property
    def needs_latents(self) -> bool:
        """Whether a stage needs the weights that Blockwise rounded, besides their codes."""
        return any(stage.needs_latents for stage in self.stages)

    def training_windows(self, seq_len: int) -> tuple[int, int]:
        """Windows of training text that the stages ask for, besides the calibration windows of ``seq_len`` tokens, and the
        tokens of each; 0 windows: none."""
        asked = [stage.windows(seq_len) for stage in self.stages if isinstance(stage, Train)]
        return max((each for each in asked if each[0]), default=(0, seq_len))

    def with_blockwise(self, **changes: Any) -> Recipe:
        """This recipe with other ``steps`` or another ``feed`` or ``compute`` in its Blockwise stage."""
        stages = (replace(stage, **changes) if isinstance(stage, Blockwise) else stage for stage in self.stages)
        return replace(self, stages=tuple(stages))

    def with_training(self, **changes: Any) -> Recipe:
        """This recipe with other settings (``tokens``, ``batch``, ``lr`` ...) in all stages that train.

        Raises:
            ValueError: no stage trains, or a setting that cannot be.
        """
        if changes and not any(isinstance(stage, Train) for stage in self.stages):
            raise ValueError(f"{self.name}: no stage trains, so it has no {', '.join(changes)}")
        stages = (replace(stage, **changes) if isinstance(stage, Train) else stage for stage in self.stages)
        return replace(self, stages=tuple(stages))

    def with_cache(self, other: Recipe | None) -> Recipe:
        """This recipe with the formats of the KV cache of another one, and the stages that calibrate them; without another, the
        cache stays as the model computes it.

        Raises:
            ValueError: nothing would be left to do.
        """
        formats, fits = (KVFormats(), ()) if other is None else (other.scheme.cache, other.cache_stages)
        scheme = replace(self.scheme, kv=formats.kv, kv_overrides=formats.overrides)
        return replace(self, scheme=scheme, stages=(*(s for s in self.stages if not s.of_cache), *fits))

    def with_overrides(self, overrides: Iterable[Mapping[str, Any]]) -> Recipe:
        """This recipe with added rules, one for each override. See :class:`Override` for their keys.

        Raises:
            ValueError: an unknown key or value; no rule with a weight format to override.
        """
        entries = [from_dict(dict(entry), Override) for entry in overrides]
        scheme = self.scheme
        for entry in entries:
            if entry.outside:
                scheme = replace(scheme, outside=entry.change(scheme.outside or Outside()))
        rules = [entry for entry in entries if not entry.outside]
        base = next((rule for rule in scheme.rules if rule.weight is not None), None)
        if rules and base is None:
            raise ValueError(f"{self.name}: no rule of the scheme has a weight format, so there is none to override")
        added = tuple(entry.rule(base) for entry in rules)
        return self if not entries else replace(self, scheme=scheme.with_rules(*added))
