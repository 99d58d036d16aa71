"""The guard of a run: what the result computes beside the original, and whether it is broken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isnan, prod

import torch
from torch import Tensor

from lowbit.evaluation.forward import NOTHING_PACKED, logits_of, through
from lowbit.job import Job, asked_bits
from lowbit.modules import restore
from lowbit.numerics.divergence import kl_and_agreement
from lowbit.plan.cache import cache_bits
from lowbit.progress import Progress
from lowbit.report import QuantizeReport, beyond_asked, grouped, losses, other_problems
from lowbit.stages.rest import Rest
from lowbit.stages.run import Run

_ORDINALS = {2: "second", 3: "third", 4: "fourth"}
Reference = tuple[Tensor, slice, Tensor]
"""Of the last watched window: ids ``[T]``, the positions compared last, and the logits there ``[M, V]``."""


@torch.no_grad()
def measure(running: Run, progress: Progress | None) -> tuple[float | None, float | None, Reference | None]:
    """KL and agreement on the watched windows, at the measured positions, and what to compare a reload with.

    A model whose cache is quantized is measured through it.
    """
    if running.walk.ids is None:
        return None, None, None
    kls, agreements, reference = [], [], None
    ids_NT = running.walk.ids
    for w, at, original, quantized in _logits(running):
        kl_T, agree_T = kl_and_agreement(original, quantized)
        kls.append(kl_T)
        agreements.append(agree_T.double())
        reference = ids_NT[w], at, quantized
        if progress is not None:
            done = w + 1 - running.walk.watched.start
            progress(done, len(running.walk.watched), "comparing with the original")
    return torch.cat(kls).mean().item(), torch.cat(agreements).mean().item(), reference


def _logits(running: Run) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """``(window, positions, original logits [M, V], quantized logits [M, V])`` of the watched windows.

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
            yield w, walk.measured, original[walk.measured], quantized[walk.measured]
        return
    read, whole = -1, None  # by the model
    for w, at, original, quantized in running.rest.logits():
        if model is not None and w != read:
            assert walk.ids is not None
            read, whole = w, logits_of(model, walk.ids[w])
        yield w, at, original, quantized if whole is None else whole[at]


def judge(job: Job, running: Run, kl: float | None, agreement: float | None, max_kl: float) -> QuantizeReport:
    walk = running.walk
    layers = [layer for block in walk.records for layer in block.layers]
    weights = sum(layer.weights for layer in layers)
    bits = sum(layer.bits_per_weight * layer.weights for layer in layers) / max(1, weights)
    promised = sum(prod(block.shapes[path]) for block in job.plan.blocks for path in block.formats)
    notes = {note for block in walk.records for note in block.notes}
    notes |= {f"{layer.name}: {note}" for layer in layers for note in layer.notes}
    measured_on = _measured_on(job, running)
    report = QuantizeReport(
        out=None,
        recipe=job.recipe,
        calibration=job.calibrated_on,
        asked_bits=asked_bits(job.plan),
        bits_per_weight=bits,
        model_bits_per_weight=0.0,
        bytes=0,
        source_bytes=job.source_bytes,
        kl=kl,
        top1_agreement=agreement,
        measured_on=measured_on,
        cache_bits=cache_bits(job.source.config, running.description.cache),
        coverage=weights / max(1, job.plan.matrices),
        outside_cost=running.rest.cost if running.rest.packs else None,
        blocks=tuple(walk.records),
        warnings=(
            *job.warnings,
            *beyond_asked(bits, asked_bits(job.plan)),
            *_outside_note(running.rest),
            *_cache_note(measured_on),
            *grouped(sorted(notes), {block.name for block in walk.records}),
        ),
        generated_text=None if job.calibration is None else job.calibration.quality,
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
    read = f", {through(cache, longest=walk.ids.shape[1])}" if cache else ""
    windows = f"{len(walk.watched)} windows of {walk.ids.shape[1]} tokens"
    if walk.measured.step > 1:
        windows = f"every {_ORDINALS[walk.measured.step]} token of {windows}"
    if job.calibration is None:
        return f"{windows} drawn from the vocabulary{read}"
    return f"{windows} of {job.calibration.name}, {'held out from' if walk.held_out else 'also used for'} calibration{read}"


def _cache_note(measured_on: str) -> list[str]:
    if NOTHING_PACKED not in measured_on:
        return []
    return [
        "KL and agreement tell nothing of the quantized cache: the run's windows are too short for it; measure it by "
        "lowbit evaluate DIR --text TEXT --against MODEL"
    ]


def _outside_note(rest: Rest) -> list[str]:
    limit, cost = rest.plan.outside.limit, rest.cost
    if rest.packs or limit is None or cost is None:
        return []
    return [
        f"the embedding and the head stay as they are: packed they would cost {cost:.2g} nats a token, over {limit:g}; "
        "--embedding-bits and --head-bits pack them all the same"
    ]
