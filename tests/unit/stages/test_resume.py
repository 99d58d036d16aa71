"""A killed run, repeated, ends in the very bytes of a run that nobody touched."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.checkpoints.target import check_target
from lowbit.data import Calibration
from lowbit.stages import journal as journals
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal, OutputError

from helpers import random_ids, tiny_llama
from matrix import save_model

# Where the runs of one test come from: a process that has imported everything once and forks for each.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["lowbit", "transformers.models.llama.modeling_llama"])


def _quantize(model: Path, out: Path, point: str) -> None:
    """Quantizes ``model`` into ``out``; kills itself without notice at the progress call or journal act named by ``point``."""
    torch.set_num_threads(1)
    what, _, count = point.partition(":")
    calls = 0

    def passed(kind: str) -> bool:
        nonlocal calls
        calls += what == kind
        return what == kind and calls == int(count)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(done, total, text) -> None:
        if passed("tick"):
            die()

    replace, append = os.replace, Journal._append

    def renamed(*args, **kwargs) -> None:
        if passed("before-rename"):
            die()
        replace(*args, **kwargs)
        if passed("after-rename"):
            die()

    def appended(self, entry) -> None:
        if passed("half-line"):
            with self.path.open("a") as file:
                file.write(journals.journal_line(entry)[:40])
            die()
        append(self, entry)

    journals.os.replace, Journal._append = renamed, appended
    recipe = lowbit.recipe("awq+gptq", bits=3, group_size=32, order="group")
    lowbit.quantize(model, recipe, random_ids(3, 24), out=out, max_kl=50, progress=progress)


def _run(model: Path, out: Path, point: str) -> int:
    process = PROCESSES.Process(target=_quantize, args=(model, out, point))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def _hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_run_killed_at_many_points_continues_to_the_same_bytes(tmp_path):
    model = tiny_llama(tmp_path / "model", blocks=3)
    assert _run(model, tmp_path / "whole", "never") == 0
    wanted = _hashes(tmp_path / "whole")
    assert any(name.endswith(".safetensors") for name in wanted) and "config.json" in wanted
    for point in ("tick:7", "before-rename:1", "after-rename:2", "tick:70", "half-line:2"):
        assert _run(model, tmp_path / "killed", point) == -signal.SIGKILL, f"nothing was killed at {point}"
        assert not (tmp_path / "killed").exists(), f"something that looks finished exists after a kill at {point}"
    assert _run(model, tmp_path / "killed", "never") == 0
    assert _hashes(tmp_path / "killed") == wanted
    assert not (tmp_path / "killed.partial").exists()


def test_what_a_fold_changes_and_nothing_packs_runs_as_it_is_stored(tmp_path, monkeypatch):
    """Here the router of experts behind a smoothed norm, in a checkpoint of half precision."""
    save_model("mixtral", tmp_path / "model").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    behind, move = [], Walk._behind

    def kept(walk, block, call):
        error = move(walk, block, call)
        behind.append(walk.store["quant"].clone())
        return error

    def stop(done, total, what):
        if done >= 1:
            raise KeyboardInterrupt

    def run(**options):
        recipe = lowbit.recipe("smoothquant", bits=4)
        lowbit.quantize(tmp_path / "model", recipe, random_ids(6, 24) % 48, out=tmp_path / "out", max_kl=50, **options)

    monkeypatch.setattr(Walk, "_behind", kept)
    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    run()
    first, again, _ = behind
    assert torch.equal(first, again)


def test_a_partial_run_of_something_else_is_not_continued(tmp_path):
    model = tiny_llama(tmp_path / "model")
    journal = Journal(tmp_path / "out", {"recipe": "a"})
    journal.open()
    journal.write("model-1.safetensors", {"x": torch.zeros(2)}, {})
    journal.close()
    with pytest.raises(OutputError, match=r"something else.*differ"):
        lowbit.quantize(model, "rtn", random_ids(2, 16), out=tmp_path / "out", max_kl=50)
    lowbit.quantize(model, "rtn", random_ids(2, 16), out=tmp_path / "out", max_kl=50, restart=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_run_that_would_be_measured_on_other_windows_is_not_continued(tmp_path):
    model, ids = tiny_llama(tmp_path / "model"), random_ids(7, 16)

    def run(held_out, **options):
        text = Calibration(ids[:4], "a text", "0", held_out=held_out)
        return lowbit.quantize(model, "gptq", text, out=tmp_path / "out", max_kl=50, **options)

    def stop(done, total, what):
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ids[4:6], progress=stop)
    for other in (ids[5:7], ids[4:5], None):
        with pytest.raises(OutputError, match=r"something else \(held_out differ\)"):
            run(other)
    assert run(ids[4:6]).measured_on.startswith("2 windows of 16 tokens")


def test_a_continued_run_computes_as_it_began_whatever_the_clock_says_then(tmp_path, monkeypatch):
    from lowbit.kernels import instructions

    model, ids = tiny_llama(tmp_path / "model"), random_ids(4, 16)

    def run(name, gain, **options):
        monkeypatch.setattr(instructions, "_assumed", {})
        monkeypatch.setattr(instructions, "speedup", lambda dtype: gain)
        lowbit.quantize(model, "gptq", ids, out=tmp_path / name, max_kl=50, **options)

    def stop(done, total, what):
        if done >= 1:
            raise KeyboardInterrupt

    run("whole", 1.6)
    with pytest.raises(KeyboardInterrupt):
        run("again", 1.6, progress=stop)
    run("again", 1.4)
    assert _hashes(tmp_path / "again") == _hashes(tmp_path / "whole")
    assert '"products": "bfloat16"' in (tmp_path / "again" / "lowbit-report.json").read_text()


def _three_units(directory: Path) -> Journal:
    journal = Journal(directory / "out", {"recipe": "a"})
    journal.open()
    for name in ("one", "two", "three"):
        journal.write(f"{name}.safetensors", {"x": torch.zeros(2)}, {})
    journal.close()
    return journal


def test_a_finished_block_whose_file_was_damaged_is_made_again(tmp_path):
    (_three_units(tmp_path).directory / "two.safetensors").write_bytes(b"broken")
    again = Journal(tmp_path / "out", {"recipe": "a"})
    assert again.open() == 1
    assert [entry["file"] for entry in again.finished] == ["one.safetensors"]


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda lines: [*lines, lines[-1]], 3),
        (lambda lines: [*lines, b"{}"], 3),
        (lambda lines: [*lines[:2], b"[1]", *lines[2:]], 1),
        (lambda lines: [*lines[:3], b"\xff\xfe"], 2),
        (lambda lines: [lines[0], lines[1].replace(b"one.safetensors", b"../one.safetensors"), *lines[2:]], 0),
        (lambda lines: [b"[]", *lines[1:]], None),
        (lambda lines: [b"null"], None),
        (lambda lines: [b"\xff"], None),
    ],
)
def test_a_damaged_journal_keeps_the_units_before_the_damage_or_is_refused(tmp_path, damage, left):
    path = _three_units(tmp_path).path
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())) + b"\n")
    again = Journal(tmp_path / "out", {"recipe": "a"})
    if left is None:
        with pytest.raises(OutputError, match=r"journal.jsonl is damaged; remove .* or pass --restart"):
            again.open()
    else:
        assert again.open() == left


def test_a_record_that_no_block_wrote_is_made_again(tmp_path):
    model, out = tiny_llama(tmp_path / "model"), tmp_path / "out"

    def stop(done, total, what):
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(model, "rtn", None, out=out, progress=stop)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    header, entry = (json.loads(line) for line in journal.read_text().splitlines())
    journal.write_text(f"{json.dumps(header)}\n{json.dumps(entry | {'record': {}})}\n")
    assert lowbit.quantize(model, "rtn", None, out=out).coverage == 1.0
    lowbit.load(out)


def test_what_an_interrupted_run_left_and_no_line_names_is_removed(tmp_path):
    directory = _three_units(tmp_path).directory
    for name in (".tmpXYZ", "four.safetensors", "one.writing"):
        (directory / name).write_bytes(b"half a shard")
    (directory / "scratch").mkdir()
    again = Journal(tmp_path / "out", {"recipe": "a"})
    again.open()
    assert {path.name for path in directory.iterdir()} == {
        "journal.jsonl",
        "lock-holder",
        "one.safetensors",
        "two.safetensors",
        "three.safetensors",
    }
    again.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{n}.safetensors" for n in ("one", "two", "three")}


def test_a_kill_between_the_last_two_renames_loses_nothing(tmp_path):
    journal = _three_units(tmp_path)
    journal.path.replace(tmp_path / "out.partial.journal")
    assert Journal(tmp_path / "out", {"recipe": "a"}).open() == 3


def test_what_a_kill_after_the_last_rename_left_is_dropped(tmp_path):
    journal = _three_units(tmp_path)
    journal.path.replace(tmp_path / "out.partial.journal")
    journal.directory.rename(tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        Journal(tmp_path / "out", {"recipe": "a"}).open()
    (tmp_path / "out").rename(tmp_path / "moved")
    again = Journal(tmp_path / "out", {"recipe": "b"})
    assert again.open() == 0 and not (tmp_path / "out.partial.journal").exists()
    again.close()


def test_a_lock_ends_with_its_process_and_is_left_nowhere(tmp_path):
    code = "import os, sys; from lowbit.stages.journal import Journal\nj = Journal(sys.argv[1], {}); j.open(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out.partial.lock"}
    journal = Journal(tmp_path / "out", {})
    assert journal.open() == 0
    journal.close()
    assert {path.name for path in tmp_path.rglob("*")} == {"out.partial", "journal.jsonl"}


def test_a_kill_after_the_last_rename_leaves_what_the_next_run_removes(tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    model = tiny_llama(tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "close", killed)
        lowbit.quantize(model, "rtn", None, out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "out.partial.journal", "out.partial.lock"}
    with pytest.raises(OutputError, match="exists and is not empty"):
        lowbit.quantize(model, "rtn", None, out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_a_file_of_the_user_beside_the_target_stays(tmp_path):
    (tmp_path / "out.journal").write_text("mine")
    _three_units(tmp_path)
    assert (tmp_path / "out.journal").read_text() == "mine"


def test_a_second_run_on_one_target_is_told_who_has_it(tmp_path):
    first, second = (Journal(tmp_path / "out", {"recipe": "a"}) for _ in range(2))
    first.open()
    for restart in (False, True):
        with pytest.raises(OutputError, match=rf"written by another run \(process {os.getpid()} on .*since"):
            second.open(restart=restart)
    first.close()
    assert second.open() == 0


def test_a_target_that_cannot_be_replaced_is_refused_and_a_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert check_target(tmp_path / "link") == tmp_path / "real"
    monkeypatch.chdir(tmp_path / "real")
    with pytest.raises(OutputError, match=r"the current directory, which cannot be replaced.*-o .*real/NAME"):
        check_target(Path())
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(OutputError, match="a mount point, which cannot be replaced"):
        check_target(tmp_path / "real")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"out cannot be made: .* cannot be written"):
        check_target(tmp_path / "deep" / "out")
    with pytest.raises(OutputError, match=r"-o names a directory, in which the files are written; leave out \.gguf"):
        check_target(tmp_path / "model.gguf")


def test_a_target_that_is_in_use_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")
    with pytest.raises(OutputError, match="not empty"):
        lowbit.quantize(tmp_path / "no-model", "rtn", None, out=tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "keep me"


def test_a_full_disk_leaves_finished_blocks_and_says_how_to_continue(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "out", {"recipe": "a"})
    journal.open()
    journal.write("one.safetensors", {"x": torch.zeros(2)}, {})
    monkeypatch.setattr(journals, "write_shard", _raise_no_space)
    with pytest.raises(OutputError, match=r"No space left.*repeat the same command"):
        journal.write("two.safetensors", {"x": torch.zeros(2)}, {})
    monkeypatch.undo()
    journal.close()
    assert Journal(tmp_path / "out", {"recipe": "a"}).open() == 1


def _raise_no_space(*_):
    raise OSError(28, "No space left on device")
