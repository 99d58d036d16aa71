"""The stage Train: a packed model is loaded once, whole, trained, and its shards are written again.

The loss, the parameters and the optimizer are values of :mod:`lowbit.training`; :mod:`lowbit.stages.descent` is the loop that
joins them. Here is what it reads and writes: the packed model, the text, the original model, the state of a training that was
killed, and the trained shards. Where the packed model and the texts come from says a :class:`Setting`: the stage before
(:class:`AfterWalk`), or a checkpoint that is there (:mod:`lowbit.retraining`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

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
from lowbit.training import Answer, Curve, Parameters, Processes, Start, StoredAnswers, Text, draw_curve

Texts = AbstractContextManager[tuple[Text, Text | None]]
"""The text to train on, and the one to measure on, or None; open while they are read."""


class Setting(Protocol):
    """What a Train stage is given by the run that it is part of."""

    @property
    def seed(self) -> int:
        """Of the recipe."""
        ...

    @property
    def architecture(self) -> Any:
        """Of the model."""
        ...

    def model(self, files: Sequence[Path]) -> PreTrainedModel:
        """The packed model that these shards make, everything else in float32."""
        ...

    def start(self, stage: Train, dtypes: Mapping[str, torch.dtype]) -> Start:
        """What the parameters of ``stage`` start from; ``dtypes``: those in which vectors are stored, by name."""
        ...

    def dtype_of(self, name: str) -> torch.dtype:
        """That in which a parameter is stored."""
        ...

    def cache(self) -> KVFormats:
        """The formats of the model's cache."""
        ...

    def texts(self, stage: Train) -> Texts:
        """What is trained and measured on. The original is loaded when it is first asked."""
        ...


@dataclass
class Training:
    """One Train stage of a run.

    Args:
        stage: what to do.
        setting: what it is done to.
        source: the shards of the model to train.
        section: where the trained shards go.

    Attributes:
        parameters: what was trained, from then until it is written.
    """

    stage: Train
    setting: Setting
    source: Sequence[Path]
    section: Section
    progress: Progress
    parameters: Parameters | None = None

    def run(self) -> tuple[PreTrainedModel, list[str]]:
        """Trains, unless the journal has all shards; the model as its shards make it (float32, packed), and notes."""
        source, section = self.source, self.section
        for i, entry in enumerate(section.finished):
            expected = i < len(source) and entry["file"] == section.unit_name(i, len(source))
            if not expected or not isinstance(entry["record"].get("notes"), list):
                section.forget(i)  # the journal was damaged
                break
        if len(section.finished) >= len(source):
            Processes.here().tell(None)
        else:
            model = self.setting.model(source)
            Processes.here().tell(section.journal.finished)  # other processes load it too
            notes = self._train(model)
            state = model.state_dict()
            for i in range(len(section.finished), len(source)):
                headers = read_shard_header(source[i])
                # The guard of a checkpoint has no values; it is written again at the end.
                tensors = {name: state[name].to(header.dtype) for name, header in headers.items() if header.nbytes}
                section.write(section.unit_name(i, len(source)), tensors, {"notes": notes})
            self.parameters = None
            del model, state  # or two models are in memory when the shards are loaded
        self._path("state").unlink(missing_ok=True)
        draw_curve(self._path("jsonl"), self._path("svg"))
        trained = self.setting.model([section.directory / file for file in section.files])
        return trained, section.finished[0]["record"]["notes"]

    def take_part(self) -> None:
        """Takes this process's share of the steps of the first one, which does all the rest."""
        self._train(self.setting.model(self.source))

    def _train(self, model: PreTrainedModel) -> list[str]:
        """Changes ``model`` in place; returns notes for the report."""
        setting, notes = self.setting, []
        kept = {name: setting.dtype_of(name) for name, p in model.named_parameters() if p.dim() == 1}
        with setting.texts(self.stage) as (text, held_out):
            if self.stage.tokens and text.ids_NT.numel() < self.stage.tokens:
                notes = [
                    f"trained {self.stage.tokens / text.ids_NT.numel():.2g} times on the same {text.ids_NT.numel()} tokens"
                ]
            if self.stage.top_k is not None and self.stage.compares:
                text = self._stored(text, "answers", notes)
                held_out = None if held_out is None else self._stored(held_out, "held-out.answers")
            if self.stage.measures and held_out is None:
                notes.append("no text is left to measure a training on: its last state is kept")
            descent = Descent(
                model,
                self.stage,
                text,
                held_out,
                setting.start(self.stage, kept),
                block_modules(model, setting.architecture),
                setting.seed,
                StateFile(self._path("state"), partial(self.section.journal.place, self._path("state").name)),
                partial(Curve, self._path("jsonl"), self._path("tensorboard")),
                self.progress,
            )
            cache = setting.cache() if self.stage.cache else KVFormats()
            with simulated_cache(model, cache, self.stage.what.cache_gradients):
                notes += descent.run()
                self.parameters = descent.parameters
        Processes.here().meet()  # the first one writes over what the others load
        return notes

    def _stored(self, text: Text, kind: str, notes: list[str] | None = None) -> Text:
        """``text`` with the original's likeliest tokens, which a file keeps, in place of the original; ``notes`` gets what that
        loses."""
        k, processes, file = self.stage.top_k, Processes.here(), self._path(kind)
        assert k is not None
        if not processes.first:
            processes.told()
        stored = StoredAnswers.load(file)
        if processes.first and stored is None:
            stored = StoredAnswers.of(text.original, len(text), k, self.progress)
            self.section.journal.place(file.name, stored.save)
        if processes.first:
            processes.tell(None)
        assert stored is not None, file
        if notes is not None:
            notes.append(
                f"the original is kept as its {k} likeliest tokens, which lie {stored.lost:.2g} nats a token from all of it"
            )
        return Text(text.ids_NT, stored)

    def _path(self, kind: str) -> Path:
        return self.section.directory / f"training-{self.section.stage + 1}.{kind}"


@dataclass
class AfterWalk:
    """A Train stage behind the stage Blockwise of the same run.

    Args:
        walk: finished: it knows the original model's logits.
        described: the packed model.
        source: the section of the stage before, whose shards are the model to train.
        further: windows of training text ``[M, S]`` that are no calibration windows; None: there are none.
    """

    walk: Walk
    described: ModelDescription
    source: Section
    further: Tensor | None = None

    @property
    def seed(self) -> int:
        return self.walk.recipe.seed

    @property
    def architecture(self) -> Any:
        return self.walk.architecture

    def model(self, files: Sequence[Path]) -> PreTrainedModel:
        return read_back(self.walk.plan, self.source, self.described, [file.name for file in files])

    def start(self, stage: Train, dtypes: Mapping[str, torch.dtype]) -> Start:
        return Start(self.walk.latents() if stage.needs_latents else {}, dtypes)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.walk.plan.kept.dtype_of(name)

    def cache(self) -> KVFormats:
        return fitted_cache(self.walk.source, self.source, self.walk.recipe.scheme.cache)

    @contextmanager
    def texts(self, stage: Train) -> Iterator[tuple[Text, Text | None]]:
        walk = self.walk
        assert walk.ids is not None and walk.stream is not None
        ids, held_out = walk.ids[: walk.calibrated], walk.ids[walk.calibrated :]
        ids = training_text(stage, ids, self.further)
        reads = stage.compares and (stage.objective.reads_original or len(held_out) > 0)
        if not reads:
            yield plain_texts(ids, held_out)
            return
        if stage.tokens is not None or stage.objective.reads_hidden:
            yield whole_texts(stage, ids, held_out, partial(walk.source.load_full))
            return
        with walk.stream.loaded_outside(walk.source):
            first = Text(ids, lambda i: self._streamed(i))
            yield first, Text(held_out, lambda i: self._streamed(walk.calibrated + i)) if len(held_out) else None

    def _streamed(self, w: int) -> Answer:
        """The original's logits for calibration window ``w``, from its hidden states behind the last block."""
        assert self.walk.ids is not None
        return Answer(self.walk.logits_of(self.walk.ids[w : w + 1], self.walk.hidden("fp", w)))


def training_text(stage: Train, calibration: Tensor, further: Tensor | None) -> Tensor:
    """The windows that ``stage`` trains on: ``further`` ones where it asks for tokens and there are some."""
    if not stage.tokens or further is None:
        return calibration
    return further[: stage.windows(further.shape[1])[0]]


def whole_texts(
    stage: Train, ids: Tensor, held_out: Tensor, load: Callable[[torch.dtype], PreTrainedModel]
) -> tuple[Text, Text | None]:
    """The texts with answers of the original, which ``load`` reads whole when it is first asked: in bfloat16 where the stage
    multiplies in it and the processor has instructions for it."""
    fast = stage.amp and has_bfloat16(torch.device("cpu"))
    original = _Original(partial(load, torch.bfloat16 if fast else torch.float32), stage.objective.reads_hidden)
    first, second = (partial(original.answer, each) for each in (ids, held_out))
    return Text(ids, first), Text(held_out, second) if len(held_out) else None


def plain_texts(ids: Tensor, held_out: Tensor) -> tuple[Text, Text | None]:
    """The texts for a stage that asks the original nothing."""
    return Text(ids, _nothing), Text(held_out, _nothing) if len(held_out) else None


def _nothing(i: int) -> Answer:
    raise AssertionError("this training asks the original nothing")


class _Original:
    """The original model, loaded when it is first asked.

    Args:
        load: it.
        hidden: whether hidden states are asked too.
    """

    def __init__(self, load: Callable[[], PreTrainedModel], hidden: bool):
        self._load, self._hidden = load, hidden

    @cached_property
    def _model(self) -> Any:
        return self._load().requires_grad_(False)

    @torch.no_grad()
    def answer(self, ids_NT: Tensor, i: int) -> Answer:
        asked = {"output_hidden_states": True} if self._hidden else {}
        output = self._model(input_ids=ids_NT[i : i + 1], use_cache=False, **asked)
        return Answer(output.logits[0], tuple(h[0] for h in output.hidden_states) if self._hidden else ())
