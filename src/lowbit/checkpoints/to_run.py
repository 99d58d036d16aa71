"""Models of other tools to run: converted once into packed native checkpoints in the user's cache, with the numbers of their files.

What is quantized from a GGUF file starts from its decoded weights instead (:mod:`lowbit.checkpoints.gguf_reader`).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from lowbit.checkpoints.formats import FORMATS, Unreadable
from lowbit.checkpoints.formats.directory import quantization_in
from lowbit.checkpoints.formats.gguf import Gguf
from lowbit.checkpoints.gguf_reader import DEMO_NAME, cached, converted
from lowbit.checkpoints.locate import gguf_file, locate
from lowbit.checkpoints.native import Native
from lowbit.checkpoints.packed_model import PackedModel
from lowbit.checkpoints.shards import fingerprint, read_headers


def locate_to_run(model: str | PathLike[str], *, trust_remote_code: bool = False) -> Path:
    """The directory of a model that is to run: as :func:`~lowbit.checkpoints.locate.locate` has it, but weights that another tool
    packed stay packed where a packed layer holds them.

    Raises:
        ModelError: as ``locate``, and a damaged file or directory.
    """
    try:
        path, packed = open_packed(model, trust_remote_code=trust_remote_code)
    except Unreadable:  # transformers may, with the tool's own package
        return locate(model, trust_remote_code=trust_remote_code)[1]
    if packed is None:
        return path
    if path.is_file():
        return converted(path, "packed-", lambda file, directory: _write(packed, directory))
    name = f"{path.resolve().name}-{fingerprint(path / 'config.json', read_headers(path))[:16]}"
    return cached(path, name, lambda directory: _write(packed, directory))


def open_packed(model: str | PathLike[str], *, trust_remote_code: bool = False) -> tuple[Path, PackedModel | None]:
    """The file or directory of a model, and its packed weights as a stream where another tool packed them; None for an ordinary
    model and for lowbit's own.

    Raises:
        Unreadable: packed by a known tool in a way that lowbit does not read.
        ModelError: as ``locate``, and a damaged file or directory.
    """
    file = None if str(model) == DEMO_NAME else gguf_file(model)
    if file is not None and file.is_file() and Gguf().holds_packed(file):
        return file, Gguf().read(file)
    path = locate(model, trust_remote_code=trust_remote_code)[1]
    said = quantization_in(path) if (path / "config.json").is_file() else None
    method = None if said is None else said.get("quant_method")
    other = next((each for each in FORMATS if each.name == method), None)
    return path, None if other is None else other.read(path)


def _write(model: PackedModel, directory: Path) -> None:
    directory.mkdir(parents=True)
    Native().write(model, directory)
