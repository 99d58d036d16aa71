"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.comparison.results import Results
from lowbit.training.curve import Curve
from lowbit.whole_file import write_whole, write_whole_text

from helpers import tiny_writer


def test_a_file_that_cannot_be_finished_leaves_what_was_there_and_names_itself(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("before")

    def full(file: Path) -> None:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*page\.html"):
        write_whole(page, full)
    assert page.read_text() == "before" and list(tmp_path.iterdir()) == [page]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_lines_that_a_full_disk_does_not_take_name_their_file(tmp_path):
    curve, results = Curve(tmp_path / "curve.jsonl"), Results(tmp_path / "results.jsonl")
    for file in (curve.path, results.path):
        file.unlink(missing_ok=True)
        file.symlink_to("/dev/full")
    for add, name in ((curve.add, "curve"), (results.add, "results")):
        with pytest.raises(OSError, match=rf"No space left on device: .*{name}\.jsonl"):
            add({"step": 1})


def test_links_stay_links_and_pipes_are_written(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    write_whole_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "file").read_text() == "x"
    write_whole_text(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("allocate", "--method", "rtn", "--target-bits", "3.3", "--group-size", "32", "-o", "mix.yaml"),
        ("imatrix", "-o", "it.imatrix.gguf"),
    ],
)
def test_a_full_disk_leaves_no_file_that_stops_the_same_command(words, tmp_path, monkeypatch):
    model = tiny_writer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{6 + i % 100}" for i in range(400)))
    monkeypatch.chdir(tmp_path)
    read = ("--calibration", "text.txt", "--samples", "2", "--seq-len", "32")
    command = [words[0], str(model), *words[1:], *read]
    with monkeypatch.context() as broken:

        def full(descriptor: int) -> None:  # for the result; what the run keeps elsewhere has room
            if Path(f"/proc/self/fd/{descriptor}").readlink().name.endswith(words[-1]):
                raise OSError(errno.ENOSPC, "No space left on device")

        broken.setattr("lowbit.whole_file.os", SimpleNamespace(fsync=full))
        failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 1 and not Path(words[-1]).exists()
    assert f"'{words[-1]}': make room there, and repeat the same command" in failed.stderr
    assert CliRunner().invoke(app, command).exit_code == 0 and Path(words[-1]).stat().st_size
