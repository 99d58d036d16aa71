"""What a run has finished, so that a killed one continues where it was and ends in the same bytes.

A run writes into ``DIR.partial`` beside its target and renames it at the very end, so nothing that looks finished exists
before. A block's shard is written under another name, flushed to disk and renamed, and only then does a line with its
hash enter the journal; a kill at any point leaves either no line or a whole shard. The journal's first line says what is
being made from what; a run that would make something else refuses to continue it.

A recipe's stages share the directory. Each has a :class:`Section` of the journal: its finished units, and names for their files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lowbit.checkpoints.target import OutputError, check_target


class Journal:
    """Finished units of one run in ``<out>.partial``: blocks of the walk, shards of a trained model.

    Args:
        out: the target directory, which must not exist or be empty.
        header: what determines the result (model, recipe, calibration, versions), as plain data.
    """

    def __init__(self, out: Path, header: Mapping[str, Any]):
        self.out, self.header = Path(out), json.loads(json.dumps(header))
        self.directory = self.out.with_name(self.out.name + ".partial")
        self.finished: list[dict[str, Any]] = []

    @property
    def path(self) -> Path:
        return self.directory / "journal.jsonl"

    def open(self, *, restart: bool = False) -> int:
        """Makes or continues the partial directory; returns how many units are finished.

        Raises:
            OutputError: the target exists, cannot be written, or holds an unfinished run of something else.
        """
        check_target(self.out)
        try:
            if restart and self.directory.exists():
                shutil.rmtree(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read()
            else:
                self._append({"header": self.header})
        except PermissionError as error:
            raise OutputError(f"{self.directory} cannot be written: {error.strerror}; choose another -o DIR") from error
        except OSError as error:
            raise _disk_error(self.directory, error) from error
        return len(self.finished)

    def _read(self) -> None:
        entries = []
        for line in self.path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the kill came while this line was being written: its unit is not finished
        header = entries[0].get("header") if entries else None
        if header is None:
            raise OutputError(f"{self.path} is damaged; remove {self.directory} or pass --restart to begin anew")
        if header != self.header:
            changed = sorted(key for key in {*header, *self.header} if header.get(key) != self.header.get(key))
            raise OutputError(
                f"{self.directory} holds an unfinished run of something else ({', '.join(changed)} differ); "
                "repeat that command to finish it, pass --restart to discard it, or choose another -o DIR"
            )
        for entry in entries[1:]:
            file = self.directory / entry["file"]
            if not file.exists() or file_sha256(file) != entry["sha256"]:
                break  # damaged since: this unit and those after it are made again
            self.finished.append(entry)
        self.path.write_text("".join(journal_line(entry) for entry in ({"header": self.header}, *self.finished)))

    def section(self, stage: int, *, last: bool = False) -> Section:
        """The part of stage number ``stage``. ``last``: no stage follows, so its shards are the checkpoint's."""
        return Section(self, stage, last)

    def write(self, file: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any], stage: int = 0) -> None:
        """Stores one finished unit of a stage; when this returns it will survive a kill.

        Raises:
            OutputError: the disk is full or not writable.
        """
        self.save(file, tensors)
        entry = {"stage": stage, "file": file, "sha256": file_sha256(self.directory / file), "record": record}
        try:
            self._append(entry)
        except OSError as error:
            raise _disk_error(self.directory, error) from error
        self.finished.append(json.loads(json.dumps(entry)))

    def save(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a file that is there whole or not at all, without a line in the journal. Raises as :meth:`write`."""
        target = self.directory / file
        unfinished = target.with_suffix(".writing")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, {"format": "pt"})
            _flush(unfinished)
            os.replace(unfinished, target)  # noqa: PTH105  (atomic on every system)
        except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own error type
            unfinished.unlink(missing_ok=True)
            raise _disk_error(self.directory, error) from error
        except Exception as error:
            unfinished.unlink(missing_ok=True)
            if type(error).__name__ != "SafetensorError":
                raise
            raise _disk_error(self.directory, error) from error

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(journal_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Makes the partial directory the target, without the journal and the shards of all stages but the last. The last act
        of a run."""
        for shard in self.directory.glob("stage-*.safetensors"):
            shard.unlink()
        self.path.unlink()
        if self.out.exists():
            self.out.rmdir()  # empty: checked by open
        os.replace(self.directory, self.out)  # noqa: PTH105


@dataclass(frozen=True, eq=False)
class Section:
    """What one stage has finished.

    Attributes:
        stage: its number in the recipe, from 0.
        last: no stage follows: its shards are the checkpoint's, and have a checkpoint's names.
    """

    journal: Journal
    stage: int
    last: bool

    @property
    def directory(self) -> Path:
        return self.journal.directory

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The journal's entries of this stage, in order."""
        return [entry for entry in self.journal.finished if entry["stage"] == self.stage]

    @property
    def files(self) -> list[str]:
        """Their files."""
        return [entry["file"] for entry in self.finished]

    def shard_name(self, i: int, total: int) -> str:
        """File i of ``total``."""
        return f"{'model' if self.last else f'stage-{self.stage + 1}'}-{i + 1:05d}-of-{total:05d}.safetensors"

    def write(self, file: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """As :meth:`Journal.write`."""
        self.journal.write(file, tensors, record, self.stage)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def journal_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _disk_error(directory: Path, error: Exception) -> OutputError:
    free = shutil.disk_usage(directory if directory.exists() else directory.parent).free
    return OutputError(
        f"{directory} could not be written ({error}); {free / 2**20:.0f} MiB are free there. Finished blocks are kept: "
        "make room and repeat the same command to continue"
    )
