"""The file formats that lowbit knows, one class each."""

from lowbit.checkpoints.formats.base import FileFormat, WithoutWriter
from lowbit.checkpoints.formats.compressed_tensors import CompressedTensors
from lowbit.checkpoints.formats.gguf import Gguf
from lowbit.checkpoints.formats.gptq import Gptq
from lowbit.checkpoints.native import Native
from lowbit.numerics import nearest

FORMATS: list[FileFormat] = [
    Native(),
    CompressedTensors(),
    Gguf(),
    Gptq(),
]


def find_format(name: str) -> FileFormat:
    """The format of that name. Raises ValueError where there is none."""
    for file_format in FORMATS:
        if file_format.name == name:
            return file_format
    raise ValueError(f"unknown format {name!r}{nearest(name, [each.name for each in FORMATS])}")


__all__ = ["FORMATS", "FileFormat", "WithoutWriter", "find_format"]
