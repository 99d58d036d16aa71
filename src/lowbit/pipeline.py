"""The whole run: check, stages, guard, save, reload, compare. What ``lowbit quantize`` and ``lowbit.quantize`` do.

Everything that can be known to be wrong is found before the first block; everything that goes wrong later leaves a
partial directory that the same command continues; nothing that looks like a checkpoint exists before the reloaded model
has been compared with the one that was measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isnan, prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoints import native
from lowbit.checkpoints.companions import copy_companions
from lowbit.checkpoints.export import export
from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.locate import gguf_file
from lowbit.checkpoints.model_card import write_card
from lowbit.checkpoints.source import ModelSource
from lowbit.checkpoints.target import check_target
from lowbit.data import Bos, Calibration, calibration_of, drawn_tokens, ids_sha256
from lowbit.decoding.packed_cache import simulated_cache
from lowbit.evaluation import output_error
from lowbit.evaluation.forward import logits_of, through
from lowbit.modules import restore
from lowbit.numerics import to_dict
from lowbit.numerics.divergence import kl_and_agreement
from lowbit.plan.cache import cache_bits
from lowbit.plan.for_format import plan_for, why_not
from lowbit.plan.kept import KeepDtype
from lowbit.plan.model_plan import ModelPlan
from lowbit.progress import Progress, silent
from lowbit.recipes import Recipe, Train, as_recipe
from lowbit.report import (
    MAX_KL,
    BrokenModel,
    QuantizeReport,
    beyond_asked,
    grouped,
    larger_than_source,
    losses,
    other_problems,
    refusal,
)
from lowbit.stages.blockwise import Broken, Walk
from lowbit.stages.follow import follow
from lowbit.stages.journal import Journal, settle
from lowbit.stages.merge import merge
from lowbit.stages.run import Run
from lowbit.stages.stream import CannotStream, check_blocks_run_alone
from lowbit.steps.precision import continue_with, product_type
from lowbit.surroundings import own_settings
from lowbit.training import Processes, launched, leads
from lowbit.version import __version__

_ORDINALS = {2: "second", 3: "third", 4: "fourth"}
_Reference = tuple[Tensor, slice, Tensor]
"""Of the last watched window: ids ``[T]``, the positions measured, and the logits there ``[M, V]``."""
NATIVE = native.Native.name
RELOAD_TOLERANCE = 1e-4  # relative squared difference of logits; equal up to the order of float32 sums


@dataclass
class Job:
    """A checked request: everything that a run needs, and nothing has been loaded yet."""

    plan: ModelPlan
    calibration: Calibration | None
    tokenizer: Any
    out: Path
    source_bytes: int
    warnings: list[str] = field(default_factory=list)
    max_bits: float = inf

    @property
    def source(self) -> ModelSource:
        return self.plan.source

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    def windows(self) -> tuple[Tensor, int]:
        """All windows of a run, and how many of them, at the end, no step sees. A run without text has drawn tokens."""
        if self.calibration is None:
            return drawn_tokens(self.source), 0
        if self._held_out is None:
            return self.calibration.ids, 0
        return torch.cat([self.calibration.ids, self._held_out]), len(self._held_out)

    @property
    def _held_out(self) -> Tensor | None:
        """Windows that only the result is measured on. Where no step reads text, those of the calibration serve."""
        return None if self.calibration is None or not self.recipe.reads_text else self.calibration.held_out

    @property
    def header(self) -> dict[str, Any]:
        """What determines the bytes of the result, its report included; a partial run is continued only where all of it is the same."""
        further = None if self.calibration is None else self.calibration.further
        return {
            "lowbit": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "model": self.source.fingerprint,
            "recipe": to_dict(self.recipe),
            "products": product_type(torch.device("cpu"), self.recipe.compute),
            "keep_dtype": self.plan.kept.choice,
            "calibration": None if self.calibration is None else self.calibration.sha256,
            "held_out": None if self._held_out is None else ids_sha256(self._held_out),
        } | ({} if further is None else {"training": ids_sha256(further)})


@own_settings()
def prepare(
    model: str | PathLike[str] | PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    calibration: str | Sequence[str] | Tensor | Calibration | None,
    *,
    out: str | PathLike[str],
    samples: int = 32,
    seq_len: int = 512,
    bos: Bos = "auto",
    keep_dtype: KeepDtype = "auto",
    max_bits: float = inf,
    format: str = "native",
    trust_remote_code: bool = False,
) -> Job:
    """Checks recipe, target, model and text, in the order of what is cheapest to find out. Arguments as of :func:`quantize`.

    The run of another format than the native one leaves a native checkpoint beside its target, which :func:`exported` replaces.

    Raises:
        ValueError: the first thing that is wrong, with what to do.
    """
    recipe, out, file_format = as_recipe(recipe), Path(out).expanduser().resolve(), find_format(format)
    if file_format.name != NATIVE:
        check_target(out)
        out = _beside(out)
    settle(out)
    check_target(out)
    plan = plan_for(model, recipe, format, keep_dtype=keep_dtype, trust_remote_code=trust_remote_code)
    recipe = plan.recipe
    if file_format.name != NATIVE and (reason := why_not(plan, file_format)):
        raise ValueError(f"the result could not be written as {file_format.title}: {reason}")
    if recipe.changes_weights and not any(block.formats for block in plan.blocks):
        raise ValueError(
            f"recipe {recipe.name!r} quantizes no linear of this model: every rule skips; leave an override out"
        )
    gguf = gguf_file(model)
    source_bytes = sum(x.nbytes for x in plan.source.headers.values()) if gguf is None else gguf.stat().st_size
    job = Job(plan, None, None, out, source_bytes, [*plan.architecture.warnings, *plan.source.warnings], max_bits)
    if max_bits < inf and (planned := _planned_bits(plan)) > max_bits:
        raise ValueError(
            f"recipe {recipe.name!r} stores {planned:.3f} bits a weight in this model, over the limit {max_bits:g}; choose "
            "fewer bits, larger groups or another method, or raise max_bits"
        )
    if calibration is None and recipe.needs_calibration:
        raise ValueError(
            f"recipe {recipe.name!r} needs calibration text: pass a file, python-docs, a hub dataset or self"
        )
    if any(isinstance(stage, Train) and stage.cache for stage in recipe.stages):
        with simulated_cache(plan.source.skeleton(), recipe.scheme.cache):  # refused here where it cannot be simulated
            pass
    if calibration is not None:
        if recipe.changes_weights:
            check_blocks_run_alone(plan.architecture)
        job.calibration = calibration_of(
            plan.source, calibration, samples, seq_len, bos, further=recipe.training_windows(seq_len)
        )
        job.warnings.extend(job.calibration.warnings)
        _check_windows(recipe, job.calibration.ids.shape[1])
    job.tokenizer = plan.source.tokenizer_if_any()
    return job


def _check_windows(recipe: Recipe, tokens: int) -> None:
    """Checks that calibration windows have tokens that the cache packs, where only those count. Raises ValueError."""
    formats = recipe.scheme.cache
    sinks = [spec.sink for spec in (formats.kv, *(rule.kv for rule in formats.overrides)) if spec is not None]
    if any(stage.fit.skips_sinks for stage in recipe.cache_stages) and tokens <= max(sinks):
        raise ValueError(
            f"calibration windows of {tokens} tokens have none behind the first {max(sinks)}, which the cache keeps as they are; "
            "raise seq_len"
        )


def _planned_bits(plan: ModelPlan) -> float:
    """Stored bits for each quantized weight, as far as they are known before the work."""
    bits = sum(plan.description(layer).stored_bits + 8 * layer.order_bytes for *_, layer in plan.layers)
    return bits / max(1, sum(prod(block.shapes[path]) for block in plan.blocks for path in block.formats))


def _asked_bits(plan: ModelPlan) -> float:
    """Bits of the codes of each quantized weight: what a recipe is named by."""
    every = [
        (prod(block.shapes[path]), form.weight.grid.bits)
        for block in plan.blocks
        for path, form in block.formats.items()
    ]
    return sum(weights * bits for weights, bits in every) / max(1, sum(weights for weights, _ in every))


def quantize(
    model: str | PathLike[str] | PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    calibration: str | Sequence[str] | Tensor | Calibration | None = "python-docs",
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
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantizes ``model`` by ``recipe`` and writes a packed checkpoint to ``out``.

    Args:
        model: a local directory, hub id, ``.gguf`` file, ``smollm2-135m``, or a transformers model in memory.
        recipe: a Recipe, a method's name or mix (``"awq+gptq"``), a recipe file, or its data.
        calibration: text (see :func:`lowbit.data.load_text`), a list of texts, ids ``[N, T]``, or None for recipes that need
            none.
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
    report = run(job, ram_limit, max_kl, allow_broken, restart, progress)
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


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.native")


@own_settings()
def run(
    job: Job, ram_limit: int, max_kl: float, allow_broken: bool, restart: bool, progress: Progress | None = None
) -> QuantizeReport:
    """The stages and all that follows them, for a request that has been checked.

    Where a launcher started several processes and the recipe trains, the first one does all of it, and the others take their share of
    the training.
    """
    together = launched() > 1 and any(isinstance(stage, Train) for stage in job.recipe.stages)
    if together and not Processes.here().first:
        ids, held_out = job.windows()
        return follow(job.plan, ids, held_out, None if job.calibration is None else job.calibration.further, job.out)
    report = _alone(job, ram_limit, max_kl, allow_broken, restart, progress)
    if together:
        Processes.here().tell(report)
    return report


def _alone(
    job: Job, ram_limit: int, max_kl: float, allow_broken: bool, restart: bool, progress: Progress | None
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
        return _run(job, journal, ram_limit, max_kl, allow_broken, progress)
    finally:
        journal.close()


def _run(
    job: Job, journal: Journal, ram_limit: int, max_kl: float, allow_broken: bool, progress: Progress | None
) -> QuantizeReport:
    ids, held_out = job.windows()
    further = None if job.calibration is None else job.calibration.further
    running = Run(job.plan, ids, journal, ram_limit, progress or silent, job.calibration is None, held_out, further)
    walk = running.walk
    try:
        try:
            running.stages()
        except CannotStream:  # nothing is lost, and a run without text may follow
            if not journal.finished:
                shutil.rmtree(journal.directory)
            raise
        except Broken as error:
            worst = max((x for b in walk.records for x in b.layers), key=lambda x: x.error or 0, default=None)
            culprit = f"; the worst layer so far is {worst.name}" if worst else ""
            raise BrokenModel(f"{error}{culprit}. Try more bits, smaller groups or another method") from error
        job.warnings.extend(running.notes)
        kl, agreement, reference = _measure(running, progress)
        report = _report(job, running, kl, agreement, max_kl)
        if report.problems and not allow_broken:
            raise BrokenModel(refusal(report, journal.directory.name), report)
        return _finish(job, running, report, reference)
    finally:
        running.close()


@torch.no_grad()
def _measure(running: Run, progress: Progress | None) -> tuple[float | None, float | None, _Reference | None]:
    """KL and agreement on the watched windows, at the measured positions, and what to compare a reload with.

    A model whose cache is quantized is measured through it.
    """
    if running.walk.ids is None:
        return None, None, None
    kls, agreements, reference = [], [], None
    for ids_T, original, quantized in _logits(running):
        kl_T, agree_T = kl_and_agreement(original, quantized)
        kls.append(kl_T)
        agreements.append(agree_T.double())
        reference = ids_T, running.walk.measured, quantized
        if progress is not None:
            progress(len(kls), len(running.walk.watched), "comparing with the original")
    return torch.cat(kls).mean().item(), torch.cat(agreements).mean().item(), reference


def _logits(running: Run) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``(ids [T], original logits [M, V], quantized logits [M, V])`` of the watched windows, at the measured positions.

    The quantized model is the one that the walk left behind, or the whole one where a later stage changed it or its cache is
    quantized. Where no weight changed the original is the same model without a cache.
    """
    walk, model = running.walk, running.finished_model()
    if model is not None:
        restore(model)  # as the reload that it is compared with
    if not running.recipe.changes_weights:
        assert walk.ids is not None and model is not None
        for w in walk.watched:
            original, quantized = (logits_of(model, walk.ids[w], cached=cached) for cached in (False, True))
            yield walk.ids[w], original[walk.measured], quantized[walk.measured]
        return
    for ids_T, original, quantized in walk.logits():
        yield ids_T, original, quantized if model is None else logits_of(model, ids_T)[walk.measured]


def _report(job: Job, running: Run, kl: float | None, agreement: float | None, max_kl: float) -> QuantizeReport:
    walk = running.walk
    layers = [layer for block in walk.records for layer in block.layers]
    weights = sum(layer.weights for layer in layers)
    bits = sum(layer.bits_per_weight * layer.weights for layer in layers) / max(1, weights)
    promised = sum(prod(block.shapes[path]) for block in job.plan.blocks for path in block.formats)
    notes = {note for block in walk.records for note in block.notes}
    notes |= {f"{layer.name}: {note}" for layer in layers for note in layer.notes}
    report = QuantizeReport(
        out=None,
        recipe=job.recipe,
        calibration="none" if job.calibration is None else f"{job.calibration.name}, {list(job.calibration.ids.shape)}",
        asked_bits=_asked_bits(job.plan),
        bits_per_weight=bits,
        model_bits_per_weight=0.0,
        bytes=0,
        source_bytes=job.source_bytes,
        kl=kl,
        top1_agreement=agreement,
        measured_on=_measured_on(job, running),
        cache_bits=cache_bits(job.source.config, running.description.cache),
        coverage=weights / max(1, job.plan.matrices),
        outside_cost=walk.outside_cost if walk.packs_outside else None,
        blocks=tuple(walk.records),
        warnings=(
            *job.warnings,
            *beyond_asked(bits, _asked_bits(job.plan)),
            *_outside_note(walk),
            *grouped(sorted(notes), {block.name for block in walk.records}),
        ),
    )
    lost = losses(report, max_kl)
    if job.calibration is None:  # drawn tokens are no text: what they show is said, and only NaN refuses
        said = [f"on {report.measured_on}: {text}" for value, text in lost if not isnan(value)]
        lost = [(value, text) for value, text in lost if isnan(value)]
        report = replace(report, warnings=(*report.warnings, *said))
    problems = [*job.plan.problems, *(text for _, text in lost), *other_problems(report, job.max_bits)]
    if weights < promised or (promised and not layers):
        problems.append(f"{weights:,} weights are quantized, the recipe promised {promised:,}")
    return replace(report, problems=tuple(problems))


def _measured_on(job: Job, running: Run) -> str:
    walk, cache = running.walk, running.description.cache
    if walk.ids is None:
        return "nothing"
    read = f", {through(cache)}" if cache else ""
    windows = f"{len(walk.watched)} windows of {walk.ids.shape[1]} tokens{read}"
    if walk.measured.step > 1:
        windows = f"every {_ORDINALS[walk.measured.step]} token of {windows}"
    if job.calibration is None:
        return f"{windows} drawn from the vocabulary"
    return f"{windows} of {job.calibration.name}, {'held out from' if walk.held_out else 'also used for'} calibration"


def _outside_note(walk: Walk) -> list[str]:
    limit, cost = walk.plan.outside.limit, walk.outside_cost
    if walk.packs_outside or limit is None or cost is None:
        return []
    return [
        f"the embedding and the head stay as they are: packed they would cost {cost:.2g} nats a token, over {limit:g}; "
        "--embedding-bits and --head-bits pack them all the same"
    ]


def _finish(job: Job, running: Run, report: QuantizeReport, reference: _Reference | None) -> QuantizeReport:
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
        larger = larger_than_source(weights, job.source_bytes, running.walk.packed_outside, job.plan.kept.dtype)
        report = replace(report, warnings=(*report.warnings, larger))
    write_card(directory, report.to_dict() | {"out": None}, job.header, job.source.name, job.source.path)
    _check_reloaded(directory, reference, job.source.trust_remote_code)
    shutil.rmtree(directory / "scratch", ignore_errors=True)
    journal.finish()
    return report


@torch.no_grad()
def _check_reloaded(directory: Path, reference: _Reference | None, trust_remote_code: bool) -> None:
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
