"""A Train stage before Blockwise: rotations are learned on the original model, which stays as it is.

The stage leaves one file, with what :class:`~lowbit.training.LearnedRotations` holds; the stage Blockwise folds it into every block.
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

from lowbit.architectures.experts import unfuse_experts
from lowbit.modules import KVFormats
from lowbit.plan.model_plan import ModelPlan
from lowbit.recipes import Train
from lowbit.stages.blockwise import derived_seed
from lowbit.stages.train import Training, plain_texts, training_text, whole_texts
from lowbit.training import LearnedRotations, OriginalBlock, Processes, RotatedModel, Start, Text, draw_curve


@dataclass
class BeforeWalk:
    """What a stage is given that learns rotations.

    Args:
        plan: the model and the recipe, checked.
        ids: calibration windows, and behind them ``held_out`` others.
        further: windows of training text; None: there are none.
    """

    plan: ModelPlan
    ids: Tensor
    held_out: int
    further: Tensor | None

    @property
    def seed(self) -> int:
        return self.plan.recipe.seed

    @property
    def architecture(self) -> Any:
        return self.plan.architecture

    def model(self, files: Sequence[Path]) -> PreTrainedModel:
        """The original, experts apart, in float32; ``files`` are none."""
        model = self.plan.source.load_full(torch.float32)
        unfuse_experts(model)
        return model

    def start(self, stage: Train, dtypes: Mapping[str, torch.dtype]) -> Start:
        blocks = [
            OriginalBlock(block.name, block.resolved, block.formats, derived_seed(self.seed, i))
            for i, block in enumerate(self.plan.blocks)
        ]
        return Start(dtypes=dtypes, blocks=blocks, seed=self.seed)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.plan.kept.dtype_of(name)

    def cache(self) -> KVFormats:
        return self.plan.recipe.scheme.cache

    @contextmanager
    def texts(self, stage: Train) -> Iterator[tuple[Text, Text | None]]:
        calibrated = len(self.ids) - self.held_out
        ids, held_out = training_text(stage, self.ids[:calibrated], self.further), self.ids[calibrated:]
        load = self.plan.source.load_full
        yield whole_texts(stage, ids, held_out, load) if stage.compares else plain_texts(ids, held_out)


@dataclass
class RotationTraining(Training):
    """A Train stage that learns rotations."""

    def learn(self) -> tuple[LearnedRotations, list[str]]:
        """Trains, unless the journal has the result; the rotations, and notes."""
        section, file = self.section, self.section.unit_name(0, 1)
        if section.finished and not _is_unit(section.finished[0], file):
            section.forget(0)  # the journal was damaged
        if section.finished:
            Processes.here().tell(None)
        else:
            model = self.setting.model(())
            Processes.here().tell(section.journal.finished)  # other processes load it too
            notes = self._train(model)
            assert isinstance(self.parameters, RotatedModel)
            section.write(file, self.parameters.learned().tensors(), {"notes": notes})
        self._path("state").unlink(missing_ok=True)
        draw_curve(self._path("jsonl"), self._path("svg"))
        return LearnedRotations.of(section.tensors(0, "")), section.finished[0]["record"]["notes"]


def _is_unit(entry: Mapping[str, Any], file: str) -> bool:
    return entry["file"] == file and isinstance(entry["record"].get("notes"), list)
