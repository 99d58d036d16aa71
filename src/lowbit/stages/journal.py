"""What a run has finished, so that a killed one continues where it was and ends in the same bytes.

A run writes into ``DIR.partial`` next to its target and renames it at the very end, so nothing that looks finished exists
before. A block's shard is written under another name, flushed to disk and renamed, and only then does a line with its
hash enter the journal; a kill at any point leaves either no line or a whole shard. The journal's first line says what is
being made from what; a run that would make something else refuses to continue it. A lock beside the directory keeps a
second run out; the system releases it when a process ends, however that ends.

A recipe's stages share the directory. Each has a :class:`Section` of the journal: its finished units, and names for their
files. At the end units move into the checkpoint's shards (:mod:`lowbit.stages.merge`); an entry says in which files its
tensors are.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from torch import Tensor

from lowbit.checkpoints.shards import file_sha256, read_shard_header, read_tensor, write_shard
from lowbit.checkpoints.target import OutputError, check_target
from lowbit.whole_file import write_whole, write_whole_text

JOURNAL, HOLDER = "journal.jsonl", "lock-holder"
UNLISTED = ("fisher-*.safetensors", "latents-*.safetensors", "training-*.state", "training-*.answers")
"""Whole files that a continued run uses although the journal does not name them; the finished checkpoint has none of them."""
CURVES = ("training-*.jsonl", "training-*.tensorboard")
"""Files and folders that grow with a run and stay in its checkpoint."""

OnOpen = Callable[["Journal"], None]
"""Called with the journal of a run once it is open: nothing that was found there refuses the run any more."""


def unheard(journal: Journal) -> None:
    """Does nothing with an open journal."""


class Journal:
    """Finished units of one run in ``<out>.partial``: blocks of the walk, shards of a trained model.

    Args:
        out: the target directory, which must not exist or be empty. Links are resolved.
        header: what determines the result (model, recipe, calibration, versions), as plain data.

    Attributes:
        finished: the entries of finished units.
        found: what :meth:`open` did with an unfinished run that it found; None: it found none.
    """

    def __init__(self, out: Path, header: Mapping[str, Any]):
        self.out, self.header = Path(out).resolve(), json.loads(json.dumps(header))
        self.directory = self.out.with_name(self.out.name + ".partial")
        self.finished: list[dict[str, Any]] = []
        self.found: Literal["continuing", "discarding"] | None = None
        self._lock = FileLock(_beside(self.out, "lock"), timeout=0, thread_local=False)

    @property
    def path(self) -> Path:
        return self.directory / JOURNAL

    @property
    def _aside(self) -> Path:
        """Where the journal is while the directory becomes the target."""
        return _beside(self.out, "journal")

    @property
    def begun(self) -> dict[str, Any] | None:
        """The header of the unfinished run in the partial directory; None: there is none, or it is damaged."""
        for path in (self.path, self._aside):
            if self.directory.exists() and path.exists():
                entries = _whole_lines(path.read_bytes())
                header = entries[0].get("header") if entries else None
                return header if isinstance(header, dict) else None
        return None

    def open(self, *, restart: bool = False) -> int:
        """Makes or continues the partial directory, and locks it until :meth:`close`; returns how many units are finished.

        Files in it that the journal does not name are removed: an interrupted run left them.

        Raises:
            OutputError: the target exists, cannot be written, is being written by another run, or holds an unfinished run
                of something else.
        """
        check_target(self.out)
        try:
            return self._open(restart)
        except BaseException:
            self.close()
            raise

    def _open(self, restart: bool) -> int:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            check_target(self.out)  # again: another run may have finished it meanwhile
            continued = self.directory.exists()
            self.directory.mkdir(exist_ok=True)
            (self.directory / HOLDER).write_text(_this_process())
            if not continued:  # a kill came after the last rename of finish: what the journal lists is not here
                self._aside.unlink(missing_ok=True)
            elif self._aside.exists():  # a kill came between the two renames
                self._aside.replace(self.path)
            unfinished = self.path.exists()
            if restart:
                self._sweep(())
            if self.path.exists():
                self._read()
            else:
                self._write(())
            self._sweep((JOURNAL, *(file for entry in self.finished for file in entry["files"])))
        except PermissionError as error:
            raise OutputError(f"{self.directory} cannot be written: {error.strerror}; choose another -o DIR") from error
        except OSError as error:
            raise _disk_error(self.directory, error) from error
        if unfinished:
            self.found = "discarding" if restart else "continuing"
        return len(self.finished)

    def _take_lock(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            holder = ""
            with suppress(OSError):
                holder = (self.directory / HOLDER).read_text()
            raise OutputError(
                f"{self.directory} is being written by another run ({holder or 'a process that has just begun'}); wait for "
                "it, stop it, or choose another -o DIR"
            ) from None

    def close(self) -> None:
        """Lets other runs have the directory."""
        if self._lock.is_locked:
            (self.directory / HOLDER).unlink(missing_ok=True)
            if not self.directory.exists():  # the run is finished
                self._aside.unlink(missing_ok=True)
            with suppress(PermissionError):  # Windows does not remove an open file
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def discard(self) -> None:
        """Removes the partial directory where nothing in it is finished: the same would fail again, and another run would find it."""
        if not self.finished:
            shutil.rmtree(self.directory)

    def _sweep(self, kept: Iterable[str]) -> None:
        """Removes everything in the directory but the files ``kept`` and the name of the lock's holder."""
        keep = {HOLDER, *kept}
        for path in self.directory.iterdir():
            if path.name in keep or (kept and any(path.match(pattern) for pattern in (*UNLISTED, *CURVES))):
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _read(self) -> None:
        entries = _whole_lines(self.path.read_bytes())
        header = entries[0].get("header") if entries else None
        if not isinstance(header, dict):
            raise OutputError(f"{self.path} is damaged; remove {self.directory} or pass --restart to begin anew")
        if header != self.header:
            changed = sorted(key for key in {*header, *self.header} if header.get(key) != self.header.get(key))
            raise OutputError(
                f"{self.directory} holds an unfinished run of something else ({', '.join(changed)} differ); "
                "repeat that command to finish it, pass --restart to discard it, or choose another -o DIR"
            )
        seen, hashes = set[str](), dict[str, str | None]()
        for entry in entries[1:]:
            if not _is_unit(entry) or entry["file"] in seen or not self._is_whole(entry["files"], hashes):
                break  # damaged since: this unit and those after it are made again
            seen.add(entry["file"])
            self.finished.append(entry)
        self._write(self.finished)

    def _is_whole(self, files: Mapping[str, str], hashes: dict[str, str | None]) -> bool:
        """Whether all files have the hashes that an entry says; ``hashes`` keeps those of files that were read."""
        for name in files.keys() - hashes.keys():
            path = self.directory / name
            hashes[name] = file_sha256(path) if path.is_file() else None
        return all(hashes[name] == sha256 for name, sha256 in files.items())

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the journal's lines."""
        write_whole_text(self.path, "".join(journal_line(entry) for entry in ({"header": self.header}, *entries)))

    def forget(self, stage: int, count: int) -> None:
        """Keeps the first ``count`` units of a stage; those after them, and those of later stages, are made again."""
        ahead = [entry for entry in self.finished if entry["stage"] < stage]
        self.finished = ahead + [entry for entry in self.finished if entry["stage"] == stage][:count]
        self._write(self.finished)

    def move(self, units: Iterable[str], files: Mapping[str, str]) -> None:
        """Notes that the tensors of ``units`` are in ``files`` (name -> hash) now, and removes the files they were in."""
        units = set(units)
        old = {file for entry in self.finished if entry["file"] in units for file in entry["files"]}
        self.finished = [entry | {"files": dict(files)} if entry["file"] in units else entry for entry in self.finished]
        self._write(self.finished)
        for file in old - files.keys():  # what a kill leaves here, the next run removes
            (self.directory / file).unlink()

    def section(self, stage: int, last: int | None = None) -> Section:
        """The part of stage number ``stage``, or of all stages from it to ``last``."""
        return Section(self, stage, last)

    def write(self, file: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any], stage: int = 0) -> None:
        """:meth:`add` with a file of tensors."""
        self.add(file, lambda path: write_shard(path, tensors), record, stage)

    def add(self, file: str, write: Callable[[Path], None], record: Mapping[str, Any], stage: int = 0) -> None:
        """Stores one finished unit of a stage, in a file that ``write`` writes; when this returns it will survive a kill.

        Raises:
            OutputError: the disk is full or not writable.
        """
        self.place(file, write)
        files = {file: file_sha256(self.directory / file)}
        entry = {"stage": stage, "file": file, "files": files, "record": record}
        try:
            self._append(entry)
        except OSError as error:
            raise _disk_error(self.directory, error) from error
        self.finished.append(json.loads(json.dumps(entry)))

    def save(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a file that is there whole or not at all, without a line in the journal. Raises as :meth:`write`."""
        self.place(file, lambda path: write_shard(path, tensors))

    def place(self, file: str, write: Callable[[Path], None]) -> None:
        """:meth:`save` with what ``write`` writes to the path that it is given."""
        try:
            write_whole(self.directory / file, write)
        except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own error type
            raise _disk_error(self.directory, error) from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise _disk_error(self.directory, error) from error

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(journal_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Makes the partial directory the target, with nothing in it but the checkpoint. The last act of a run."""
        for pattern in ("stage-*.safetensors", *UNLISTED):  # of earlier stages
            for shard in self.directory.glob(pattern):
                shard.unlink()
        self.path.replace(self._aside)  # in the directory until now: a kill before this line loses nothing
        (self.directory / HOLDER).unlink()
        if self.out.exists():
            self.out.rmdir()  # empty: checked by open
        os.replace(self.directory, self.out)  # noqa: PTH105
        self.close()


def _beside(out: Path, kind: str) -> Path:
    """A file of a run next to its target."""
    return out.with_name(f"{out.name}.partial.{kind}")


def settle(out: Path) -> None:
    """Removes what lies beside ``out`` of a run that finished it and was killed after its last rename."""
    aside, lock, partial = _beside(out, "journal"), _beside(out, "lock"), out.with_name(out.name + ".partial")
    if partial.exists() or not (aside.exists() or lock.exists()):
        return
    with suppress(OSError), FileLock(lock, timeout=0):  # or a run has just begun here, or is just finishing
        if not partial.exists():
            aside.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _whole_lines(content: bytes) -> list[dict[str, Any]]:
    """The journal's entries up to the first line that is damaged, as a kill leaves it while it is written."""
    entries = []
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def _is_unit(entry: Mapping[str, Any]) -> bool:
    kinds = {"stage": int, "file": str, "files": dict, "record": dict}
    if not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        return False
    return bool(entry["files"]) and all(Path(name).name == name for name in (entry["file"], *entry["files"]))


@dataclass(frozen=True, eq=False)
class Section:
    """What one stage has finished, or several together.

    Attributes:
        stage: its number in the recipe, from 0; -1 is the model as it is, before the first stage.
        last: of the last of several, which add units to those of the first; None: there is one.
    """

    journal: Journal
    stage: int
    last: int | None = None

    @property
    def directory(self) -> Path:
        return self.journal.directory

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The journal's entries, in order."""
        last = self.stage if self.last is None else self.last
        return [entry for entry in self.journal.finished if self.stage <= entry["stage"] <= last]

    @property
    def files(self) -> list[str]:
        """Their files, each once, in order."""
        return list(dict.fromkeys(file for entry in self.finished for file in entry["files"]))

    def unit_name(self, i: int, total: int) -> str:
        """The name of unit i of ``total``, which its file has until it is merged."""
        return f"stage-{self.stage + 1}-{i + 1:05d}-of-{total:05d}.safetensors"

    def tensors(self, i: int, prefix: str) -> dict[str, Tensor]:
        """Reads the tensors of unit i, all of whose names begin with ``prefix``."""
        headers = [read_shard_header(self.directory / file) for file in self.finished[i]["files"]]
        found = {name: each for file in headers for name, each in file.items() if name.startswith(prefix)}
        return {name: read_tensor(each) for name, each in found.items()}

    def write(self, file: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """As :meth:`Journal.write`."""
        self.journal.write(file, tensors, record, self.stage)

    def forget(self, count: int) -> None:
        """As :meth:`Journal.forget`."""
        self.journal.forget(self.stage, count)


def journal_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"


def _disk_error(directory: Path, error: Exception) -> OutputError:
    free = shutil.disk_usage(directory if directory.exists() else directory.parent).free
    return OutputError(
        f"{directory} could not be written ({error}); {free / 2**20:.0f} MiB are free there. What is finished is kept: "
        "make room and repeat the same command to continue"
    )
