"""The tokenizer beside a model."""

from __future__ import annotations

import importlib.util
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from lowbit.checkpoints.locate import locate
from lowbit.checkpoints.shards import ModelError, read_json

if TYPE_CHECKING:
    from lowbit.checkpoints.source import ModelSource

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(model: ModelSource | str | PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer through AutoTokenizer, from its source or from anything that `open_model` takes.

    Raises ModelError when the model's directory has none.
    """
    if isinstance(model, str | PathLike):
        name, path = locate(model, trust_remote_code=trust_remote_code)
        config = path / "config.json"
        if config.is_file():
            read_json(config)  # its error says what is wrong; the tokenizer's would blame the tokenizer
        elif not _has_tokenizer(path):
            raise ModelError(f"{path}: no config.json; expected a model directory as save_pretrained writes it.")
        return read_tokenizer(name, path, trust_remote_code)
    return read_tokenizer(model.name, model.path, trust_remote_code or model.trust_remote_code)


def read_tokenizer(name: str, path: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in a directory; ``name`` is what the user calls the model.

    Raises ModelError where there is none, or it cannot be used.
    """
    # Asked without files, AutoTokenizer may make an empty tokenizer rather than fail.
    if not _has_tokenizer(path):
        raise ModelError(
            f"{name}: no tokenizer in {path} (none of {', '.join(_FILES)}). Copy the model's tokenizer files "
            "beside config.json."
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer backends raise errors of many types on damaged files
        needs = "" if importlib.util.find_spec("sentencepiece") else " It may need the package sentencepiece."
        raise ModelError(f"{name}: the tokenizer in {path} cannot be loaded ({error}).{needs}") from error


def _has_tokenizer(path: Path) -> bool:
    return any((path / file).is_file() for file in _FILES)
