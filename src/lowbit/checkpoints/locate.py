"""From what a user calls a model to its local directory: a path, a hub id, a GGUF file, the demo model."""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path

from transformers import PreTrainedModel

from lowbit.checkpoints.gguf_reader import DEMO_NAME, convert_gguf, demo_gguf
from lowbit.checkpoints.shards import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_HUB_FILES = [
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.jinja",
    "README.md",
]  # never pickled weights
_HUB_TIMEOUT = 10  # seconds


def locate(spec: str | PathLike[str], *, trust_remote_code: bool = False) -> tuple[str, Path]:
    """A model's name and local directory: downloads a hub id, converts a GGUF file. Raises ModelError."""
    if not isinstance(spec, str | PathLike):
        raise ModelError(
            f"found a model of type {type(spec).__name__}, expected a directory, a hub id or a .gguf file."
        )
    text = os.fspath(spec)
    path = Path(text).expanduser()
    file = gguf_file(text)
    if file is not None:
        return DEMO_NAME if text == DEMO_NAME else path.stem, convert_gguf(file)
    check_place(spec)
    return (path.resolve().name, path) if path.is_dir() else (text, _download(text, trust_remote_code))


def check_place(spec: str | PathLike[str]) -> None:
    """Refuses a path where nothing is that can be a model, without a network and before any work; a hub id passes unasked.

    Raises:
        ModelError: no such directory or file, or a file of another kind.
    """
    text = os.fspath(spec)
    path, expected = Path(text).expanduser(), f"expected a model directory, a .gguf file, a hub id or {DEMO_NAME}."
    if path.is_dir() or text == DEMO_NAME:
        return
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{text}: no such file; {expected}")
    elif path.is_file():
        raise ModelError(f"{text}: a file; {expected}")
    elif not isinstance(spec, str) or not _HUB_ID.fullmatch(text):
        raise ModelError(f"{text}: no such directory; {expected}")


def gguf_file(spec: str | PathLike[str] | PreTrainedModel) -> Path | None:
    """The GGUF file that a model is read from, also as the only one of a directory; None for a directory, a hub id or a model in memory."""
    if not isinstance(spec, str | PathLike):
        return None
    path = Path(os.fspath(spec)).expanduser()
    if os.fspath(spec) == DEMO_NAME:
        return demo_gguf()
    if path.is_dir() and not (path / "config.json").exists():
        files = [*path.glob("*.gguf")]
        return files[0] if len(files) == 1 else None
    return path if path.suffix.lower() == ".gguf" else None


def _download(repo: str, trust_remote_code: bool) -> Path:
    import huggingface_hub

    patterns = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns, etag_timeout=_HUB_TIMEOUT))
    except Exception as error:  # the client's network errors have no common base but this
        raise ModelError(
            f"{repo}: no such directory here, and the hub did not give a model of that name ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Without a network, pass a local directory "
            f"with config.json and safetensors, a .gguf file, or {DEMO_NAME}."
        ) from error
