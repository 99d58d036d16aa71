"""Processes that train along: the first one runs a recipe, and all take their share of every training step.

Only the first process walks over blocks, writes and measures. Where a stage trains, it tells the others which shards there
are; they load the model that these make and take the very same steps (:class:`~lowbit.training.Processes`). All processes see one
file system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from lowbit.stages.rotations import BeforeWalk
from lowbit.stages.train import Setting, Training
from lowbit.stages.whole import fitted_cache
from lowbit.training import Processes, Start


@dataclass
class Following(BeforeWalk):
    """The setting of a Train stage behind Blockwise, in a process that only takes part in its steps.

    Args:
        plan, ids, held_out, further: as of :class:`BeforeWalk`, and as in the first process.
        source: the section of the stage before, as the first process has it.
    """

    source: Section

    def model(self, files: Sequence[Path]) -> PreTrainedModel:
        trust = self.plan.source.trust_remote_code
        return native.load(self.source.directory, dtype=torch.float32, unfinished=True, trust_remote_code=trust)

    def start(self, stage: Train, dtypes: Mapping[str, torch.dtype]) -> Start:
        blocks = len(self.plan.blocks)
        return Start(read_latents(self.source.directory, blocks) if stage.needs_latents else {}, dtypes)

    def cache(self) -> KVFormats:
        return fitted_cache(self.plan.source, self.source, self.plan.recipe.scheme.cache)


def follow(plan: ModelPlan, ids: Tensor, held_out: int, further: Tensor | None, out: Path) -> Any:
    """Takes part in every training of the run of the first process; returns that run's result.

    Args:
        ids, held_out, further: as for :class:`Following`.
        out: the target of the run.
    """

    def prepared(number: int, journal: Journal) -> tuple[Setting, list[Path]]:
        if plan.recipe.stages[number].finds_rotations:
            return BeforeWalk(plan, ids, held_out, further), []
        source = journal.section(number - 1)
        return Following(plan, ids, held_out, further, source), [source.directory / file for file in source.files]

    trained = {number: stage for number, stage in enumerate(plan.recipe.stages) if isinstance(stage, Train)}
    follow_stages(trained, out, prepared)
    return Processes.here().told()


def follow_stages(
    stages: Mapping[int, Train], out: Path, prepared: Callable[[int, Journal], tuple[Setting, list[Path]]]
) -> None:
    """Takes part in training stages of the first process.

    Args:
        stages: by number, in order.
        out: the target of its run.
        prepared: of a stage's number and the first process's journal as it is then, what the stage is done to, and the shards that
            it starts from.
    """
    for number, stage in stages.items():
        entries = Processes.here().told()
        if entries is None:  # a continued run has trained already
            continue
        journal = Journal(out, {})  # read only: it is not opened
        journal.finished = entries
        setting, files = prepared(number, journal)
        Training(stage, setting, files, journal.section(number), silent).take_part()
