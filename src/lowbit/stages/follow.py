"""Processes that train along: the first one runs a recipe, and all take their share of every training step.

Only the first process walks over blocks, writes and measures. Where a stage trains, it tells the others which shards there
are; they load the model that these make and take the very same steps (:class:`~lowbit.training.Processes`). All processes see one
file system.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoints import native
from lowbit.modules import KVFormats
from lowbit.plan.model_plan import ModelPlan
from lowbit.progress import silent
from lowbit.recipes import Train
from lowbit.stages.blockwise import read_latents
from lowbit.stages.journal import Journal, Section
from lowbit.stages.train import Training, plain_texts, training_text, whole_texts
from lowbit.stages.whole import fitted_cache
from lowbit.training import Processes, Text


@dataclass
class Following:
    """The setting of a Train stage in a process that only takes part in its steps.

    Args:
        plan: the model and the recipe, as in the first process.
        ids: calibration windows, and behind them ``held_out`` others.
        further: windows of training text; None: there are none.
        source: the section of the stage before, as the first process has it.
    """

    plan: ModelPlan
    ids: Tensor
    held_out: int
    further: Tensor | None
    source: Section

    @property
    def seed(self) -> int:
        return self.plan.recipe.seed

    @property
    def architecture(self) -> Any:
        return self.plan.architecture

    def model(self, files: Sequence[Path]) -> PreTrainedModel:
        trust = self.plan.source.trust_remote_code
        return native.load(self.source.directory, dtype=torch.float32, unfinished=True, trust_remote_code=trust)

    def latents(self) -> Mapping[str, Tensor]:
        return read_latents(self.source.directory, len(self.plan.blocks))

    def dtype_of(self, name: str) -> torch.dtype:
        return self.plan.kept.dtype_of(name)

    def cache(self) -> KVFormats:
        return fitted_cache(self.plan.source, self.source, self.plan.recipe.scheme.cache)

    @contextmanager
    def texts(self, stage: Train) -> Iterator[tuple[Text, Text | None]]:
        calibrated = len(self.ids) - self.held_out
        ids = training_text(stage, self.ids[:calibrated], self.further)
        held_out = self.ids[calibrated:]
        yield (
            whole_texts(stage, ids, held_out, self.plan.source.load_full)
            if stage.compares
            else plain_texts(ids, held_out)
        )


def follow(plan: ModelPlan, ids: Tensor, held_out: int, further: Tensor | None, out: Path) -> Any:
    """Takes part in every training of the run of the first process; returns that run's result.

    Args:
        ids, held_out, further: as for :class:`Following`.
        out: the target of the run.
    """
    processes = Processes.here()
    for number, stage in enumerate(plan.recipe.stages):
        if not isinstance(stage, Train):
            continue
        entries = processes.told()
        if entries is None:  # a continued run has trained already
            continue
        journal = Journal(out, {})  # read only: it is not opened
        journal.finished = entries
        source = journal.section(number - 1)
        setting = Following(plan, ids, held_out, further, source)
        files = [source.directory / file for file in source.files]
        Training(stage, setting, files, journal.section(number), silent).take_part()
    return processes.told()
