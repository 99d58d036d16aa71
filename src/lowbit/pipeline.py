"""The whole run: check, stages, guard, save, reload, compare. What ``lowbit quantize`` and ``lowbit.quantize`` do.

Everything that can be known to be wrong is found before the first block; everything that goes wrong later leaves a
partial directory that the same command continues; nothing that looks like a checkpoint exists before the reloaded model
has been compared with the one that was measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
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
from lowbit.checkpoints.locate import gguf_file
from lowbit.checkpoints.model_card import write_card
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.checkpoints.target import check_target
from lowbit.data import Bos, Calibration, calibration_of, drawn_tokens
from lowbit.evaluation import output_error
from lowbit.modules import restore
from lowbit.numerics import to_dict
from lowbit.numerics.divergence import kl_and_agreement
from lowbit.plan.model_plan import ModelPlan, lay_over
from lowbit.progress import Progress, silent
from lowbit.recipes import Recipe, as_recipe
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
from lowbit.stages.journal import Journal, settle
from lowbit.stages.run import Run
from lowbit.stages.stream import CannotStream, check_blocks_run_alone
from lowbit.steps.precision import product_type
from lowbit.surroundings import own_settings
from lowbit.version import __version__

_ORDINALS = {2: "second", 3: "third", 4: "fourth"}
_Reference = tuple[Tensor, slice, Tensor]
"""Of the last watched window: ids ``[T]``, the positions measured, and the logits there ``[M, V]``."""
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
        if self.calibration.held_out is None or not self.recipe.reads_inputs:
            return self.calibration.ids, 0
        return torch.cat([self.calibration.ids, self.calibration.held_out]), len(self.calibration.held_out)

    @property
    def header(self) -> dict[str, Any]:
        """What determines the bytes of the result; a partial run is continued only where all of it is the same."""
        return {
            "lowbit": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "model": self.source.fingerprint,
            "recipe": to_dict(self.recipe),
            "products": product_type(torch.device("cpu"), self.recipe.compute),
            "calibration": None if self.calibration is None else self.calibration.sha256,
        }


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
    max_bits: float = inf,
    trust_remote_code: bool = False,
) -> Job:
    """Checks recipe, target, model and text, in the order of what is cheapest to find out. Arguments as of :func:`quantize`.

    Raises:
        ValueError: the first thing that is wrong, with what to do.
    """
    recipe, out = as_recipe(recipe), Path(out).expanduser().resolve()
    settle(out)
    check_target(out)
    recipe.check_runs()
    plan = lay_over(open_model(model, trust_remote_code=trust_remote_code), recipe)
    if not any(block.formats for block in plan.blocks):
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
    if calibration is not None:
        check_blocks_run_alone(plan.architecture)
        job.calibration = calibration_of(plan.source, calibration, samples, seq_len, bos)
        job.warnings.extend(job.calibration.warnings)
    job.tokenizer = _tokenizer_if_any(plan.source)
    return job


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


def _tokenizer_if_any(source: ModelSource) -> Any:
    """The tokenizer to save with the checkpoint; a model may have none when it is calibrated on ids."""
    try:
        return source.tokenizer()
    except ValueError:
        return None


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
    max_kl: float = MAX_KL,
    max_bits: float = inf,
    allow_broken: bool = False,
    restart: bool = False,
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
        max_kl: mean KL divergence in nats beyond which the result counts as broken.
        max_bits: stored bits for each quantized weight beyond which a recipe is refused, before the work if they are known
            then; otherwise the result counts as broken.
        allow_broken: write it all the same, with the findings in its card.
        restart: discard an unfinished run of the same target instead of continuing it.

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
        max_bits=max_bits,
        trust_remote_code=trust_remote_code,
    )
    return run(job, ram_limit, max_kl, allow_broken, restart, progress)


@own_settings()
def run(
    job: Job, ram_limit: int, max_kl: float, allow_broken: bool, restart: bool, progress: Progress | None = None
) -> QuantizeReport:
    """The stages and all that follows them, for a request that has been checked."""
    if job.plan.problems and not allow_broken:
        raise BrokenModel(
            f"{'; '.join(job.plan.problems)}. {job.source.name} would stay as large as it is; repeat with --allow-broken to "
            "quantize the few linears all the same"
        )
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
    running = Run(job.plan, ids, journal, ram_limit, progress or silent, job.calibration is None, held_out)
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
        model, running.model = running.model, None
        if model is not None:
            restore(model)  # as the reload that it is compared with
        kl, agreement, reference = _measure(walk, model, progress)
        del model
        report = _report(job, walk, kl, agreement, max_kl)
        if report.problems and not allow_broken:
            raise BrokenModel(refusal(report, journal.directory.name), report)
        return _finish(job, walk, report, reference)
    finally:
        running.close()


@torch.no_grad()
def _measure(walk: Walk, model: Any, progress: Progress | None) -> tuple[float | None, float | None, _Reference | None]:
    """KL and agreement on the watched windows, at the measured positions, and what to compare a reload with.

    The quantized model is the one that the walk left behind, or ``model`` where a later stage changed it.
    """
    if walk.ids is None:
        return None, None, None
    kls, agreements, reference = [], [], None
    for ids_T, original, quantized in walk.logits():
        if model is not None:
            quantized = model(input_ids=ids_T[None], use_cache=False).logits[0, walk.measured]
        kl_T, agree_T = kl_and_agreement(original, quantized)
        kls.append(kl_T)
        agreements.append(agree_T.double())
        reference = ids_T, walk.measured, quantized
        if progress is not None:
            progress(len(kls), len(walk.watched), "comparing with the original")
    return torch.cat(kls).mean().item(), torch.cat(agreements).mean().item(), reference


def _report(job: Job, walk: Walk, kl: float | None, agreement: float | None, max_kl: float) -> QuantizeReport:
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
        measured_on=_measured_on(job, walk),
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
    if weights < promised or not layers:
        problems.append(f"{weights:,} weights are quantized, the recipe promised {promised:,}")
    return replace(report, problems=tuple(problems))


def _measured_on(job: Job, walk: Walk) -> str:
    if walk.ids is None:
        return "nothing"
    windows = f"{len(walk.watched)} windows of {walk.ids.shape[1]} tokens"
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


def _finish(job: Job, walk: Walk, report: QuantizeReport, reference: _Reference | None) -> QuantizeReport:
    """Config, index, card and tokenizer into the partial directory; reload and compare there; then the rename."""
    journal, directory = walk.journal, walk.journal.directory
    shards = journal.section(len(job.recipe.stages) - 1).files
    native.write_checkpoint(directory, job.source.config, walk.description, shards, job.source.dtype)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(directory)
    copy_companions(job.source.path, directory, code=job.source.trust_remote_code)
    files = (directory / name for name in (*shards, native.GUARD))
    weights = sum(file.stat().st_size for file in files if file.exists())
    bits = native.model_bits_per_weight(directory, unfinished=True)
    report = replace(report, out=job.out, bytes=weights, model_bits_per_weight=bits)
    if weights > job.source_bytes:
        larger = larger_than_source(weights, job.source_bytes, walk.packed_outside, job.source.dtype)
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
    error = output_error(logits, reloaded(input_ids=ids_T[None], use_cache=False).logits[0, measured])
    if not error < RELOAD_TOLERANCE:
        raise BrokenModel(
            f"the reloaded checkpoint does not compute what was measured (relative error {error:.3g}); this is a defect of "
            f"lowbit or of the disk. {directory} is kept for inspection and is not a finished checkpoint"
        )
