"""A run: the stages of a recipe in order, each from the shards that the one before it left.

All stages share one partial directory and one journal, in which each has a section of its own. What a stage finished is not
done again; the units of the last one become the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoints.description import ModelDescription
from lowbit.modules import set_kv_formats
from lowbit.plan.model_plan import ModelPlan
from lowbit.progress import Progress, silent
from lowbit.recipes import Blockwise, Train
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal, Section
from lowbit.stages.train import Training
from lowbit.stages.whole import fitted_cache, read_back, write_as_it_is


@dataclass
class Run:
    """One recipe at work on one model.

    Args:
        plan: the model and the recipe, checked.
        ids: calibration windows ``[N, T]``, or None for a recipe that needs none.
        journal: of the partial directory, open.
        ram_limit: bytes of activations kept in memory.
        drawn, held_out: as for :class:`Walk`.
        further: windows of text for training ``[M, S]`` that are no calibration windows; None: there are none.

    Attributes:
        walk: of the Blockwise stage; it keeps both streams behind the last block. Without that stage, it does not begin.
        model: what the last Train stage left (float32, packed), or None: the model is the one that the walk left.
        notes: what stages found that the report should say.
    """

    plan: ModelPlan
    ids: Tensor | None
    journal: Journal
    ram_limit: int = 2**32
    progress: Progress = silent
    drawn: bool = False
    held_out: int = 0
    further: Tensor | None = None
    model: PreTrainedModel | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.recipe = self.plan.recipe
        self.walk = Walk(
            self.plan,
            self.ids,
            self.journal,
            self.ram_limit,
            progress=self.progress,
            drawn=self.drawn,
            held_out=self.held_out,
        )

    def stages(self) -> None:
        """Runs them. Raises what they raise. A recipe without stages leaves the model as it is, but for its cache."""
        if not self.recipe.stages:
            write_as_it_is(self.plan, self.last, self.progress)
        for number, stage in enumerate(self.recipe.stages):
            _RUNNERS[type(stage)](self, number, stage)

    @property
    def last(self) -> Section:
        """The section whose units are the result's."""
        return self.journal.section(max(0, len(self.recipe.stages) - 1))

    @cached_property
    def description(self) -> ModelDescription:
        """What the result stores; its cache is fitted to the keys of the model that the stages left."""
        cache = fitted_cache(self.plan.source, self.last, self.recipe.scheme.cache)
        apart = self.walk.unfused_experts and bool(self.recipe.stages)
        return replace(self.walk.description, kv=cache.kv, kv_overrides=cache.overrides, unfused_experts=apart)

    def finished_model(self) -> PreTrainedModel | None:
        """The result in memory (float32, packed) after stages that change a whole model or where its cache is quantized;
        None: the walk's streams say what it computes."""
        model, self.model = self.model, None
        if model is not None:
            set_kv_formats(model, self.description.cache)
        elif self.description.cache:
            model = read_back(self.plan, self.last, self.description, self.last.files)
        return model

    def close(self) -> None:
        self.walk.close()


def _blockwise(run: Run, number: int, stage: Blockwise) -> None:
    run.walk.run()
    run.walk.settle_outside()
    run.walk.write_rest()


def _train(run: Run, number: int, stage: Train) -> None:
    section = run.journal.section(number)
    run.model = None  # the one before is on disk
    source = run.journal.section(number - 1)
    run.model, notes = Training(stage, run.walk, source, section, run.progress, run.further).run()
    run.notes.extend(notes)


_RUNNERS: Mapping[type, Callable[[Run, int, Any], None]] = {Blockwise: _blockwise, Train: _train}
