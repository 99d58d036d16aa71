"""GGUF files to run: converted once into packed native checkpoints in the user's cache, with the numbers of the file.

What is quantized from a GGUF file starts from its decoded weights instead (:mod:`lowbit.checkpoints.gguf_reader`).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from lowbit.checkpoints.formats.gguf import Gguf
from lowbit.checkpoints.gguf_reader import DEMO_NAME, converted
from lowbit.checkpoints.locate import gguf_file, locate
from lowbit.checkpoints.native import Native


def locate_to_run(model: str | PathLike[str], *, trust_remote_code: bool = False) -> Path:
    """The directory of a model that is to run: as :func:`~lowbit.checkpoints.locate.locate` has it, but weights of a GGUF file stay
    packed where a packed layer holds them.

    Raises:
        ModelError: as ``locate``.
    """
    file = None if str(model) == DEMO_NAME else gguf_file(model)
    if file is None or not file.is_file() or not Gguf().holds_packed(file):
        return locate(model, trust_remote_code=trust_remote_code)[1]
    return converted(file, "packed-", _pack)


def _pack(file: Path, directory: Path) -> None:
    model = Gguf().read(file)
    directory.mkdir(parents=True)
    Native().write(model, directory)
