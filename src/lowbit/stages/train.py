"""The stage Train: a packed model is loaded once, whole, trained, and its shards are written again.

The loss, the parameters and the optimizer are values of :mod:`lowbit.training`; :mod:`lowbit.stages.descent` is the loop that
joins them. Here is what it reads and writes: the packed model of the stage before, the text, the original model, the state
of a training that was killed, and the trained shards.

The original model's logits come from the hidden states that the walk has streamed, where the calibration windows are
trained on. For further text the original is loaded once, whole: its hidden states would take more room than it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.architectures import block_modules
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.shards import read_shard_header
from lowbit.decoding.packed_cache import simulated_cache
from lowbit.modules import KVFormats
from lowbit.progress import Progress
from lowbit.recipes import Train
from lowbit.stages.blockwise import Walk
from lowbit.stages.descent import Descent, StateFile
from lowbit.stages.journal import Section
from lowbit.stages.whole import fitted_cache, read_back
from lowbit.steps.precision import has_bfloat16
from lowbit.training import Answer, Curve, Start, Text


@dataclass
class Training:
    """One Train stage of a run.

    Args:
        stage: what to do.
        walk: of the same run, finished: it knows the original model's logits.
        described: the packed model.
        source: the section of the stage before, whose shards are the model to train.
        section: where the trained shards go.
        further: windows of training text ``[M, S]`` that are no calibration windows; None: there are none.
    """

    stage: Train
    walk: Walk
    described: ModelDescription
    source: Section
    section: Section
    progress: Progress
    further: Tensor | None = None

    def run(self) -> tuple[PreTrainedModel, list[str]]:
        """Trains, unless the journal has all shards; the model as its shards make it (float32, packed), and notes."""
        source, section = self.source.files, self.section
        for i, entry in enumerate(section.finished):
            expected = i < len(source) and entry["file"] == section.unit_name(i, len(source))
            if not expected or not isinstance(entry["record"].get("notes"), list):
                section.forget(i)  # the journal was damaged
                break
        if len(section.finished) < len(source):
            model = read_back(self.walk.plan, section, self.described, source)
            notes = self._train(model)
            state = model.state_dict()
            for i in range(len(section.finished), len(source)):
                headers = read_shard_header(section.directory / source[i])
                tensors = {name: state[name].to(header.dtype) for name, header in headers.items()}
                section.write(section.unit_name(i, len(source)), tensors, {"notes": notes})
        self._path("state").unlink(missing_ok=True)
        trained = read_back(self.walk.plan, section, self.described, section.files)
        return trained, section.finished[0]["record"]["notes"]

    def _train(self, model: PreTrainedModel) -> list[str]:
        """Changes ``model`` in place; returns notes for the report."""
        walk, notes = self.walk, []
        kept = {name: walk.plan.kept.dtype_of(name) for name, p in model.named_parameters() if p.dim() == 1}
        with self._texts() as (text, held_out):
            if self.stage.tokens and text.ids_NT.numel() < self.stage.tokens:
                notes = [
                    f"trained {self.stage.tokens / text.ids_NT.numel():.2g} times on the same {text.ids_NT.numel()} tokens"
                ]
            if self.stage.measures and held_out is None:
                notes.append("no text is left to measure a training on: its last state is kept")
            descent = Descent(
                model,
                self.stage,
                text,
                held_out,
                Start(walk.latents() if self.stage.needs_latents else {}, kept),
                block_modules(model, walk.architecture),
                walk.recipe.seed,
                StateFile(self._path("state"), partial(self.section.journal.place, self._path("state").name)),
                partial(Curve, self._path("jsonl"), self._path("tensorboard")),
                self.progress,
            )
            with self._cache(model):
                return notes + descent.run()

    def _cache(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """While open, ``model`` computes through the recipe's quantized cache, where the stage asks for it."""
        formats = self.walk.recipe.scheme.cache if self.stage.cache else KVFormats()
        return simulated_cache(model, fitted_cache(self.walk.source, self.source, formats))

    def _path(self, kind: str) -> Path:
        return self.section.directory / f"training-{self.section.stage + 1}.{kind}"

    @contextmanager
    def _texts(self) -> Iterator[tuple[Text, Text | None]]:
        """The text to train on, and the one to measure on, or None."""
        walk, stage = self.walk, self.stage
        assert walk.ids is not None and walk.stream is not None
        ids, held_out = walk.ids[: walk.calibrated], walk.ids[walk.calibrated :]
        if stage.tokens and self.further is not None:
            ids = self.further[: stage.windows(self.further.shape[1])[0]]
        reads = stage.tokens != 0 and (stage.objective.reads_original or (stage.measures > 0 and len(held_out) > 0))
        if reads and (stage.tokens is not None or stage.objective.reads_hidden):
            original = self._whole_original()
            answers = [partial(_answer, original, each, stage.objective.reads_hidden) for each in (ids, held_out)]
            yield Text(ids, answers[0]), Text(held_out, answers[1]) if len(held_out) else None
            return
        with walk.stream.loaded_outside(walk.source) if reads else nullcontext():
            first = Text(ids, lambda i: self._streamed(i))
            yield first, Text(held_out, lambda i: self._streamed(walk.calibrated + i)) if len(held_out) else None

    def _streamed(self, w: int) -> Answer:
        """The original's logits for calibration window ``w``, from its hidden states behind the last block."""
        assert self.walk.ids is not None
        return Answer(self.walk.logits_of(self.walk.ids[w : w + 1], self.walk.hidden("fp", w)))

    def _whole_original(self) -> PreTrainedModel:
        """The original in memory, in bfloat16 where the stage multiplies in it and the processor has instructions for it."""
        fast = self.stage.amp and has_bfloat16(torch.device("cpu"))
        return self.walk.source.load_full(torch.bfloat16 if fast else torch.float32).requires_grad_(False)


@torch.no_grad()
def _answer(original: PreTrainedModel, ids_NT: Tensor, hidden: bool, i: int) -> Answer:
    asked = {"output_hidden_states": True} if hidden else {}
    output = original(input_ids=ids_NT[i : i + 1], use_cache=False, **asked)
    return Answer(output.logits[0], tuple(h[0] for h in output.hidden_states) if hidden else ())
