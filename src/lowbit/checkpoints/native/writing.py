"""Writing native checkpoints: shards as they fill up, the index, and config.json last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.native.checking import check_layers
from lowbit.checkpoints.native.reading import CONFIG
from lowbit.checkpoints.shards import (
    INDEX,
    ModelError,
    TensorHeader,
    read_shard_header,
    shard_names,
    write_shard,
)
from lowbit.whole_file import write_whole_text


class ShardWriter:
    """Writes tensors into shards of at most ``limit`` bytes (a larger tensor has a shard of its own), in the order they come.

    It holds the tensors of one shard. The shards get their names in :meth:`close`, when it is known how many there are.
    """

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit = directory, limit
        self._held: dict[str, Tensor] = {}
        self._size = self._written = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors by their full names."""
        for name, tensor in tensors.items():
            if self._held and self._size + tensor.nbytes > self.limit:
                self._write()
            self._held[name] = tensor
            self._size += tensor.nbytes

    def close(self) -> list[str]:
        """Writes what is left; the names of all shards."""
        self._write()
        names = shard_names(self._written)
        for i, name in enumerate(names):
            self._unnamed(i).replace(self.directory / name)
        return names

    def _write(self) -> None:
        write_shard(self._unnamed(self._written), self._held)
        self._held, self._size = {}, 0
        self._written += 1

    def _unnamed(self, i: int) -> Path:
        return self.directory / f"shard-{i + 1:05}.writing"


def write_checkpoint_index(
    directory: str | os.PathLike[str], shard_files: Iterable[str], config: Mapping[str, Any]
) -> None:
    """Makes a checkpoint of shards that are already in ``directory``: writes the index, then config.json.

    A single shard needs no index, but whoever asks which file holds a tensor then asks as everywhere else.

    Args:
        directory: where the shards are.
        shard_files: their names, such as ``model-00001-of-00031.safetensors``.
        config: the content of config.json: the model's config with ``quantization_config``
            (see :mod:`lowbit.checkpoints.description`).

    Raises:
        ValueError: a shard that is missing or damaged, a tensor in two shards, or a packed layer that is not whole.
    """
    directory = Path(directory)
    headers: dict[str, TensorHeader] = {}
    for shard in sorted(shard_files):
        if not (directory / shard).is_file():
            raise ModelError(f"{directory}: the shard {shard} is missing; was it written?")
        of_shard = read_shard_header(directory / shard)
        for name in of_shard.keys() & headers.keys():
            raise ModelError(f"{directory}: tensor {name} is in two shards, {headers[name].file.name} and {shard}")
        headers |= of_shard
    check_layers(directory, config["quantization_config"], headers)
    index = {
        "metadata": {"total_size": sum(header.nbytes for header in headers.values())},
        "weight_map": {name: header.file.name for name, header in headers.items()},
    }
    write_json(directory / INDEX, index)
    write_json(directory / CONFIG, config)


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: Any,
    description: ModelDescription,
    shard_files: Iterable[str],
    dtype: torch.dtype,
) -> None:
    """:func:`write_checkpoint_index` with the parts that a quantization run has at its end.

    Args:
        directory, shard_files: the shards, already written, tensors named as in the running model.
        config: the transformers config of the original.
        description: what is quantized.
        dtype: of everything that is not packed.
    """
    whole = plain_config(config, dtype) | {"quantization_config": description.to_json()}
    write_checkpoint_index(directory, shard_files, whole)


def plain_config(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json without ``quantization_config``, for a transformers config and a dtype of the weights."""
    # "_name_or_path" is where the original lay on the machine that quantized it.
    left_out = ("quantization_config", "_name_or_path")
    plain = {key: value for key, value in config.to_dict().items() if key not in left_out}
    return plain | {"dtype": str(dtype).removeprefix("torch.")}


def write_json(path: Path, value: Any) -> None:
    """Sorted; the file is whole or not there."""
    write_whole_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
