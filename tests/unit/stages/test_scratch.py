"""Scratch directories: gone after their run, and after the next one where their run was killed."""

from __future__ import annotations

from filelock import FileLock

from lowbit.stages.scratch import MARK, scratch_directory


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    for name in ("r-left", "r-running", "rr-other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARK).touch()
    (tmp_path / "r-mine").mkdir()  # not marked: a directory of the user
    with FileLock(tmp_path / "r-running" / MARK), scratch_directory("r", tmp_path) as folder:
        (folder / "file").touch()
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"r-running", "rr-other", "r-mine", folder.name}
    assert {path.name for path in tmp_path.iterdir()} == {"r-running", "rr-other", "r-mine"}
