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
from lowbit.modules import CalibrationSpec, KVFormats, set_kv_formats
from lowbit.plan.model_plan import ModelPlan
from lowbit.progress import Progress, silent
from lowbit.recipes import Blockwise, FitCache, Train
from lowbit.stages.blockwise import Elsewhere, Walk
from lowbit.stages.fit_cache import CacheFitting, combined
from lowbit.stages.journal import Journal, Section
from lowbit.stages.rest import Rest
from lowbit.stages.rotations import BeforeWalk, RotationTraining
from lowbit.stages.train import AfterWalk, Training
from lowbit.stages.whole import fitted_cache, read_back, write_as_it_is

_AS_IT_IS = -1
"""The number of the section that holds the model as it is, where no stage writes it."""


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
        elsewhere: as for :class:`Walk`.

    Attributes:
        walk: of the Blockwise stage; it keeps both streams behind the last block. Without that stage, it does not begin.
        rest: what comes behind the last block.
        model: what the last Train stage left (float32, packed), or None: the model is the one that the walk left.
        notes: what stages found that the report should say.
        found: what stages found for the cache, by name of the module that attends.
        given: as for :class:`Walk`.
    """

    plan: ModelPlan
    ids: Tensor | None
    journal: Journal
    ram_limit: int = 2**32
    progress: Progress = silent
    drawn: bool = False
    held_out: int = 0
    further: Tensor | None = None
    elsewhere: Elsewhere | None = None
    model: PreTrainedModel | None = None
    notes: list[str] = field(default_factory=list)
    found: dict[str, CalibrationSpec] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)

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
            given=self.given,
            elsewhere=self.elsewhere,
        )
        self.rest = Rest(self.walk)

    def stages(self) -> None:
        """Runs them. Raises what they raise. A recipe that changes no weights leaves the model as it is, but for its cache."""
        if not self.recipe.changes_weights:
            write_as_it_is(self.plan, self.journal.section(_AS_IT_IS), self.progress)
        for number, stage in enumerate(self.recipe.stages):
            _RUNNERS[type(stage)](self, number, stage)

    @property
    def result(self) -> Section:
        """The units that are the result's: those of the last stage that wrote the whole model, and those added since."""
        return self.journal.section(self._whole, len(self.recipe.stages) - 1)

    @property
    def _whole(self) -> int:
        """The number of the last stage that wrote the whole model."""
        whole = [i for i, stage in enumerate(self.recipe.stages) if not stage.of_cache]
        return whole[-1] if whole else _AS_IT_IS

    @cached_property
    def cache(self) -> KVFormats:
        """The recipe's formats of the cache, fitted to the keys of the model that the stages left."""
        return fitted_cache(self.plan.source, self.journal.section(self._whole), self.recipe.scheme.cache)

    @property
    def packed(self) -> ModelDescription:
        """What the stages that change weights have stored, without the formats of the cache."""
        apart = self.walk.unfused_experts and self.recipe.changes_weights
        return replace(self.walk.described(self.rest.packed), unfused_experts=apart)

    @cached_property
    def description(self) -> ModelDescription:
        """What the result stores."""
        packed, cache = self.packed, self.cache
        found = combined(packed.kv_calibration, self.found)
        return replace(packed, kv=cache.kv, kv_overrides=cache.overrides, kv_calibration=found)

    def finished_model(self) -> PreTrainedModel | None:
        """The result in memory (float32, packed) after stages that change a whole model or where its cache is quantized;
        None: the walk's streams say what it computes."""
        model, self.model = self.model, None
        if model is not None:
            set_kv_formats(model, self.description.cache)
        elif self.description.cache:
            model = read_back(self.plan, self.result, self.description, self.result.files)
        return model

    def close(self) -> None:
        self.walk.close()


def _blockwise(run: Run, number: int, stage: Blockwise) -> None:
    run.walk.run()
    run.rest.settle()
    run.rest.write()


def _train(run: Run, number: int, stage: Train) -> None:
    section = run.journal.section(number)
    if stage.finds_rotations:
        assert run.ids is not None
        before = BeforeWalk(run.plan, run.ids, run.held_out, run.further)
        run.walk.learned, notes = RotationTraining(stage, before, (), section, run.progress).learn()
        run.notes.extend(notes)
        return
    run.model = None  # the one before is on disk
    source = run.journal.section(number - 1)
    files = [source.directory / file for file in source.files]
    setting = AfterWalk(run.walk, run.packed, source, run.further)
    run.model, notes = Training(stage, setting, files, section, run.progress).run()
    run.notes.extend(notes)


def _fit_cache(run: Run, number: int, stage: FitCache) -> None:
    run.model = None  # it is read back, and then again with what was found
    source = run.journal.section(run._whole, number - 1)
    added = CacheFitting(
        stage, run.walk, source, run.journal.section(number), run.packed, run.cache, run.progress
    ).run()
    run.found = combined(run.found, added)


_RUNNERS: Mapping[type, Callable[[Run, int, Any], None]] = {
    Blockwise: _blockwise,
    Train: _train,
    FitCache: _fit_cache,
}
