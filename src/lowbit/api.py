"""The functions of the public interface that are a few lines of other modules' work: load, evaluate and its kin."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.caches import PackedCache
from lowbit.checkpoints import native
from lowbit.checkpoints.export import ExportReport, export
from lowbit.checkpoints.original import OriginalWarning, check_original, original_doubts, other_model
from lowbit.checkpoints.to_run import locate_to_run
from lowbit.checkpoints.to_run import tokenizer_to_run as load_tokenizer
from lowbit.decoding import use_cache
from lowbit.decoding.packed_cache import packed_cache, uncalibrated
from lowbit.evaluation import (
    ChatScore,
    Evaluation,
    TaskScore,
    as_protocol_reads,
    check_chat,
    check_generation,
    check_lengths,
    check_retrieval,
    compare_chat,
    cut,
    directory_bytes,
    evaluate_model,
    harness,
    paired,
    read_prompts,
    read_tasks,
    score_task,
    score_with_lm_eval,
)
from lowbit.methods import USUAL_CACHE
from lowbit.modules import KVFormats, KVSpec, kv_formats
from lowbit.plan.cache import cache_bits
from lowbit.progress import Progress, silent
from lowbit.recipes import kv_scheme
from lowbit.surroundings import own_settings
from lowbit.texts import load_text


@own_settings()
def load(
    model: str | PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    kv: str | KVSpec | KVFormats | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A transformers model ready to run: a lowbit checkpoint, packed, or any model that lowbit can quantize.

    Args:
        model: a directory, a hub id, a ``.gguf`` file or ``smollm2-135m``. Weights of a file stay packed, those of
            ``smollm2-135m``, which is an example of an original model, do not.
        dtype: of what is not packed; None: as stored.
        kv: how ``generate`` holds keys and values: a method for caches and its bits (``kivi:2``), formats, or ``none``: as the
            model computes them. None: as the checkpoint says.

    Raises:
        ValueError: nothing there that can be loaded, with what to do.
    """
    path = locate_to_run(model, trust_remote_code=trust_remote_code)
    formats = None if kv is None else _formats(kv)
    if formats is not None and formats.calibrated:  # before weights are read
        described = native.read_checkpoint(path).description
        carried = () if described is None else (spec.buffers for spec in described.kv_calibration.values())
        if missing := formats.calibrated.difference(*carried):
            raise uncalibrated(missing)
    loaded = native.load(path, dtype=dtype, trust_remote_code=trust_remote_code)
    if formats is not None:
        use_cache(loaded, formats)
    return loaded


def _formats(kv: str | KVSpec | KVFormats) -> KVFormats:
    if isinstance(kv, KVFormats):
        return kv
    return KVFormats() if kv == "none" else kv_scheme(kv).cache


def kv_cache(model: Any, method: str | KVSpec | None = None, **options: Any) -> PackedCache:
    """An empty transformers cache that packs keys and values, for ``model(…, cache=…)`` and ``model.generate(…, cache=…)``.

    Where a model (not its configuration) has large key biases, keys of these layers are packed before the rotary embedding and
    centred. ``cache.update(keys, values, layer)`` appends, ``cache.layers[i].keys_values()`` decodes, ``cache.nbytes`` is what it holds.
    Layers of full attention are packed; sliding windows and states stay as transformers holds them.

    Args:
        model: a transformers model or its configuration.
        method: a method for caches (``lowbit methods``), such as ``kivi`` or ``kivi:2`` (2 bits), or a format. What needs a
            calibration (``kv-oscar``) goes with a model whose checkpoint carries it. None: without options, the formats
            that the model's checkpoint or :func:`load` gave it; with options, or where there are none,
            :data:`lowbit.methods.USUAL_CACHE`.
        options: of the method, such as ``bits``, ``group_size`` and ``recent``.

    Raises:
        ValueError: no such method or option, one that does not say how a cache is held, a model without layers of full
            attention, or one that does not carry the calibration that the cache needs; a place instead of a model.
    """
    if isinstance(model, str | PathLike):
        raise ValueError(
            f"expected a transformers model or its configuration, found {str(model)!r}; lowbit.load loads it"
        )
    own = kv_formats(model)
    if method is None and own and not options:
        return packed_cache(model, own.kv, own.overrides)
    scheme = kv_scheme(USUAL_CACHE if method is None else method, **options)
    return packed_cache(model, scheme.kv, scheme.kv_overrides)


@own_settings()
def evaluate(
    model: str | PathLike[str] | PreTrainedModel,
    text: str | PathLike[str] | Tensor = "python-docs",
    *,
    protocol: str = "gptq",
    seq_len: int = 1024,
    windows: int | None = 20,
    against: str | PathLike[str] | PreTrainedModel | None = None,
    kv: str | KVSpec | KVFormats | None = None,
    chunk: int | None = None,
    retrieval: Sequence[int] = (),
    generation: bool = False,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity under a named protocol; with ``against``, KL divergence and top-1 agreement too, in the same pass.

    Args:
        model: a model or where to load it from.
        text: a text (see :mod:`lowbit.texts`; its evaluation part where it has one) or token ids.
        protocol: ``gptq``, ``llama.cpp``, ``word``, ``ptb`` or ``c4``; see :mod:`lowbit.evaluation.windows`.
        seq_len, windows: how many windows of how many tokens (None: as many as the text holds).
        against: the original to compare with; a model that cannot be the original is refused, and one with other bytes than the
            checkpoint's report names is warned of (``OriginalWarning``).
        kv: the cache through which ``model``, given by its place, reads, as for :func:`load`.
        chunk: tokens that a model with a quantized cache reads at a time; None: as few as its formats ask for.
        retrieval: lengths in tokens of prompts in which the model must find facts, see :mod:`lowbit.evaluation.cache_checks`.
        generation: also whether the model copies, counts and adds.
        tokenizer: needed where ``model`` is not a path and ``text`` is text.
        trust_remote_code: allow the models' own Python code.
    """
    _check_cache(model, kv)
    if against is not None:
        check_original(model, against, trust_remote_code=trust_remote_code)
        _warn_of_doubts(model, against, trust_remote_code)
    where = None if isinstance(model, PreTrainedModel) else model
    text = os.fspath(text) if isinstance(text, PathLike) else text
    if isinstance(text, str) or retrieval or generation:
        tokenizer = _tokenizer_of(model, tokenizer, trust_remote_code)
    content = load_text(text, "evaluation", tokenizer) if isinstance(text, str) else None
    read: Any = text if content is None else as_protocol_reads(content, protocol)
    # Before weights are read: it refuses what the text cannot give.
    pieces = cut(read, tokenizer, protocol, seq_len, windows)
    loaded = _opened(model, kv, trust_remote_code)
    original = None if against is None else _opened(against, None, trust_remote_code)
    check_lengths(loaded, tokenizer, retrieval)
    result = evaluate_model(
        loaded,
        pieces,
        tokenizer,
        protocol,
        seq_len,
        windows,
        against=original,
        chunk=chunk,
        text_name="token ids" if content is None else content.name,
        progress=progress,
    )
    checks = check_retrieval(loaded, tokenizer, retrieval, progress=progress or silent) if retrieval else ()
    checks += check_generation(loaded, tokenizer, progress=progress or silent) if generation else ()
    result = dataclasses.replace(
        result,
        checks=checks,
        bits_per_weight=native.bits_per_weight(loaded),
        cache_bits=cache_bits(loaded.config, kv_formats(loaded)),
    )
    if where is None:
        return result
    path, given = locate_to_run(where, trust_remote_code=trust_remote_code), Path(where).expanduser()
    # What another tool packed runs from a copy; the user has the files of that tool.
    bits, size = native.model_bits_per_weight(path), directory_bytes(given if given.exists() else path).weights
    return dataclasses.replace(result, model_bits_per_weight=bits, bytes=size)


@own_settings()
def evaluate_tasks(
    model: str | PathLike[str] | PreTrainedModel,
    tasks: Sequence[str],
    files: str | PathLike[str] | None = None,
    *,
    limit: int | None = None,
    against: str | PathLike[str] | PreTrainedModel | None = None,
    kv: str | KVSpec | KVFormats | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[TaskScore, ...]:
    """Zero-shot tasks, scored as lm-eval scores them; with ``against``, item by item beside the original.

    Args:
        model: a model or where to load it from.
        tasks: names, such as ``piqa``: of files in ``files``, or of lm-eval's tasks.
        files: a directory of ``NAME.jsonl`` or ``NAME.txt``, see :mod:`lowbit.evaluation.zero_shot`; None: lm-eval (extra
            ``harness``) gets its own data from the hub.
        limit: items of each task, from its first; None: all.
        against: the original, which answers the same items. Another model, given by its place, answers them too, with its own
            tokenizer and a warning (``OriginalWarning``).
        kv: the cache through which ``model``, given by its place, reads, as for :func:`load`.
        tokenizer: needed where ``model`` is not a path.
        trust_remote_code: allow the models' own Python code.
        progress: called as ``progress(items done, items, what)``.

    Raises:
        ValueError: a task that cannot be had, with what to do.
    """
    other = "" if against is None else other_model(model, against, trust_remote_code=trust_remote_code)
    if other and isinstance(against, PreTrainedModel):
        raise ValueError(f"{other}. Its tokenizer is another one, then: pass its place instead of a model in memory")
    if other:
        warnings.warn(
            f"{other}. The items that are lost and gained are between two models, not the cost of quantization",
            OriginalWarning,
            stacklevel=3,
        )
    elif against is not None:
        _warn_of_doubts(model, against, trust_remote_code)
    if files is None:
        harness.imported()  # before a model is loaded
    read = None if files is None else read_tasks(tasks, files, limit)
    tokenizer = _tokenizer_of(model, tokenizer, trust_remote_code)
    its_tokenizer = load_tokenizer(against, trust_remote_code=trust_remote_code) if other else tokenizer  # pyright: ignore[reportArgumentType]

    def scores(judged: PreTrainedModel, tokenizer: Any) -> tuple[TaskScore, ...]:
        if read is None:
            return score_with_lm_eval(judged, tokenizer, tasks, limit=limit)
        return tuple(score_task(judged, tokenizer, task, progress=progress or silent) for task in read)

    found = scores(_opened(model, kv, trust_remote_code), tokenizer)
    if against is None:
        return found
    others = scores(_opened(against, None, trust_remote_code), its_tokenizer)
    return tuple(paired.against(score, other) for score, other in zip(found, others, strict=True))


@own_settings()
def evaluate_chat(
    model: str | PathLike[str] | PreTrainedModel,
    against: str | PathLike[str] | PreTrainedModel,
    prompts: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 128,
    kv: str | KVSpec | KVFormats | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ChatScore:
    """A model's answers beside its original's: divergence along the original's answers, and the answers themselves.

    Args:
        model: a model or where to load it from.
        against: the original, as for :func:`evaluate`.
        prompts: questions; None: those that come along.
        max_new_tokens: of an answer.
        kv: the cache through which ``model``, given by its place, reads, as for :func:`load`.
        tokenizer: needed where ``model`` is not a path.
        trust_remote_code: allow the models' own Python code.
        progress: called as ``progress(prompts done, prompts, what)``.

    Raises:
        ValueError: a tokenizer without a chat template, or prompts that do not fit.
    """
    check_original(model, against, trust_remote_code=trust_remote_code)
    _warn_of_doubts(model, against, trust_remote_code)
    tokenizer = _tokenizer_of(model, tokenizer, trust_remote_code)
    check_chat(tokenizer)  # before weights are read
    return compare_chat(
        _opened(model, kv, trust_remote_code),
        _opened(against, None, trust_remote_code),
        tokenizer,
        read_prompts() if prompts is None else prompts,
        max_new_tokens,
        progress=progress or silent,
    )


def _warn_of_doubts(
    model: str | PathLike[str] | PreTrainedModel,
    original: str | PathLike[str] | PreTrainedModel,
    trust_remote_code: bool,
) -> None:
    """Warns whoever called the function that calls this."""
    if isinstance(model, PreTrainedModel) or isinstance(original, PreTrainedModel):
        return  # a model in memory has no report and no files
    for doubt in original_doubts(model, original, trust_remote_code=trust_remote_code):
        warnings.warn(doubt, OriginalWarning, stacklevel=4)  # behind the caller and its decorator


def _opened(
    model: str | PathLike[str] | PreTrainedModel, kv: str | KVSpec | KVFormats | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model in float32."""
    _check_cache(model, kv)
    if isinstance(model, PreTrainedModel):
        return model
    return load(model, torch.float32, kv=kv, trust_remote_code=trust_remote_code)


def _check_cache(model: str | PathLike[str] | PreTrainedModel, kv: str | KVSpec | KVFormats | None) -> None:
    if isinstance(model, PreTrainedModel) and kv is not None:
        raise ValueError("kv= goes with a model's place; a model in memory has its formats: load it with kv=")


def _tokenizer_of(model: str | PathLike[str] | PreTrainedModel, tokenizer: Any, trust_remote_code: bool) -> Any:
    if tokenizer is not None:
        return tokenizer
    if isinstance(model, PreTrainedModel):
        raise ValueError("a model in memory needs its tokenizer: pass tokenizer=, or the model's directory instead")
    return load_tokenizer(model, trust_remote_code=trust_remote_code)


__all__ = ["ExportReport", "evaluate", "evaluate_chat", "evaluate_tasks", "export", "load", "load_tokenizer"]
