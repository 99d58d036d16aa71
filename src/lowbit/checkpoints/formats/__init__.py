"""The file formats that lowbit knows, one class each."""

from lowbit.checkpoints.formats.awq import Awq
from lowbit.checkpoints.formats.base import FileFormat, Unreadable
from lowbit.checkpoints.formats.bitsandbytes import BitsAndBytes
from lowbit.checkpoints.formats.compressed_tensors import CompressedTensors
from lowbit.checkpoints.formats.gguf import Gguf
from lowbit.checkpoints.formats.gptq import Gptq
from lowbit.checkpoints.formats.peft import Peft
from lowbit.checkpoints.native import Native
from lowbit.numerics import nearest

FORMATS: list[FileFormat] = [
    Native(),
    CompressedTensors(),
    Gguf(),
    Gptq(),
    Awq(),
    BitsAndBytes(),
    Peft(),
]


def find_format(name: str) -> FileFormat:
    """The format of that name, or of ``name:option``. Raises ValueError where there is none."""
    name, colon, option = name.partition(":")
    for file_format in FORMATS:
        if file_format.name == name:
            return file_format.with_option(option) if colon else file_format
    raise ValueError(f"unknown format {name!r}{nearest(name, [each.name for each in FORMATS])}")


__all__ = ["FORMATS", "FileFormat", "Unreadable", "find_format"]
