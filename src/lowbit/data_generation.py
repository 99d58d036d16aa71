"""``lowbit.generate_data``: text that a model writes, as data for calibration and training. What ``lowbit generate-data`` does.

Each finished batch is on disk before the next begins. At the end the batches move into few shards, behind which stand their
provenance and a report on the texts.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowbit import kernels
from lowbit.checkpoints import native
from lowbit.checkpoints.shards import file_sha256
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.checkpoints.target import check_target
from lowbit.data import bos_token
from lowbit.evaluation.forward import evaluating
from lowbit.evaluation.generate import Messages, prompt_ids
from lowbit.generation import GeneratedText, Quality, Sampling, Start, Strategy, Total, Written, write, write_tokens
from lowbit.generation.files import FORMAT, PROVENANCE, REPORT, as_table, read_tables, shards_of, write_table
from lowbit.generation.tokens import ends_of, ids_of, tokenizer_sha256
from lowbit.generation.writing import BATCH, check_length, check_sizes
from lowbit.progress import Progress, silent
from lowbit.rows import RowError, has_rows, lines_of, text_of, values_of
from lowbit.stages.journal import Journal, OnOpen, settle, unheard
from lowbit.surroundings import own_settings
from lowbit.version import __version__

SAMPLES, SEQ_LEN = 32, 512
"""Texts in full length that are asked for, unless something else is."""
PROMPTED_TEMPERATURE = 0.7
"""Of completions, as in BitDistiller (arXiv:2402.10631); texts without a prompt are drawn at temperature 1."""

NO_TOKENIZER = (
    "the model has no tokenizer: there are token ids without text, and only its config says which tokens begin none"
)


@dataclass(frozen=True)
class GeneratedData:
    """What a run wrote.

    Attributes:
        out: the directory.
        quality: the report on the texts.
        new_tokens: tokens that this run chose; fewer than the texts have where it continued another.
        seconds: how long that took.
        has_text: whether the tokens have text beside them.
    """

    out: Path
    quality: Quality
    new_tokens: int
    seconds: float
    has_text: bool = True

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before anyone trains on the texts."""
        bad = tuple(f"bad data: {problem}" for problem in self.quality.problems)
        return bad if self.has_text else (NO_TOKENIZER, *bad)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        speed = {"new_tokens": self.new_tokens, "seconds": self.seconds, "tokens_per_second": self.tokens_per_second}
        return {"out": str(self.out), **self.quality.to_dict(), **speed}


@dataclass(frozen=True, eq=False)
class DataJob:
    """A checked request; no weight has been read.

    Attributes:
        tokens: wanted in all, where there are no prompts.
        seq_len: tokens of a text at most, the prompt included.
        prompts: what to complete; None: texts begin with a token of the vocabulary.
    """

    source: ModelSource
    tokenizer: Any
    out: Path
    sampling: Sampling
    tokens: int
    seq_len: int
    batch: int
    prompts: tuple[tuple[int, ...], ...] | None

    @property
    def bos(self) -> int | None:
        """The token that begins every text without a prompt, as the model was trained."""
        return None if self.tokenizer is None else bos_token(self.tokenizer, "auto")

    @property
    def header(self) -> dict[str, Any]:
        """What determines the bytes of the result on one machine: its provenance."""
        packages = ("torch", "transformers", "tokenizers", "pyarrow")
        return {
            "model": {"name": self.source.name, "sha256": self.source.fingerprint},
            "tokenizer": tokenizer_sha256(self.tokenizer),
            "bos": self.bos,
            "sampling": self.sampling.to_dict(),
            "asked": {"tokens": self.tokens, "seq_len": self.seq_len}
            if self.prompts is None
            else {"seq_len": self.seq_len},
            "prompts": None if self.prompts is None else {"count": len(self.prompts), "sha256": _sha256(self.prompts)},
            "batch": self.batch,
            "threads": torch.get_num_threads(),
            "kernels": kernels.forced(),
            "versions": {"lowbit": __version__, "python": platform.python_version()}
            | {name: version(name) for name in packages},
        }


def _sha256(prompts: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def prepare_data(
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    tokens: int | None = None,
    samples: int | None = None,
    seq_len: int = SEQ_LEN,
    prompts: str | PathLike[str] | Sequence[str | Messages] | None = None,
    strategy: Strategy | None = None,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = BATCH,
    trust_remote_code: bool = False,
) -> DataJob:
    """Checks a request before any weight is read. Arguments as of :func:`generate_data`.

    Raises:
        ValueError: the first thing that is wrong, with what to do.
    """
    out = Path(out).expanduser().resolve()
    settle(out)
    check_target(out)
    if prompts is not None and (tokens is not None or strategy == "hybrid"):
        what = "tokens" if tokens is not None else "strategy hybrid"
        raise ValueError(
            f"{what} is for texts without prompts; completions are greedy or sampled, samples limits prompts"
        )
    if tokens is not None and samples is not None:
        raise ValueError("tokens and samples both say how much is written; give one of them")
    for name, value in {"tokens": tokens, "samples": samples, "batch": batch}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: expected 1 or more")
    usual = 1.0 if prompts is None else PROMPTED_TEMPERATURE
    sampling = Sampling(
        strategy or ("hybrid" if prompts is None else "sampled"),
        usual if temperature is None else temperature,
        top_k,
        top_p,
        seed,
    )
    source = open_model(model, trust_remote_code=trust_remote_code, allow_quantized=True)
    tokenizer = source.tokenizer_if_any() if prompts is None else source.tokenizer()
    asked = tokens or (samples or SAMPLES) * seq_len
    given = None if prompts is None else _encoded(prompts, samples, tokenizer, seq_len)
    check_length(source, seq_len)
    job = DataJob(source, tokenizer, out, sampling, asked, seq_len, batch, given)
    if given is None:
        check_sizes(asked, seq_len, batch, job.bos)
    return job


def _encoded(
    prompts: str | PathLike[str] | Sequence[str | Messages], most: int | None, tokenizer: Any, seq_len: int
) -> tuple[tuple[int, ...], ...]:
    """The token ids of prompts."""
    found = _prompts_in(prompts) if isinstance(prompts, str | PathLike) else list(enumerate(prompts, 1))
    if not found:
        raise ValueError("no prompt was found: expected one a line, or rows with a column text or messages")
    encoded = []
    for number, prompt in found[:most]:
        try:
            ids = prompt_ids(tokenizer, prompt)[0].tolist()
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
        if len(ids) >= seq_len:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, and a text at most {seq_len}, its prompt included: raise seq_len"
            )
        encoded.append(tuple(ids))
    return tuple(encoded)


def _prompts_in(place: str | PathLike[str]) -> list[tuple[int, str | Messages]]:
    """The prompts in a file: its rows (FILE or FILE:COLUMN), or its lines."""
    path, column = Path(place).expanduser(), None
    if not path.is_file():
        file, _, column = str(path).rpartition(":")
        path = Path(file)
    if not path.is_file():
        raise ValueError(f"{place}: no such file; expected prompts, one a line, or rows with a column text or messages")
    content = path.read_bytes()
    try:
        if column is not None or has_rows(path, content):
            return list(values_of(path, content, column))
        lines = lines_of(text_of(path, content))
    except RowError as error:
        raise ValueError(f"{error}.") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def generate_data(
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    tokens: int | None = None,
    samples: int | None = None,
    seq_len: int = SEQ_LEN,
    prompts: str | PathLike[str] | Sequence[str | Messages] | None = None,
    strategy: Strategy | None = None,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = BATCH,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> GeneratedData:
    """Lets ``model`` write texts and stores their token ids, for ``calibration=out``.

    Texts without prompts begin with a token of the vocabulary, each another one, and end where the model ends them or at
    ``seq_len`` tokens. There are as many as ``tokens`` needs.

    Args:
        model: a local directory, packed or not, a hub id, a ``.gguf`` file or ``smollm2-135m``.
        out: a new directory.
        tokens: how many to write in all, about a batch more at most; or
        samples: so many times ``seq_len`` tokens (default 32). With prompts: the first so many prompts.
        seq_len: tokens of a text at most, its prompt included.
        prompts: a file of prompts, one a line or in rows (``text`` or ``messages``), or a list of texts or of messages: the
            model completes each once.
        strategy: ``hybrid`` (the default; the likeliest tokens up to a prefix of 3 to 5, then drawn), ``sampled`` (the default
            with prompts) or ``greedy``; see :mod:`lowbit.generation.sampling`.
        temperature: of what is drawn (default 1, with prompts 0.7).
        top_k, top_p: draw from so many likeliest tokens, or from those with this share together; 0 and 1: from all.
        seed: of everything drawn.
        batch: texts side by side. A packed model writes one text alone by its compiled step.
        restart: discard an unfinished run of the same target instead of continuing it.

    Raises:
        ValueError: bad input, found before any work, or a model that cannot write. An interrupted run (also by Ctrl-C)
            continues when repeated, and ends in the same bytes on the same machine.
    """
    job = prepare_data(
        model,
        out,
        tokens=tokens,
        samples=samples,
        seq_len=seq_len,
        prompts=prompts,
        strategy=strategy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch=batch,
        trust_remote_code=trust_remote_code,
    )
    return run_data(job, restart=restart, progress=progress)


@own_settings()
def run_data(
    job: DataJob, *, restart: bool = False, progress: Progress | None = None, on_open: OnOpen = unheard
) -> GeneratedData:
    """Writes the texts of a checked request."""
    journal = Journal(job.out, job.header)
    journal.open(restart=restart)
    try:
        on_open(journal)
        new, seconds = (0, 0.0) if _is_whole(job, journal) else _write(job, journal, progress or silent)
        return GeneratedData(job.out, _finish(job, journal), new, seconds, job.tokenizer is not None)
    except ValueError:  # the model cannot write
        journal.discard()
        raise
    finally:
        journal.close()


def _done(journal: Journal) -> Total:
    """What finished batches hold."""
    records = [entry["record"] for entry in journal.finished]
    return Total(sum(record["texts"] for record in records), sum(record["tokens"] for record in records))


def _is_whole(job: DataJob, journal: Journal) -> bool:
    done = _done(journal)
    return done.tokens >= job.tokens if job.prompts is None else done.texts == len(job.prompts)


def _write(job: DataJob, journal: Journal, progress: Progress) -> tuple[int, float]:
    """Writes what is left, batch by batch; returns how many tokens the model chose, and in how many seconds."""
    model = native.load(job.source.path, trust_remote_code=job.source.trust_remote_code)
    began, new = time.perf_counter(), 0

    def count(tokens: int) -> None:
        nonlocal new
        new += tokens
        what = f"writing, {new / max(1e-9, time.perf_counter() - began):.0f} tokens/s"
        if job.prompts is None:
            progress(min(before + new, job.tokens), job.tokens, what)
        else:
            progress(_done(journal).texts, len(job.prompts), what)

    before = _done(journal).tokens
    with evaluating(model):
        for texts in _batches(job, model, journal, count):
            table = as_table(texts, job.tokenizer, prompted=job.prompts is not None)
            total = Total().plus(texts)
            journal.add(
                f"batch-{len(journal.finished) + 1:06d}.parquet",
                partial(write_table, table, provenance=job.header),
                {"texts": total.texts, "tokens": total.tokens},
            )
    return new, time.perf_counter() - began


def _batches(
    job: DataJob, model: PreTrainedModel, journal: Journal, on_tokens: Callable[[int], None]
) -> Iterator[list[Written]]:
    """The batches that are left."""
    if job.prompts is None:
        yield from write_tokens(
            model,
            job.tokenizer,
            job.sampling,
            job.tokens,
            job.seq_len,
            bos=job.bos,
            batch=job.batch,
            done=_done(journal),
            on_tokens=on_tokens,
        )
        return
    check_length(model, job.seq_len)
    ends = ends_of(model, job.tokenizer)
    for starts in _completions(job.prompts, job.sampling, job.seq_len, job.batch)[len(journal.finished) :]:
        yield write(model, starts, job.sampling, ends, on_tokens)


def _completions(prompts: Sequence[tuple[int, ...]], sampling: Sampling, seq_len: int, batch: int) -> list[list[Start]]:
    """Batches of prompts with equally many tokens, short ones first."""
    groups: dict[int, list[Start]] = {}
    for number, ids in enumerate(prompts):
        groups.setdefault(len(ids), []).append(Start(number, ids, sampling.greedy_tokens(number), seq_len))
    return [
        starts[first : first + batch] for _, starts in sorted(groups.items()) for first in range(0, len(starts), batch)
    ]


def _finish(job: DataJob, journal: Journal) -> Quality:
    """Moves the batches into shards, writes provenance and report, and makes the directory the target."""
    if any(entry["file"] in entry["files"] for entry in journal.finished):
        shards = shards_of(read_tables([journal.directory / entry["file"] for entry in journal.finished]))
        names = [f"data-{i + 1:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            journal.place(name, partial(write_table, shard, provenance=job.header))
        files = {name: file_sha256(journal.directory / name) for name in names}
        journal.move([entry["file"] for entry in journal.finished], files)
    files = journal.finished[0]["files"]  # all batches moved together
    table = read_tables([journal.directory / name for name in sorted(files)])
    quality = GeneratedText.of(job.out.name, job.header, table).quality(
        ids_of(job.tokenizer, job.source.config.get_text_config().vocab_size)
    )
    written = {"texts": quality.texts, "tokens": quality.tokens, "files": files}
    for name, content in ((PROVENANCE, {"format": FORMAT, **job.header, **written}), (REPORT, quality.to_dict())):
        journal.place(name, partial(_write_json, content=content))
    journal.finish()
    return quality


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
