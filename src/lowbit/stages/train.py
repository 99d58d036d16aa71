"""The stage Train: a packed model is loaded once, whole, trained, and its shards are written again.

The loss, the parameters and the optimizer are values of :mod:`lowbit.training`; here is the loop that joins them. Training is
not resumed in its middle: a run that was killed there does it again, from the same bytes with the same seed, so that the
result cannot differ. The alternative, to change shards in place, could not tell a finished one from a torn one.

The loop does not go through accelerate. ``Accelerator.prepare`` has nothing to wrap: what is trained are leaves that the
model computes with, not its own parameters. And accelerate keeps one device for the whole process: ``Accelerator(cpu=True)``
fails where the caller has one on a GPU, and leaves later ones on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lowbit.checkpoints.shards import read_shard_header
from lowbit.progress import Progress
from lowbit.recipes import Train
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Section
from lowbit.stages.whole import read_back
from lowbit.steps.precision import faster_products
from lowbit.training import Batch


@dataclass
class Training:
    """One Train stage of a run.

    Args:
        stage: what to do.
        walk: of the same run, finished: it knows the original model's logits and describes the packed one.
        source: the section of the stage before, whose shards are the model to train.
        section: where the trained shards go.
    """

    stage: Train
    walk: Walk
    source: Section
    section: Section
    progress: Progress

    def run(self) -> tuple[PreTrainedModel, list[str]]:
        """Trains, unless the journal has all shards; the model as its shards make it (float32, packed), and notes."""
        source, section = self.source.files, self.section
        for i, entry in enumerate(section.finished):
            expected = i < len(source) and entry["file"] == section.unit_name(i, len(source))
            if not expected or not isinstance(entry["record"].get("notes"), list):
                section.forget(i)  # the journal was damaged
                break
        if len(section.finished) < len(source):
            model = read_back(self.walk.plan, section, self.walk.description, source)
            notes = self._train(model)
            state = model.state_dict()
            for i in range(len(section.finished), len(source)):
                headers = read_shard_header(section.directory / source[i])
                tensors = {name: state[name].to(header.dtype) for name, header in headers.items()}
                section.write(section.unit_name(i, len(source)), tensors, {"notes": notes})
        trained = read_back(self.walk.plan, section, self.walk.description, section.files)
        return trained, section.finished[0]["record"]["notes"]

    def _train(self, model: nn.Module) -> list[str]:
        """Changes ``model`` in place; returns notes for the report."""
        walk = self.walk
        assert walk.ids is not None and walk.stream is not None
        ids = walk.ids[: walk.calibrated]
        done, expected = 0, self.stage.epochs * len(ids)

        def tick(text: str) -> None:
            nonlocal done
            done += 1
            self.progress(min(done, expected), expected, text)

        def original(i: int) -> Tensor:
            return walk.logits_of(ids[i : i + 1], walk.hidden("fp", i))

        with walk.stream.loaded_outside(walk.source):
            return train(model, self.stage, ids, original, walk.recipe.seed, tick)


def train(
    model: nn.Module,
    stage: Train,
    ids: Tensor,
    original: Callable[[int], Tensor],
    seed: int = 0,
    tick: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Trains ``model`` in place as ``stage`` says.

    Args:
        model: a transformers causal language model in float32.
        ids: ``[N, T]``, the calibration windows.
        original: logits ``[T, V]`` of the original model for window i.
        seed: of the order of windows.
        tick: called for each window of each epoch with what to show.

    Returns:
        Notes for the report.

    Raises:
        ValueError: the loss became NaN or Inf.
    """
    parameters = stage.what.parameters(model.requires_grad_(False))
    optimizer = stage.optimizer.make(parameters.leaves, stage.lr)
    batches = -(-len(ids) // stage.batch)
    schedule = stage.schedule.make(optimizer, stage.lr, stage.epochs * batches)
    order = torch.Generator().manual_seed(seed)
    with parameters:
        for epoch in range(1, stage.epochs + 1):
            for windows in torch.randperm(len(ids), generator=order).split(stage.batch):
                optimizer.zero_grad()
                ids_BT, values = ids[windows.tolist()], parameters.replaced()
                with faster_products(ids_BT.device, stage.amp):
                    output = functional_call(model, values, kwargs={"input_ids": ids_BT, "use_cache": False})
                loss = stage.objective.loss(Batch(windows.tolist(), ids_BT, output.logits, original))
                if not torch.isfinite(loss):
                    raise ValueError("training met a loss that is NaN or Inf; use a smaller lr or leave the stage out")
                loss.backward()
                for _ in windows:
                    tick(f"training, epoch {epoch} of {stage.epochs}, {stage.objective.name} {loss.item():.3f}")
                optimizer.step()
                schedule.step()
    parameters.commit()
    return parameters.notes
