"""GGUF files that lowbit wrote, as ordinary model directories: packed weights decoded in float32, the others as they are stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lowbit.checkpoints.formats.gguf import Gguf
from lowbit.checkpoints.formats.gguf_reading import opened
from lowbit.checkpoints.formats.gguf_writing import CONFIG_KEY
from lowbit.checkpoints.native.writing import ShardWriter
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel
from lowbit.checkpoints.shards import INDEX, ModelError, read_shard_header
from lowbit.kernels import decode_packed

_SHARD = 2**30  # bytes


def own_model(file: Path) -> PackedModel | None:
    """The model of a GGUF file that lowbit wrote, which then says its config; None for another file. Raises ModelError as
    :meth:`Gguf.read`."""
    try:
        reader = opened(file)
    except ModelError:  # the other reader says what is wrong
        return None
    return Gguf().model_of(file, reader) if reader.get_field(CONFIG_KEY) is not None else None


def write_decoded(model: PackedModel, directory: Path) -> None:
    """Writes ``model``, one tensor at a time, into the new ``directory``."""
    directory.mkdir(parents=True)
    writer = ShardWriter(directory, _SHARD)
    for part in model.parts():
        if isinstance(part, PackedLayer):
            weight = decode_packed(part.tensors, part.description.spec, part.description.shape)
            bias = {f"{part.name}.bias": part.tensors["bias"]} if part.description.bias is not None else {}
            writer.add({f"{part.name}.weight": weight, **bias})
        else:
            writer.add(part.named_tensors())
    shards = writer.close()
    for each in model.files:
        shutil.copyfile(each, directory / each.name)
    names = {name: shard for shard in shards for name in read_shard_header(directory / shard)}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}, sort_keys=True))
    (directory / "config.json").write_text(json.dumps(dict(model.config), indent=2, sort_keys=True))
