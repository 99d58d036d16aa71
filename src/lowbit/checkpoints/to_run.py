"""Models of other tools to run: converted once into packed native checkpoints in the user's cache, with the numbers of their files.

What is quantized from a GGUF file starts from its decoded weights instead (:mod:`lowbit.checkpoints.gguf_reader`).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from lowbit.checkpoints.formats import FORMATS, Unreadable
from lowbit.checkpoints.formats.directory import quantization_in
from lowbit.checkpoints.formats.gguf import Gguf
from lowbit.checkpoints.gguf_reader import DEMO_NAME, cached, conversion_of, converted
from lowbit.checkpoints.locate import gguf_file, locate
from lowbit.checkpoints.native import Native
from lowbit.checkpoints.packed_model import PackedModel
from lowbit.checkpoints.shards import fingerprint, read_headers
from lowbit.checkpoints.tokenizer import load_tokenizer, read_tokenizer

_PACKED = "packed-"


def locate_to_run(model: str | PathLike[str], *, trust_remote_code: bool = False) -> Path:
    """The directory of a model that is to run: as :func:`~lowbit.checkpoints.locate.locate` has it, but weights that another tool
    packed stay packed where a packed layer holds them.

    Raises:
        ModelError: as ``locate``, and a damaged file or directory.
    """
    file = _gguf_to_run(model)
    made = None if file is None else conversion_of(file, _PACKED)
    if made is not None:  # the file is not read again
        return made
    try:
        path, packed = open_packed(model, trust_remote_code=trust_remote_code)
    except Unreadable:  # transformers may, with the tool's own package
        return locate(model, trust_remote_code=trust_remote_code)[1]
    if packed is None:
        return path
    if path.is_file():
        return converted(path, _PACKED, lambda file, directory: _write(packed, directory))
    name = f"{path.resolve().name}-{fingerprint(path / 'config.json', read_headers(path))[:16]}"
    return cached(path, name, lambda directory: _write(packed, directory))


def open_packed(model: str | PathLike[str], *, trust_remote_code: bool = False) -> tuple[Path, PackedModel | None]:
    """The file or directory of a model, and its packed weights as a stream where another tool packed them; None for an ordinary
    model and for lowbit's own.

    Raises:
        Unreadable: packed by a known tool in a way that lowbit does not read.
        ModelError: as ``locate``, and a damaged file or directory.
    """
    file = _gguf_to_run(model)
    packed = None if file is None else Gguf().read_packed(file)
    if file is not None and packed is not None:
        return file, packed
    path = locate(model, trust_remote_code=trust_remote_code)[1]
    said = quantization_in(path) if (path / "config.json").is_file() else None
    method = None if said is None else said.get("quant_method")
    other = next((each for each in FORMATS if each.name == method), None)
    return path, None if other is None else other.read(path)


def tokenizer_to_run(model: str | PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model that is to run, as :func:`~lowbit.checkpoints.tokenizer.load_tokenizer`; that of a packed GGUF file
    without its weights decoded."""
    file = _gguf_to_run(model)
    if file is None:
        return load_tokenizer(model, trust_remote_code=trust_remote_code)
    return read_tokenizer(file.stem, locate_to_run(model), trust_remote_code)


def _gguf_to_run(model: str | PathLike[str]) -> Path | None:
    """The GGUF file that a model is, whose weights stay packed where it runs; None for another model and the demo's."""
    file = None if str(model) == DEMO_NAME else gguf_file(model)
    return file if file is not None and file.is_file() else None


def _write(model: PackedModel, directory: Path) -> None:
    directory.mkdir(parents=True)
    Native().write(model, directory)
