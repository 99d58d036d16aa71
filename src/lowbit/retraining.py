"""``lowbit.train``: the training stages of a recipe on a checkpoint that is packed already. Its formats stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.adapters import has_terms
from lowbit.architectures import for_config
from lowbit.checkpoints import native
from lowbit.checkpoints.companions import copy_companions
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.model_card import REPORT
from lowbit.checkpoints.original import check_original, original_doubts
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.checkpoints.target import check_target
from lowbit.data import Bos, Calibration, CalibrationText, calibration_of, ids_sha256
from lowbit.evaluation import output_error
from lowbit.evaluation.forward import evaluating, logits_of
from lowbit.modules import KVFormats, QuantLinear, kv_formats, restore
from lowbit.numerics import to_dict
from lowbit.numerics.divergence import kl_and_agreement, score_tokens
from lowbit.progress import Progress, silent
from lowbit.recipes import Recipe, Train, as_recipe
from lowbit.stages.follow import follow_stages
from lowbit.stages.journal import Journal, OnOpen, settle, unheard
from lowbit.stages.merge import merge
from lowbit.stages.train import Training, plain_texts, training_text, whole_texts
from lowbit.surroundings import own_settings
from lowbit.texts import own_strategy
from lowbit.training import NextToken, Processes, Start, Text, loss_in_pieces
from lowbit.version import __version__

_RELOAD_TOLERANCE = 1e-4  # relative squared difference of logits; equal up to the order of float32 sums
_COMPARED = 160
"""Tokens whose logits the reload must give: more than the usual window of a cache, few enough for their logits to be held twice."""


@dataclass(frozen=True)
class TrainReport:
    """What a training of a checkpoint gave.

    Attributes:
        out: the directory.
        recipe: name of the recipe whose stages ran.
        loss_before, loss: cross-entropy of the windows that were not trained on, nats a token, before and after.
        kl_before, kl: mean KL divergence from the original there; None without an original.
        measured_on: the text.
        warnings: what the user should know.
    """

    out: Path
    recipe: str
    loss_before: float
    loss: float
    kl_before: float | None
    kl: float | None
    measured_on: str
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"out": str(self.out)}


@dataclass
class TrainJob:
    """A checked request: the checkpoint's headers were read, and no weights."""

    source: ModelSource
    description: ModelDescription
    recipe: Recipe
    stages: tuple[Train, ...]
    calibration: Calibration
    against: ModelSource | None
    out: Path
    warnings: list[str] = field(default_factory=list)

    @property
    def header(self) -> dict[str, Any]:
        """What determines the bytes of the result."""
        text = self.calibration
        return {
            "lowbit": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "checkpoint": self.source.fingerprint,
            "original": None if self.against is None else self.against.fingerprint,
            "recipe": to_dict(self.recipe),
            "calibration": text.sha256,
            "held_out": None if text.held_out is None else ids_sha256(text.held_out),
            "training": None if text.further is None else ids_sha256(text.further),
        }


@own_settings()
def prepare_training(
    checkpoint: str | PathLike[str],
    recipe: Recipe | str | Path | Mapping[str, Any],
    text: CalibrationText = "python-docs",
    *,
    out: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    samples: int = 32,
    seq_len: int = 512,
    bos: Bos = "auto",
    trust_remote_code: bool = False,
) -> TrainJob:
    """Checks everything that can be known before weights are read.

    Args:
        checkpoint, recipe, text, out: as of :func:`train`.
        against: the original model, for objectives and measurements that compare with it.
        samples, seq_len, bos, trust_remote_code: as for :func:`lowbit.quantize`.

    Raises:
        ValueError: the first thing that is wrong, with what to do.
    """
    recipe, out = as_recipe(recipe), Path(out).expanduser().resolve()
    stages = tuple(stage for stage in recipe.stages if isinstance(stage, Train) and not stage.finds_rotations)
    if not stages:
        raise ValueError(
            f"recipe {recipe.name!r} has no stage that trains a packed model; `lowbit methods` lists those that do"
        )
    settle(out)
    check_target(out)
    source = open_model(checkpoint, trust_remote_code=trust_remote_code, allow_quantized=True)
    description = native.read_checkpoint(source.path).description
    if description is None:
        raise ValueError(f"{source.path} is not packed by lowbit; lowbit quantize packs it and trains it")
    layers = description.layers
    for stage in stages:
        name = type(stage.what).__name__
        if stage.what.needs_adapters and not any(has_terms(layer) for layer in layers.values()):
            raise ValueError(f"Train({name}()) trains low-rank terms, and no layer of {source.path} has any")
        if stage.compares and against is None:
            raise ValueError(
                f"recipe {recipe.name!r} compares with the original model: name it with against= (--against ORIGINAL)"
            )
        stage.what.check(list(dict.fromkeys(layer.spec for name, layer in _in_blocks(source, layers).items())))
    if isinstance(text, str) and own_strategy(text):
        raise ValueError(
            "a packed model writes no training text for itself; `lowbit generate-data ORIGINAL` writes some"
        )
    original = None if against is None else open_model(against, trust_remote_code=trust_remote_code)
    doubts: tuple[str, ...] = ()
    if against is not None:
        check_original(checkpoint, against, trust_remote_code=trust_remote_code)
        doubts = original_doubts(checkpoint, against, trust_remote_code=trust_remote_code)
    made = calibration_of(source, text, samples, seq_len, bos, further=recipe.training_windows(seq_len))
    return TrainJob(source, description, recipe, stages, made, original, out, [*doubts, *made.warnings])


def _in_blocks(source: ModelSource, named: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``named`` whose names are of modules inside the blocks."""
    prefix = f"{for_config(source.config).blocks}."
    return {name: value for name, value in named.items() if name.startswith(prefix)}


def train(
    checkpoint: str | PathLike[str],
    recipe: Recipe | str | Path | Mapping[str, Any],
    text: CalibrationText = "python-docs",
    *,
    out: str | PathLike[str],
    restart: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> TrainReport:
    """Runs the training stages of ``recipe`` on a packed checkpoint, in order. What packs in the recipe does not run, and the
    formats are those of the checkpoint.

    Latent weights start at what the codes stand for: a checkpoint does not keep what they were rounded from.

    Args:
        checkpoint: a directory that ``lowbit.quantize`` wrote.
        recipe: as for :func:`lowbit.quantize`.
        text: as the calibration of :func:`lowbit.quantize`: windows of it calibrate, some are held out, others are trained on.
        out: a new directory.
        options: ``against``, ``samples``, ``seq_len``, ``bos`` and ``trust_remote_code`` of :func:`prepare_training`.
        restart: discard an unfinished run of the same target instead of continuing it.

    Raises:
        ValueError: bad input, found before any work; a training that diverged. An interrupted run continues when repeated.
    """
    return run_training(
        prepare_training(checkpoint, recipe, text, out=out, **options), restart=restart, progress=progress
    )


@own_settings()
def run_training(
    job: TrainJob, *, restart: bool = False, progress: Progress = silent, on_open: OnOpen = unheard
) -> TrainReport:
    """The stages and all that follows them, for a request that has been checked.

    Where a launcher started several processes, the first one does all of it, and the others take their share of the training.
    """
    if not Processes.here().first:
        return _follow(job)
    report = _alone(job, restart, progress, on_open)
    Processes.here().tell(report)
    return report


def _alone(job: TrainJob, restart: bool, progress: Progress, on_open: OnOpen) -> TrainReport:
    journal = Journal(job.out, job.header)
    journal.open(restart=restart)
    try:
        on_open(journal)
        return _run(job, journal, progress)
    finally:
        journal.close()


def _follow(job: TrainJob) -> TrainReport:
    """Takes part in every training of the first process; returns its report."""
    setting = _Checkpoint(job, Journal(job.out, {}).directory)
    follow_stages(
        dict(enumerate(job.stages)), job.out, lambda number, journal: (setting, setting.files(journal, number))
    )
    return Processes.here().told()


@dataclass
class _Checkpoint:
    """The setting of a training on a checkpoint."""

    job: TrainJob
    directory: Path

    @property
    def seed(self) -> int:
        return self.job.recipe.seed

    @property
    def architecture(self) -> Any:
        return for_config(self.job.source.config)

    def files(self, journal: Journal, number: int) -> list[Path]:
        """The shards from which stage ``number`` starts: the checkpoint's, or those of the stage before."""
        if not number:
            return sorted({header.file for header in self.job.source.headers.values()})
        return [journal.directory / file for file in journal.section(number - 1).files]

    def model(self, files: Sequence[Path]) -> PreTrainedModel:
        source = self.job.source
        if files[0].parent != self.directory:
            return native.load(files[0].parent, dtype=torch.float32, trust_remote_code=source.trust_remote_code)
        if Processes.here().first:  # the others load what it wrote
            names = [file.name for file in files]
            native.write_checkpoint(self.directory, source.config, self.job.description, names, source.dtype)
        trust = source.trust_remote_code
        return native.load(self.directory, dtype=torch.float32, unfinished=True, trust_remote_code=trust)

    def start(self, stage: Train, dtypes: Mapping[str, torch.dtype]) -> Start:
        return Start(self._latents() if stage.needs_latents else {}, dtypes)

    def _latents(self) -> dict[str, Tensor]:
        """What the codes stand for, by name."""
        model: Any = native.load(self.job.source.path, trust_remote_code=self.job.source.trust_remote_code)
        restore(model)
        named = _in_blocks(self.job.source, dict(model.named_modules()))
        return {name: m.qtensor().dequantize() for name, m in named.items() if isinstance(m, QuantLinear)}

    def dtype_of(self, name: str) -> torch.dtype:
        return self.job.source.headers[name].dtype

    def cache(self) -> KVFormats:
        return self.job.description.cache

    @contextmanager
    def texts(self, stage: Train) -> Iterator[tuple[Text, Text | None]]:
        calibration, against = self.job.calibration, self.job.against
        ids = training_text(stage, calibration.ids, calibration.further)
        held_out = ids[:0] if calibration.held_out is None else calibration.held_out
        if stage.compares:
            assert against is not None
            yield whole_texts(stage, ids, held_out, against.load_full)
        else:
            yield plain_texts(ids, held_out)


def _run(job: TrainJob, journal: Journal, progress: Progress) -> TrainReport:
    """One packed model is in memory at a time: the one before is measured and dropped, and so is the trained one before the reload.
    The original, where there is one, is beside it while it is measured, and in a training that asks it."""
    setting, warnings = _Checkpoint(job, journal.directory), [*job.warnings]
    before = _measure(job, setting.model(setting.files(journal, 0)), progress)
    model = None
    for number, stage in enumerate(job.stages):
        files, model = setting.files(journal, number), None
        model, notes = Training(stage, setting, files, journal.section(number), progress).run()
        warnings.extend(notes)
    assert model is not None
    after = _measure(job, model, progress)
    restore(model)
    with evaluating(model):
        computed = logits_of(model, _windows(job)[0, :_COMPARED])
    del model
    (loss_before, kl_before), (loss_after, kl_after) = before, after
    figures = loss_before, loss_after, kl_before, kl_after
    warnings.extend(_worse(job.stages, *figures))
    report = TrainReport(job.out, job.recipe.name, *figures, _measured_on(job), tuple(warnings))
    return _finish(job, journal, report, computed)


def _windows(job: TrainJob) -> Tensor:
    """Those that the result is measured on: held out, or the first of the others."""
    held_out = job.calibration.held_out
    return job.calibration.ids[:1] if held_out is None else held_out


def _measure(job: TrainJob, model: Any, progress: Progress) -> tuple[float, float | None]:
    """Cross-entropy, and KL divergence from the original where there is one."""
    original = None if job.against is None else job.against.load_full().requires_grad_(False)
    windows, losses, kls = _windows(job), [], []
    with evaluating(model):
        for i, ids_T in enumerate(windows):
            if original is None and not kv_formats(model):  # the logits of a whole window may outweigh the model
                losses.append(loss_in_pieces(model, ids_T[None], NextToken()).item())
            else:
                logits_TV = logits_of(model, ids_T)
                losses.append(score_tokens(logits_TV[:-1], ids_T[1:]).nll.mean().item())
                if original is not None:
                    kls.append(kl_and_agreement(logits_of(original, ids_T), logits_TV)[0].mean().item())
            progress(i + 1, len(windows), "measuring")
    return _mean(losses), _mean(kls) if kls else None


def _worse(
    stages: Sequence[Train], loss_before: float, loss: float, kl_before: float | None, kl: float | None
) -> Iterator[str]:
    """A warning if what the training was to make smaller is larger."""
    what, before, after = "cross-entropy", loss_before, loss
    if kl is not None and kl_before is not None and stages[-1].judge == "original":
        what, before, after = "KL divergence from the original", kl_before, kl
    if not after <= before:
        yield (
            f"training made the model worse: its {what} was {before:.4f} and is {after:.4f}; use a smaller lr (it was "
            f"{stages[-1].lr:g}), more text, or more measures, of which the best state is kept"
        )


def _mean(values: list[float]) -> float:
    return torch.tensor(values).mean().item()


def _measured_on(job: TrainJob) -> str:
    windows = _windows(job)
    kept = "not trained on" if job.calibration.held_out is not None else "of the calibration"
    return f"{len(windows)} windows of {windows.shape[1]} tokens of {job.calibration.name}, {kept}"


def _finish(job: TrainJob, journal: Journal, report: TrainReport, computed_TV: Tensor) -> TrainReport:
    """Shards, config, card and tokenizer; then a reload that must compute ``computed_TV`` on the first tokens, and the rename."""
    directory, source = journal.directory, job.source
    shards = merge(journal.section(len(job.stages) - 1), job.description.guarded)
    native.write_checkpoint(directory, source.config, job.description, shards, source.dtype)
    if (tokenizer := source.tokenizer_if_any()) is not None:
        tokenizer.save_pretrained(directory)
    copy_companions(source.path, directory, code=source.trust_remote_code)
    before = json.loads((source.path / REPORT).read_text()) if (source.path / REPORT).is_file() else None
    said = {"training": report.to_dict() | {"out": None}, "header": job.header, "before": before}
    (directory / REPORT).write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    (directory / "README.md").write_text(_card(job, report))
    again = native.load(directory, dtype=torch.float32, unfinished=True, trust_remote_code=source.trust_remote_code)
    restore(again)
    with evaluating(again):
        error = output_error(computed_TV, logits_of(again, _windows(job)[0, :_COMPARED]))
    if not error < _RELOAD_TOLERANCE:
        raise ValueError(
            f"the reloaded checkpoint does not compute what was trained (relative error {error:.3g}); this is a defect of lowbit or "
            f"of the disk. {directory} is kept for inspection and is not a finished checkpoint"
        )
    journal.finish()
    return report


def _card(job: TrainJob, report: TrainReport) -> str:
    rows = [("cross-entropy, nats a token", report.loss_before, report.loss)]
    rows += (
        [] if report.kl is None else [("KL divergence from the original, nats a token", report.kl_before, report.kl)]
    )
    return "\n".join(
        [
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [lowbit, quantized]\n---",
            f"# {job.source.name}, trained with lowbit",
            "",
            f"The stages of {report.recipe!r} that train, on a packed checkpoint. Measured on {report.measured_on}.",
            "",
            "| measured | before | after |",
            "|---|---|---|",
            *(f"| {name} | {before:.4f} | {after:.4f} |" for name, before, after in rows),
            *(["", "## Warnings", "", *(f"* {text}" for text in report.warnings)] if report.warnings else []),
            "",
        ]
    )
