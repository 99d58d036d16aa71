"""Everything of a model's directory that is not weights: what belongs to it and must go where it goes."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowbit.checkpoints.native.reading import CONFIG, JOURNAL

_WEIGHTS = frozenset(
    (
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
        ".npz",
        ".lock",
        ".incomplete",
    )
)
_TEMPLATES = "additional_chat_templates"  # the folder of a tokenizer with several
_LARGEST = 2**27  # bytes; a file that is larger is not one of a processor or tokenizer


def copy_companions(source: Path, directory: Path, *, code: bool = False) -> None:
    """Copies processor and generation configs, chat templates, vocabularies and the like, where ``directory`` has no such file.

    Left out are weights in any format and their indices, config.json, the card (both are written anew), hidden files, and,
    unless ``code`` is set, Python files.
    """
    for file in sorted(source.iterdir()):
        target = directory / file.name
        if target.exists() or file.name.startswith("."):
            continue
        if file.is_dir():
            if file.name == _TEMPLATES:
                shutil.copytree(file, target)
        elif _belongs(file, code):
            shutil.copyfile(file, target)


def _belongs(file: Path, code: bool) -> bool:
    if file.suffix in _WEIGHTS or file.name.endswith(".index.json") or file.name in (CONFIG, JOURNAL, "README.md"):
        return False
    return file.stat().st_size <= _LARGEST and (code or file.suffix != ".py")
