"""Models of other tools to run: converted once into packed native checkpoints in the user's cache, with the numbers of their files.

What is quantized from a GGUF file starts from its decoded weights instead (:mod:`lowbit.checkpoints.gguf_reader`).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from lowbit.checkpoints.formats import FORMATS, FileFormat, Unreadable
from lowbit.checkpoints.formats.gguf import Gguf
from lowbit.checkpoints.gguf_reader import DEMO_NAME, cached, converted
from lowbit.checkpoints.locate import gguf_file, locate
from lowbit.checkpoints.native import Native
from lowbit.checkpoints.packed_model import PackedModel
from lowbit.checkpoints.shards import fingerprint, read_headers, read_json


def locate_to_run(model: str | PathLike[str], *, trust_remote_code: bool = False) -> Path:
    """The directory of a model that is to run: as :func:`~lowbit.checkpoints.locate.locate` has it, but weights that another tool
    packed stay packed where a packed layer holds them.

    Raises:
        ModelError: as ``locate``, and a damaged file or directory.
    """
    file = None if str(model) == DEMO_NAME else gguf_file(model)
    if file is not None and file.is_file() and Gguf().holds_packed(file):
        return converted(file, "packed-", lambda file, directory: _write(Gguf().read(file), directory))
    path = locate(model, trust_remote_code=trust_remote_code)[1]
    other = _format_of(path)
    if other is None:
        return path
    try:
        packed = other.read(path)
    except Unreadable:  # transformers may, with the tool's own package
        return path
    name = f"{path.resolve().name}-{fingerprint(path / 'config.json', read_headers(path))[:16]}"
    return cached(path, name, lambda directory: _write(packed, directory))


def _format_of(directory: Path) -> FileFormat | None:
    """The format that config.json says, where it is one of another tool that lowbit knows."""
    if not (directory / "config.json").is_file():
        return None
    quantization = read_json(directory / "config.json").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return next((each for each in FORMATS if each.name == method), None)


def _write(model: PackedModel, directory: Path) -> None:
    directory.mkdir(parents=True)
    Native().write(model, directory)
