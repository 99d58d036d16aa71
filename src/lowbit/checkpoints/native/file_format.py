"""The native format as a file format, and the way a model in memory is saved in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.native.checking import checked
from lowbit.checkpoints.native.reading import CONFIG, JOURNAL, read_quantized
from lowbit.checkpoints.native.writing import ShardWriter, plain_config, write_checkpoint_index
from lowbit.checkpoints.packed_model import PackedModel, UsualAnswers, parts_of
from lowbit.checkpoints.shards import INDEX, read_tensor


@dataclass(frozen=True)
class Native(UsualAnswers):
    """lowbit's own format. It holds every packed model.

    Args:
        shard_bytes: of a shard at most; a larger tensor has a shard of its own.
    """

    shard_bytes: int = 2**30
    name = "native"
    title = "native format"
    holds_tables = True
    turns_residual = True

    def why_not(
        self, description: ModelDescription, new_biases: Collection[str] = (), config: Any = None
    ) -> str | None:
        """None: it holds everything that a description can say, where there is anything to hold."""
        return None if description.layers or description.cache else "nothing is quantized"

    def write(self, model: PackedModel, directory: Path) -> None:
        """Writes shards as they fill up, then the model's other files, the index, and config.json last."""
        writer = ShardWriter(directory, self.shard_bytes)
        for part in model.parts():
            writer.add(part.named_tensors())
        if model.description.guarded is not None:
            writer.add({model.description.guarded: torch.empty(0, dtype=torch.uint8)})
        shards = writer.close()
        for file in model.files:
            if file.is_dir():
                shutil.copytree(file, directory / file.name)
            else:
                shutil.copyfile(file, directory / file.name)
        config = {**model.config, "quantization_config": model.description.to_json()}
        write_checkpoint_index(directory, shards, config)

    def read(self, directory: Path) -> PackedModel:
        """A checkpoint as a stream, in the order of its shards; each tensor is read when its layer is asked for.

        Raises:
            ModelError: not a native checkpoint, or a damaged one.
        """
        checkpoint, description = read_quantized(directory)
        headers = checkpoint.headers
        stored = (name for name in headers if name != description.guarded)
        names = sorted(stored, key=lambda name: (headers[name].file.name, headers[name].start))
        return PackedModel(
            description=description,
            config={key: value for key, value in checkpoint.config.items() if key != "quantization_config"},
            parts=lambda: checked(directory, parts_of(description, names, lambda name: read_tensor(headers[name]))),
            files=tuple(file for file in sorted(directory.iterdir()) if _belongs(file)),
        )


def _belongs(file: Path) -> bool:
    """Whether a file or folder of a checkpoint is neither weights nor what is written anew with them."""
    return not (file.name.startswith(".") or file.suffix == ".safetensors" or file.name in (CONFIG, INDEX, JOURNAL))


def save(model: Any, directory: str | os.PathLike[str], *, shard_bytes: int = 4 * 2**30) -> None:
    """Writes a quantized transformers model that is in memory as a native checkpoint (without a tokenizer).

    Raises:
        ValueError: nothing in the model is quantized, or ``directory`` has files already.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; choose another directory or remove it")
    description = ModelDescription.of(model)
    description.to_json()  # raises before anything is written
    directory.mkdir(parents=True, exist_ok=True)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    tensors = _untied(model)
    packed = PackedModel(
        description=description,
        config=plain_config(model.config, model.dtype),
        parts=lambda: parts_of(description, list(tensors), tensors.__getitem__),
    )
    Native(shard_bytes).write(packed, directory)


def _untied(model: Any) -> dict[str, Tensor]:
    """The state, contiguous, without the names that are tied to others."""
    tied = model.all_tied_weights_keys
    return {name: t.detach().contiguous() for name, t in model.state_dict().items() if name not in tied}
