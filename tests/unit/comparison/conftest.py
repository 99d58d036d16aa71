"""Fixtures of comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.comparison import child

from comparing import model_with_texts


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return model_with_texts(tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture
def here(monkeypatch) -> list[object]:
    """Runs work in this process, which saves seconds of imports for each row; returns the list of work done."""
    done: list[object] = []

    def in_this_process(work, threads, log, progress):
        done.append(work)
        return child.attempt(work, progress)

    monkeypatch.setattr(child, "run_in_child", in_this_process)
    return done
