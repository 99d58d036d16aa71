"""From a journal's units to a checkpoint's shards.

A walk writes a file for every block, so that a kill loses one block; whoever uses the result wants few files. So finished
units are copied into shards, in order and as many as fit. A shard is written whole, then the journal says that its units are in
it, then their own files go. A kill between any two of these leaves either the units' files or the shard, and the next run goes on
there. So the disk needs room for one shard more, and no tensor is held in memory.

A unit is in one shard, unless it is larger than a shard may be: then it has several of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lowbit.checkpoints.shards import TensorHeader, file_sha256, join_tensors, read_shard_header, shard_names
from lowbit.stages.journal import Section

SHARD_BYTES = 5 * 10**9
"""Of the tensors of a shard at most, as in transformers; a single tensor may be larger."""


@dataclass
class _Group:
    """Units that move together, and the tensors of their shards: one shard, or several of one large unit."""

    units: list[str] = field(default_factory=list)
    shards: list[dict[str, TensorHeader]] = field(default_factory=list)


def merge(section: Section, guard: str | None, limit: int | None = None) -> list[str]:
    """Moves the units of a stage into shards of at most ``limit`` bytes of tensors (:data:`SHARD_BYTES`) and returns their names.

    Args:
        guard: the name of a tensor without values that the last shard has too; None: none.

    Raises:
        OutputError: the disk is full or not writable.
    """
    journal = section.journal
    done = [file for entry in section.finished if entry["file"] not in entry["files"] for file in entry["files"]]
    done = list(dict.fromkeys(done))
    groups = _groups(section, SHARD_BYTES if limit is None else limit)
    names = shard_names(len(done) + sum(len(group.shards) for group in groups))
    left = names[len(done) :]
    for group in groups:
        files, left = left[: len(group.shards)], left[len(group.shards) :]
        for name, tensors in zip(files, group.shards, strict=True):
            last = guard if name == names[-1] else None
            journal.place(name, lambda path, tensors=tensors, last=last: join_tensors(path, tensors, last))
        journal.move(group.units, {name: file_sha256(section.directory / name) for name in files})
    return names


def _groups(section: Section, limit: int) -> list[_Group]:
    """What is still in files of its own, as it will move. The same for what is left after a kill as before it."""
    groups: list[_Group] = []
    size = limit + 1  # of the group that is being filled
    for entry in section.finished:
        if entry["file"] not in entry["files"]:
            continue
        headers = read_shard_header(section.directory / entry["file"])
        own = sum(header.nbytes for header in headers.values())
        if size + own > limit:
            groups.append(_Group([], [{}]))
            size = 0
        groups[-1].units.append(entry["file"])
        for name, header in headers.items():
            if size + header.nbytes > limit and groups[-1].shards[-1]:
                groups[-1].shards.append({})
                size = 0
            groups[-1].shards[-1][name] = header
            size += header.nbytes
        if own > limit:
            size = limit + 1
    return groups
