"""Model directories with packed linears under the names and in the layouts of other tools: safetensors shards and config.json."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.native.reading import CONFIG
from lowbit.checkpoints.native.writing import ShardWriter, write_json
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel, PlainTensor
from lowbit.checkpoints.shards import (
    INDEX,
    ModelError,
    TensorHeader,
    read_headers,
    read_json,
    read_shard_header,
    read_tensor,
)
from lowbit.modules import LinearDescription

_SHARD = 2**30  # bytes
_NOT_COPIED = (".safetensors", ".gguf")

Layer = tuple[LinearDescription, dict[str, Tensor]]


def write_directory(
    model: PackedModel,
    directory: Path,
    quantization: Callable[[list[str]], Mapping[str, Any]],
    tensors_of: Callable[[PackedLayer], Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Writes shards as they fill up, then the model's other files, the index, and config.json last.

    Args:
        model: of packed linears, and embeddings as they are.
        directory: empty.
        quantization: the content of ``quantization_config``, from the names of the modules whose matrices are not packed.
        tensors_of: the tensors of a layer under the names that they have in it.

    Returns:
        The ``quantization_config``.
    """
    writer, plain = ShardWriter(directory, _SHARD), []
    for part in model.parts():
        if isinstance(part, PackedLayer):
            writer.add({f"{part.name}.{name}": tensor for name, tensor in tensors_of(part).items()})
            continue
        writer.add(part.named_tensors())
        if part.tensor.dim() == 2 and part.name.endswith(".weight"):
            plain.append(part.name.removesuffix(".weight"))
    shards = writer.close()
    for file in model.files:
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
    headers = {name: header for shard in shards for name, header in read_shard_header(directory / shard).items()}
    index = {
        "metadata": {"total_size": sum(header.nbytes for header in headers.values())},
        "weight_map": {name: header.file.name for name, header in headers.items()},
    }
    write_json(directory / INDEX, index)
    said = dict(quantization(plain))
    write_json(directory / CONFIG, {**model.config, "quantization_config": said})
    return said


def in_blocks(names: list[str], description: ModelDescription) -> list[str]:
    """Those of ``names`` that lie in the list of blocks in which the packed linears lie."""
    lists = {found[0] for name in description.layers if (found := re.match(r".*?\.(?=\d+\.)", name))}
    return [name for name in names if name.startswith(tuple(lists))]


_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which AutoGPTQ and AutoAWQ say what a config.json does not, and the method that they stand for."""
_OTHER_NAMES = {"w_bit": "bits", "q_group_size": "group_size", "wbits": "bits", "groupsize": "group_size"}


def quantization_in(directory: Path) -> dict[str, Any] | None:
    """What a directory says of its quantized weights, in the keys of transformers' configs; None: nothing."""
    config = read_json(directory / CONFIG).get("quantization_config")
    if not isinstance(config, dict):
        beside = next((name for name in _BESIDE if (directory / name).is_file()), None)
        if config is not None or beside is None:
            return None
        config = {"quant_method": _BESIDE[beside], **read_json(directory / beside)}
    return {_OTHER_NAMES.get(key, key): value for key, value in config.items()}


def quantization_of(directory: Path, method: str) -> dict[str, Any]:
    """The ``quantization_config`` of a directory. Raises ModelError unless it is of ``method``."""
    found = quantization_in(directory)
    if found is None or found.get("quant_method") != method:
        said = None if found is None else found.get("quant_method")
        raise ModelError(f"{directory}: quantized with {said!r}, expected {method!r}")
    return found


def read_directory(
    directory: Path,
    marker: str,
    buffers: tuple[str, ...],
    layer_of: Callable[[str, Mapping[str, Tensor]], Layer],
    dropped: re.Pattern[str] | None = None,
) -> PackedModel:
    """The model of a directory as a stream.

    Args:
        directory: with config.json and shards.
        marker: the tensor that every packed linear has, and no other module.
        buffers: all tensors that it may have, beside its bias.
        layer_of: the packed layer of the module of a name from its tensors.
        dropped: names of tensors that are not of the model.

    Raises:
        ModelError: no packed linear there, and what ``layer_of`` raises.
    """
    headers = read_headers(directory)
    layers = [name.removesuffix(f".{marker}") for name in headers if name.endswith(f".{marker}")]
    if not layers:
        raise ModelError(f"{directory}: no tensor is called {marker}")

    def read(layer: str) -> Layer:
        names = {name: f"{layer}.{name}" for name in (*buffers, "bias") if f"{layer}.{name}" in headers}
        try:
            return layer_of(layer, {name: read_tensor(headers[full]) for name, full in names.items()})
        except (ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise ModelError(f"{directory}: {layer}: {error}") from error

    description = ModelDescription({layer: read(layer)[0] for layer in layers})
    taken = {f"{layer}.{name}" for layer in layers for name in (*buffers, "bias")}
    taken |= {name for name in headers if dropped is not None and dropped.search(name)}
    files = (file for file in sorted(directory.iterdir()) if file.is_file() and file.suffix not in _NOT_COPIED)
    config = read_json(directory / CONFIG)
    return PackedModel(
        description=description,
        config={key: value for key, value in config.items() if key != "quantization_config"},
        parts=lambda: _parts(headers, layers, taken, read),
        files=tuple(file for file in files if file.name not in (CONFIG, INDEX, *_BESIDE)),
    )


def _parts(
    headers: Mapping[str, TensorHeader], layers: list[str], taken: set[str], read: Callable[[str], Layer]
) -> Iterator[PackedLayer | PlainTensor]:
    for layer in layers:
        yield PackedLayer(layer, *read(layer))
    for name in headers.keys() - taken:
        yield PlainTensor(name, read_tensor(headers[name]))
