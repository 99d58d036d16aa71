"""The whole run: check, stages, guard, save, reload, compare. What ``lowbit quantize`` and ``lowbit.quantize`` do.

Everything that can be known to be wrong is found before the first block; everything that goes wrong later leaves a
partial directory that the same command continues; nothing that looks like a checkpoint exists before the reloaded model
has been compared with the one that was measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowbit.checkpoints import native
from lowbit.checkpoints.companions import copy_companions
from lowbit.checkpoints.export import export
from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.model_card import write_card
from lowbit.data import Bos, CalibrationText
from lowbit.evaluation import output_error
from lowbit.evaluation.forward import logits_of
from lowbit.guard import Reference, judge, measure
from lowbit.job import NATIVE, Job, prepare
from lowbit.modules import restore
from lowbit.plan.kept import KeepDtype
from lowbit.progress import Progress, silent
from lowbit.recipes import Recipe, Train
from lowbit.report import MAX_KL, BrokenModel, QuantizeReport, larger_than_source, refusal
from lowbit.stages.blockwise import Broken
from lowbit.stages.follow import follow
from lowbit.stages.journal import Journal, OnOpen, unheard
from lowbit.stages.merge import merge
from lowbit.stages.run import Run
from lowbit.stages.spread import Spread, spread_over
from lowbit.stages.stream import CannotStream
from lowbit.steps.precision import continue_with
from lowbit.surroundings import own_settings
from lowbit.training import Processes, launched, leads

RELOAD_TOLERANCE = 1e-4  # relative squared difference of logits; equal up to the order of float32 sums


def quantize(
    model: str | PathLike[str] | PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    calibration: CalibrationText | None = "python-docs",
    *,
    out: str | PathLike[str],
    samples: int = 32,
    seq_len: int = 512,
    bos: Bos = "auto",
    ram_limit: int = 2**32,
    keep_dtype: KeepDtype = "auto",
    max_kl: float = MAX_KL,
    max_bits: float = inf,
    allow_broken: bool = False,
    restart: bool = False,
    format: str = "native",
    ray: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantizes ``model`` by ``recipe`` and writes a packed checkpoint to ``out``.

    Args:
        model: a local directory, hub id, ``.gguf`` file, ``smollm2-135m``, or a transformers model in memory.
        recipe: a Recipe, a method's name or mix (``"awq+gptq"``), a recipe file, or its data.
        calibration: text (see :func:`lowbit.texts.load_text`), a list of texts, ids ``[N, T]``, or None for recipes that need
            none. An importance matrix of llama.cpp stands for the text of a recipe that reads only squares of inputs.
        samples, seq_len: how many windows of how many tokens of the text.
        bos: whether every window begins with the model's first token: ``auto`` (as its tokenizer has it), ``yes``, ``no``.
        ram_limit: bytes of activations in memory; more go to memory-mapped files beside the target.
        keep_dtype: the dtype of tensors that are not quantized: ``auto`` (each keeps its own), or ``float32``, ``bfloat16``,
            ``float16``: those with more bytes an element are cast to it. Nothing is widened.
        max_kl: mean KL divergence in nats beyond which the result counts as broken.
        max_bits: stored bits for each quantized weight beyond which a recipe is refused, before the work if they are known
            then; otherwise the result counts as broken.
        allow_broken: write it all the same, with the findings in its card.
        restart: discard an unfinished run of the same target instead of continuing it.
        format: the file format of the result (:func:`lowbit.export`). One with an option such as ``gguf:q4_k_m`` also says the
            number format of every matrix, in place of the recipe's.
        ray: the address of a Ray cluster that solves blocks side by side, or ``local``, for recipes whose blocks do not depend on each
            other (:mod:`lowbit.stages.spread`); the result has the same bytes. None: this process alone. Extra ``ray``.

    Raises:
        BrokenModel: the guard refused the result; no checkpoint was written.
        ValueError: bad input, found before any work. An interrupted run (also by Ctrl-C) continues when repeated.
    """
    job = prepare(
        model,
        recipe,
        calibration,
        out=out,
        samples=samples,
        seq_len=seq_len,
        bos=bos,
        keep_dtype=keep_dtype,
        max_bits=max_bits,
        format=format,
        trust_remote_code=trust_remote_code,
    )
    report = run(job, ram_limit, max_kl, allow_broken, restart, progress, ray)
    return (
        report
        if not leads()
        else exported(report, format, Path(out).expanduser().resolve(), trust_remote_code=trust_remote_code)
    )


def exported(report: QuantizeReport, format: str, out: Path, *, trust_remote_code: bool = False) -> QuantizeReport:
    """The report of a finished run whose checkpoint, where ``format`` is another one, is then written in it to ``out``.

    Raises:
        ValueError: it cannot be written; the native checkpoint stays where the message says.
    """
    if find_format(format).name == NATIVE:
        return report
    assert report.out is not None
    try:
        written = export(report.out, format, out=out, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{error}. The quantized model is in {report.out}") from error
    shutil.rmtree(report.out)
    return replace(report, out=out, bytes=written.bytes)


@own_settings()
def run(
    job: Job,
    ram_limit: int,
    max_kl: float,
    allow_broken: bool,
    restart: bool,
    progress: Progress | None = None,
    ray: str | None = None,
    on_open: OnOpen = unheard,
) -> QuantizeReport:
    """The stages and all that follows them, for a request that has been checked.

    Where a launcher started several processes and the recipe trains, the first one does all of it, and the others take their share of
    the training.
    """
    together = launched() > 1 and any(isinstance(stage, Train) for stage in job.recipe.stages)
    if together and not Processes.here().first:
        ids, held_out = job.windows()
        return follow(job.plan, ids, held_out, None if job.calibration is None else job.calibration.further, job.out)
    with nullcontext() if ray is None else spread_over(ray, job.plan) as elsewhere:
        report = _alone(job, ram_limit, max_kl, allow_broken, restart, progress, elsewhere, on_open)
    if together:
        Processes.here().tell(report)
    return report


def _alone(
    job: Job,
    ram_limit: int,
    max_kl: float,
    allow_broken: bool,
    restart: bool,
    progress: Progress | None,
    elsewhere: Spread | None,
    on_open: OnOpen,
) -> QuantizeReport:
    if job.plan.problems and not allow_broken:
        raise BrokenModel(
            f"{'; '.join(job.plan.problems)}. {job.source.name} would stay as large as it is; repeat with --allow-broken to "
            "quantize the few linears all the same"
        )
    begun = Journal(job.out, job.header).begun
    if begun and not restart and {**begun, "products": None} == {**job.header, "products": None}:
        continue_with(begun.get("products", ""))
    journal = Journal(job.out, job.header)
    journal.open(restart=restart)
    try:
        on_open(journal)
        return _run(job, journal, ram_limit, max_kl, allow_broken, progress, elsewhere)
    finally:
        journal.close()


def _run(
    job: Job,
    journal: Journal,
    ram_limit: int,
    max_kl: float,
    allow_broken: bool,
    progress: Progress | None,
    elsewhere: Spread | None,
) -> QuantizeReport:
    ids, held_out = job.windows()
    further = None if job.calibration is None else job.calibration.further
    given = {} if job.importance is None else job.importance.entries
    running = Run(
        job.plan,
        ids,
        journal,
        ram_limit,
        progress or silent,
        job.calibration is None,
        held_out,
        further,
        elsewhere=elsewhere,
        given=given,
    )
    walk = running.walk
    try:
        try:
            running.stages()
        except CannotStream:  # nothing is lost, and a run without text may follow
            journal.discard()
            raise
        except Broken as error:
            worst = max((x for b in walk.records for x in b.layers), key=lambda x: x.error or 0, default=None)
            culprit = f"; the worst layer so far is {worst.name}" if worst else ""
            raise BrokenModel(f"{error}{culprit}. Try more bits, smaller groups or another method") from error
        job.warnings.extend(running.notes)
        kl, agreement, reference = measure(running, progress)
        report = judge(job, running, kl, agreement, max_kl)
        if report.problems and not allow_broken:
            raise BrokenModel(refusal(report, journal.directory.name), report)
        return _finish(job, running, report, reference)
    finally:
        running.close()


def _finish(job: Job, running: Run, report: QuantizeReport, reference: Reference | None) -> QuantizeReport:
    """Config, index, card and tokenizer into the partial directory; reload and compare there; then the rename."""
    journal, directory = running.journal, running.journal.directory
    shards = merge(running.result, running.description.guarded)
    native.write_checkpoint(directory, job.source.config, running.description, shards, job.plan.kept.dtype)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(directory)
    copy_companions(job.source.path, directory, code=job.source.trust_remote_code)
    weights = sum((directory / name).stat().st_size for name in shards)
    bits = native.model_bits_per_weight(directory, unfinished=True)
    report = replace(report, out=job.out, bytes=weights, model_bits_per_weight=bits)
    if weights > job.source_bytes and job.recipe.changes_weights:
        larger = larger_than_source(weights, job.source_bytes, running.rest.packed, job.plan.kept.dtype)
        report = replace(report, warnings=(*report.warnings, larger))
    write_card(directory, report.to_dict() | {"out": None}, job.header, job.source.name, job.source.path)
    _check_reloaded(directory, reference, job.source.trust_remote_code)
    shutil.rmtree(directory / "scratch", ignore_errors=True)
    journal.finish()
    return report


@torch.no_grad()
def _check_reloaded(directory: Path, reference: Reference | None, trust_remote_code: bool) -> None:
    """Loads what was saved; ``reference``: what to compare with, None where none were measured."""
    reloaded = native.load(directory, dtype=torch.float32, unfinished=True, trust_remote_code=trust_remote_code)
    if reference is None:
        return
    ids_T, measured, logits = reference
    restore(reloaded)  # by the kernels that measured: others round elsewhere, and activations of 4 bits make much of it
    error = output_error(logits, logits_of(reloaded, ids_T)[measured])
    if not error < RELOAD_TOLERANCE:
        raise BrokenModel(
            f"the reloaded checkpoint does not compute what was measured (relative error {error:.3g}); this is a defect of "
            f"lowbit or of the disk. {directory} is kept for inspection and is not a finished checkpoint"
        )
