"""Prepares a comparison: checks everything before the first row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.comparison.before import calibrations_for, check_leakage, check_rows, check_scratch, chosen_rows, costs
from lowbit.comparison.measuring import Measuring
from lowbit.comparison.on_ray import OnRay
from lowbit.comparison.presets import Preset
from lowbit.comparison.results import Record, Results
from lowbit.comparison.rows import Row, as_rows, with_seeds
from lowbit.comparison.work import Setting
from lowbit.comparison.workers import OneAfterAnother
from lowbit.data import Bos, Calibration, CalibrationText
from lowbit.evaluation import Task, as_protocol_reads, read_tasks
from lowbit.evaluation.perplexity import check_fits, windows_sha256
from lowbit.evaluation.windows import cut
from lowbit.progress import Progress
from lowbit.ray_cluster import imported
from lowbit.recipes import Recipe
from lowbit.surroundings import own_settings
from lowbit.texts import load_text


@own_settings()
def compare(
    model: str | PathLike[str],
    rows: str | PathLike[str] | Iterable[Row | Recipe | str | PathLike[str] | Mapping[str, Any]],
    calibration: CalibrationText | None,
    text: str | Tensor,
    out: str | PathLike[str],
    *,
    samples: int = 32,
    seq_len: int = 512,
    bos: Bos = "auto",
    protocol: str = "gptq",
    eval_seq_len: int = 1024,
    windows: int | None = 20,
    tasks: Sequence[str] = (),
    task_files: str | PathLike[str] | None = None,
    limit: int | None = None,
    speed: bool = False,
    seeds: Sequence[int] = (),
    only: Iterable[str] = (),
    allow_leakage: bool = False,
    ray: str | None = None,
    known: Iterable[str | PathLike[str]] = (),
    preset: Preset | None = None,
    threads: int | None = None,
    ram_limit: int = 2**32,
    scratch: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Quantizes ``model`` by every row's recipe, evaluates each result on one text, and writes one table.

    Each row runs in a process of its own: it quantizes into a scratch directory, reads the packed model back, evaluates
    it against the original and removes it. Results are JSON lines in ``out``, with a Markdown table of the same name
    next to it, rewritten after each row. A measured row is not measured again; a failed row is. Broken models are
    measured like others, and marked. A recipe that needs no calibration text gets none.

    Args:
        model: a local directory, hub id, ``.gguf`` file or ``smollm2-135m``.
        rows: a grid file, or rows, recipes, methods' names, recipe files, and mappings as in a grid file; see
            :mod:`lowbit.comparison.rows`.
        calibration: text (see :mod:`lowbit.texts`), ids ``[N, T]``, or None if no recipe needs any.
        text: the text to evaluate on (its evaluation part if it has one), or token ids.
        out: a ``.jsonl`` file; continued if it exists.
        samples, seq_len: number of calibration windows, and tokens of each.
        bos: whether every calibration window begins with the model's first token, as for :func:`lowbit.quantize`.
        protocol, eval_seq_len, windows: how the text is evaluated, as in :func:`lowbit.evaluation`.
        tasks, task_files, limit: zero-shot tasks of a directory, and how many items of each, as of :func:`lowbit.evaluate_tasks`;
            every row is compared with the original item by item.
        speed: also measure tokens per second, of a prompt and of new tokens.
        seeds: measure each row with each of these seeds. A row whose first two seeds give the same figures is not random, and
            further seeds are left out.
        only: measure only rows whose label contains one of these.
        allow_leakage: also measure where the calibration text is found in what is evaluated.
        known: files of earlier comparisons. A row that one of them holds with the same recipe, model, texts and tasks, under whatever
            label, is taken over; its record names the file (``taken_from``).
        preset: a paper's table, whose published figures stand beside ours in the page (:mod:`lowbit.comparison.presets`).
        ray: the address of a Ray cluster whose machines run rows side by side, or ``local``; None: this process runs them one
            after another. Extra ``ray``.
        threads: torch's threads in the rows' processes; None: as in this process.
        ram_limit: bytes of activations in memory while quantizing.
        scratch: directory for temporary files; None: that of ``out``. It must hold the largest result and the hidden
            states.
        trust_remote_code: allow the model's own Python code.
        progress: called as ``progress(rows done, rows to do, what)``.
        on_record: called with each new record.

    Returns:
        The records of the original and of the rows, in their order, including those of earlier runs: label, recipe,
            model, protocol,
        calibration, figures (perplexity, log_perplexity_difference, kl, top1_agreement and their 95 % intervals,
            asked_bits, bits_per_weight,
            model_bits_per_weight, bytes, seconds,
            peak bytes
        of memory), problems (why it counts as broken), machine, versions. A failed row has ``error`` instead of
            figures.

    Raises:
        ValueError: anything wrong with a row, the model or the texts, before the first row; results that another comparison is
            writing; an original that fails.
    """
    asked, results = with_seeds(as_rows(rows), seeds), Results(out)
    source = open_model(model, trust_remote_code=trust_remote_code)
    chosen = chosen_rows(asked, tuple(only))
    check_rows(source, asked)
    if ray is not None:
        imported()
    if tasks and task_files is None:
        raise ValueError("tasks of a comparison are read from files: give task_files (--task-files DIR)")
    questions = read_tasks(tasks, task_files, limit) if task_files is not None else ()
    setting, entry, evaluated = _setting(source, text, protocol, eval_seq_len, windows, ram_limit)
    used = calibrations_for(source, asked, calibration, samples, seq_len, bos)
    named = [(task.name, task.text) for task in questions]
    apart = {id(each): each for each in used.values()}  # rows that train on as much share theirs
    leaks = {key: check_leakage(source, each, evaluated, named, allow_leakage) for key, each in apart.items()}
    run = Measuring(
        results=results,
        setting=replace(
            setting,
            tasks=tuple(task.name for task in questions),
            task_files=None if task_files is None else Path(task_files).expanduser().resolve(),
            limit=limit,
            speed=speed,
        ),
        bos=bos,
        calibrations=used,
        leakages={label: leaks[id(each)] for label, each in used.items()},
        model={"name": source.name, "sha256": source.fingerprint},
        protocol=entry | _further(questions, speed),
        labels=tuple(row.label for row in asked),
        threads=threads or torch.get_num_threads(),
        workers=OneAfterAnother() if ray is None else OnRay(ray),
        known=tuple(map(_existing, known)),
        preset=preset,
        memory={} if ray is None else _memory(model, chosen, used, ram_limit, trust_remote_code),
        progress=progress or (lambda done, total, what: None),
        on_record=on_record or (lambda record: None),
    )
    place = check_scratch(results.path.parent if scratch is None else Path(scratch))
    with results.held():
        return run.all(asked, chosen, place)


def _existing(path: str | PathLike[str]) -> Results:
    """The results in a file that must be there."""
    if not Path(path).expanduser().is_file():
        raise ValueError(f"no file of results {str(path)!r}: expected JSON lines of `lowbit compare`")
    return Results(path)


def _further(tasks: Sequence[Task], speed: bool) -> Record:
    """What is measured besides perplexity, as an entry of records."""
    asked = {task.name: {"items": len(task.items), "sha256": task.sha256} for task in tasks}
    return ({"tasks": asked} if asked else {}) | ({"speed": True} if speed else {})


def _memory(
    model: str | PathLike[str],
    rows: list[Row],
    used: Mapping[str, Calibration],
    ram_limit: int,
    trust_remote_code: bool,
) -> dict[str, int]:
    """Bytes that each row will take, by its label."""
    samples, seq_len = next(iter(used.values())).ids.shape if used else (0, 512)
    foreseen = costs(
        model, rows, samples=samples, seq_len=seq_len, ram_limit=ram_limit, trust_remote_code=trust_remote_code
    )
    return {cost.row.label: 0 if cost.plan is None else cost.plan.peak_ram_bytes for cost in foreseen}


def _setting(
    source: ModelSource, text: str | Tensor, protocol: str, seq_len: int, windows: int | None, ram_limit: int
) -> tuple[Setting, Record, list[Tensor]]:
    """The text, found and cut; its entry in records; the ids of its windows."""
    named = load_text(text, "evaluation", source.tokenizer()) if isinstance(text, str) else None
    content = text if named is None else as_protocol_reads(named, protocol)
    name = "token ids" if named is None else named.name
    pieces = cut(content, source.tokenizer() if named else None, protocol, seq_len, windows)
    check_fits(source.skeleton(), pieces)
    setting = Setting(source.path, content, name, protocol, seq_len, windows, ram_limit, source.trust_remote_code)
    entry = {
        "name": protocol,
        "text": name,
        "windows": len(pieces.windows),
        "seq_len": seq_len,
        "sha256": windows_sha256(pieces, seq_len),
    }
    return setting, entry, [window.inputs for window in pieces.windows]
