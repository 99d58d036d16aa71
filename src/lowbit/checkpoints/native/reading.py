"""Native checkpoints without their weights: config and headers, checked against each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoints.description import METHOD, ModelDescription
from lowbit.checkpoints.native.checking import check_layers
from lowbit.checkpoints.shards import ModelError, TensorHeader, read_headers, read_json, refuse_more_layers
from lowbit.modules.cache_calibration import CALIBRATION

CONFIG = "config.json"
JOURNAL = "journal.jsonl"  # of a run that writes here; gone when it has finished
_CONTINUE = "run the command that makes it again, and it continues where it stopped"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory. ``description``: of the packed layers; None where the model is not quantized by lowbit."""

    config: dict[str, Any]
    headers: dict[str, TensorHeader]
    description: ModelDescription | None


def read_checkpoint(directory: str | os.PathLike[str], *, unfinished: bool = False) -> Checkpoint:
    """The config and every tensor's header of a model directory, native or not, checked without reading weights.

    ``unfinished`` reads a directory whose run has written everything but not been declared finished.

    Raises:
        ModelError: not a directory, unfinished, a missing or truncated shard, or a packed layer that is not whole.
    """
    directory = Path(directory)
    if not directory.is_dir():
        partial = directory.with_name(directory.name + ".partial")
        hint = f"; {partial} holds an unfinished run: {_CONTINUE}" if partial.is_dir() else ""
        raise ModelError(f"{directory}: no such directory{hint}")
    if (directory / JOURNAL).is_file() and not unfinished:
        raise ModelError(f"{directory}: an unfinished run; {_CONTINUE}")
    if not (directory / CONFIG).is_file():
        if any(directory.glob("*.safetensors")):
            raise ModelError(
                f"{directory}: unfinished, it has weights but no {CONFIG}, which is written last; {_CONTINUE}"
            )
        raise ModelError(f"{directory}: no {CONFIG}; expected a directory that lowbit or save_pretrained wrote")
    config = read_json(directory / CONFIG)
    if not isinstance(said := config.get("quantization_config", {}), dict):
        raise ModelError(f"{directory}: quantization_config of {CONFIG} is an object, found {said!r:.100}")
    headers = read_headers(directory)
    refuse_more_layers(directory, config, headers)
    description = check_layers(directory, config["quantization_config"], headers) if is_native(config) else None
    return Checkpoint(config, headers, description)


def read_quantized(directory: str | os.PathLike[str]) -> tuple[Checkpoint, ModelDescription]:
    """:func:`read_checkpoint` of a directory that must be native. Raises ModelError where it is not."""
    checkpoint = read_checkpoint(directory)
    if checkpoint.description is None:
        raise ModelError(
            f"{directory}: not quantized by lowbit; {CONFIG} has no quantization_config of it. `lowbit quantize` packs a model, "
            "`lowbit import` takes one that another tool has packed"
        )
    return checkpoint, checkpoint.description


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a lowbit checkpoint."""
    description = config.get("quantization_config")
    return isinstance(description, Mapping) and description.get("quant_method") == METHOD


def bits_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """How large a native checkpoint is, from headers and config alone; every stored bit is counted.

    Returns:
        ``bytes``: of the weight files. ``quantized_bytes``: of packed layers without their biases (codes, scales, zero
        points, transforms, static activation parameters). ``quantized_weights``: how many weights these replace.
        ``bits_per_weight``: of the packed layers; None where only the cache is quantized. ``model_bits_per_weight``: all
        tensors over all parameters of the model. ``layers``: how many are packed.

    Raises:
        ModelError: not a native checkpoint, or a damaged one.
    """
    checkpoint, description = read_quantized(directory)
    layers = description.layers
    quantized_bits = sum(layer.stored_bits for layer in layers.values())
    quantized = sum(layer.features[0] * layer.features[1] for layer in layers.values())
    return {
        "bytes": sum(file.stat().st_size for file in {header.file for header in checkpoint.headers.values()}),
        "quantized_bytes": quantized_bits // 8,
        "quantized_weights": quantized,
        "bits_per_weight": quantized_bits / quantized if quantized else None,
        "model_bits_per_weight": _model_bits_per_weight(checkpoint),
        "layers": len(layers),
    }


def model_bits_per_weight(directory: str | os.PathLike[str], *, unfinished: bool = False) -> float:
    """All stored bits of a model directory, packed or not, over the parameters of its model. Reads headers only.

    Raises:
        ModelError: as :func:`read_checkpoint`.
    """
    return _model_bits_per_weight(read_checkpoint(directory, unfinished=unfinished))


def _model_bits_per_weight(checkpoint: Checkpoint) -> float:
    described = checkpoint.description
    layers = {} if described is None else {**described.layers, **described.embeddings}
    packed = {f"{name}.{buffer}" for name, layer in layers.items() for buffer in layer.layout() if buffer != "bias"}
    packed |= _found(described)
    others = (header for name, header in checkpoint.headers.items() if name not in packed)
    parameters = sum(layer.features[0] * layer.features[1] for layer in layers.values())
    parameters += sum(torch.Size(header.shape).numel() for header in others)
    return 8 * sum(header.nbytes for header in checkpoint.headers.values()) / parameters


def _found(described: ModelDescription | None) -> set[str]:
    """Tensors that calibration or training found beside weights: stored, and no parameters of the model."""
    if described is None:
        return set()
    of_caches = described.kv_calibration.items()
    names = {f"{path}.{CALIBRATION}.{buffer}" for path, spec in of_caches for buffer in spec.buffers}
    rotation = None if described.residual is None else described.residual.tensor
    return names if rotation is None else {*names, rotation}
