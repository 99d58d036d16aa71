"""A killed run, repeated, ends in the very bytes of a run that nobody touched."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

import lowbit
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
    with pytest.raises(OutputError, match=r"something else.*differ"):
        lowbit.quantize(model, "rtn", random_ids(2, 16), out=tmp_path / "out", max_kl=50)
    lowbit.quantize(model, "rtn", random_ids(2, 16), out=tmp_path / "out", max_kl=50, restart=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_finished_block_whose_file_was_damaged_is_made_again(tmp_path):
    journal = Journal(tmp_path / "out", {"recipe": "a"})
    journal.open()
    for name in ("one", "two", "three"):
        journal.write(f"{name}.safetensors", {"x": torch.zeros(2)}, {})
    (journal.directory / "two.safetensors").write_bytes(b"broken")
    again = Journal(tmp_path / "out", {"recipe": "a"})
    assert again.open() == 1
    assert [entry["file"] for entry in again.finished] == ["one.safetensors"]


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
    monkeypatch.setattr(journals, "save_file", _raise_no_space)
    with pytest.raises(OutputError, match=r"No space left.*repeat the same command"):
        journal.write("two.safetensors", {"x": torch.zeros(2)}, {})
    monkeypatch.undo()
    assert Journal(tmp_path / "out", {"recipe": "a"}).open() == 1


def _raise_no_space(*_):
    raise OSError(28, "No space left on device")
