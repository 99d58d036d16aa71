"""GGUF files that lowbit wrote, as ordinary model directories: packed weights decoded in float32, the others as they are stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gguf import GGUFReader

from lowbit.checkpoints.formats.gguf import Gguf
from lowbit.checkpoints.formats.gguf_writing import CONFIG_KEY
from lowbit.checkpoints.native.writing import ShardWriter
from lowbit.checkpoints.packed_model import PackedLayer
from lowbit.checkpoints.shards import INDEX, read_shard_header
from lowbit.kernels import decode_packed

_SHARD = 2**30  # bytes


def is_own(file: Path) -> bool:
    """Whether lowbit wrote a GGUF file, which then says its config."""
    try:
        return GGUFReader(file).get_field(CONFIG_KEY) is not None
    except Exception:  # it raises whatever damaged bytes lead it to, and the other reader says what is wrong
        return False


def write_decoded(file: Path, directory: Path) -> None:
    """Writes the model of ``file``, one tensor at a time, into the new ``directory``. Raises ModelError as :meth:`Gguf.read`."""
    model = Gguf().read(file)
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
